"""Inspects models: pictures during training, and explanations of answers.

Two modules are also at the top: `keras_memory.callbacks` and
`keras_memory.explanations`.
"""
