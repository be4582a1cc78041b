"""Looking into models: pictures while they train, and why they answer so.

The modules stand at the top too: `keras_memory.callbacks`,
`keras_memory.explanations`.
"""
