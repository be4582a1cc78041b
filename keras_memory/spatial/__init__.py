"""Spatial memory: cameras, poses, maps on a sphere, and synthetic rooms.

`geometry.py`, `rgbd.py` and `rooms.py` are public, for example as
`keras_memory.geometry`; `geometry.py` builds on `tensors.py` and `cameras.py`.
Egospheric Spatial Memory consists of `inputs.py` (checks of inputs), `maps.py`
(state and arguments), `fusion.py` (steps of the paper) and `loop.py` (time).
"""
