"""Where things are: cameras, poses, maps on a sphere, and rooms to look at.

`geometry.py`, `rgbd.py` and `rooms.py` stand at the top too, such as
`keras_memory.geometry`; `fusion.py` has the steps of the egospheric map.
"""
