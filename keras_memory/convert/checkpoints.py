"""Checkpoints of PyTorch, read without PyTorch's pickles."""

import pickle

import numpy as np

from keras_memory.files import check_path
from keras_memory.hints import PathLike


def read_pytorch_checkpoint(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict from a file, and executes nothing in it.

    Args:
        path: path of what `torch.save(net.state_dict(), path)` wrote, for
            which torch must be installed, or of an `.npz` of arrays.

    Returns:
        Dict of NumPy arrays.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or has anything but arrays in it.
        ImportError: torch is not installed.
    """
    path = check_path("path", path)
    with path.open("rb") as file:  # an error of its own if that cannot be
        if path.suffix == ".npz":
            try:
                return dict(np.load(file, allow_pickle=False))
            except Exception as error:
                raise ValueError(
                    "An .npz file must be an archive of arrays. "
                    f"{path}: {error}"
                ) from error
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Checkpoints of PyTorch are read by PyTorch: pip install torch. "
            "Or save the arrays to an .npz file where it is installed"
        ) from error
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "A checkpoint must have tensors only, and no objects that would "
            f"run code when they are read, as {path} has, or it is damaged"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"A checkpoint must be a state dict saved by `torch.save`. {path} "
            f"is empty, damaged or something else: {error!r}"
        ) from error
    tensors = document if isinstance(document, dict) else {"": document}
    wrong = [
        name
        for name, t in tensors.items()
        if not torch.is_tensor(t)
        or t.layout != torch.strided
        or t.device.type != "cpu"
        or t.is_quantized
        or t.is_complex()
    ]
    if wrong:
        raise ValueError(
            "A checkpoint must be a state dict: names and dense tensors of "
            f"real numbers. Received: {path}, where these are none: {wrong}"
        )
    return {name: t.detach().double().numpy() for name, t in tensors.items()}
