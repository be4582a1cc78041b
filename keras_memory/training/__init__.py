"""Trains a model on a task in a run folder, and resumes interrupted runs.

`config.py` has the settings, `presets.py` the configurations of the papers,
`tasks.py` the data.
"""

from keras_memory.training.runner import build as build
from keras_memory.training.runner import resume as resume
from keras_memory.training.runner import train as train
