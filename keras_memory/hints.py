"""Types in the signatures of public functions, for editors and type checkers.

They check nothing at run time, and import no backend.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

# A NumPy array, or a tensor of any backend, also a symbolic one. Arguments may
# also be values that convert to these, such as lists of numbers.
Array: TypeAlias = Any

Activation: TypeAlias = str | Callable[..., Any]
Config: TypeAlias = dict[str, Any]
PathLike: TypeAlias = str | os.PathLike[str]
Shape: TypeAlias = Sequence[int | None]
