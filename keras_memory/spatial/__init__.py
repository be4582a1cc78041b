"""Where things are: cameras, poses, maps on a sphere, and rooms to look at.

`geometry.py`, `rgbd.py` and `rooms.py` stand at the top too, such as
`keras_memory.geometry`; `tensors.py` and `cameras.py` are below it. The
egospheric memory is made of `inputs.py`, what it is given, `maps.py`, its state
and arguments, `fusion.py`, the steps of the paper, and `loop.py`, its time.
"""
