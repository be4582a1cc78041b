"""Types in the signatures of public functions, for editors and type checkers.

Nothing is checked by them when the program runs, and no backend is imported.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

# Of NumPy, or a tensor of any backend, also a symbolic one; as an argument also
# what these can be made of, such as a list of numbers.
Array: TypeAlias = Any

Activation: TypeAlias = str | Callable[..., Any]
Config: TypeAlias = dict[str, Any]
PathLike: TypeAlias = str | os.PathLike[str]
Shape: TypeAlias = Sequence[int | None]
