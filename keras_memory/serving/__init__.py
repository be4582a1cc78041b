"""Exports models for TensorFlow Serving."""

from keras_memory.serving.export import export_for_serving as export_for_serving
