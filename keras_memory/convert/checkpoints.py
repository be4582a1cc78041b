"""Reads checkpoints of PyTorch without executing code in them."""

import pickle

import numpy as np

from keras_memory.files import check_path
from keras_memory.hints import PathLike


def read_pytorch_checkpoint(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict from a file without executing code in it.

    Args:
        path: path of a file that `torch.save(net.state_dict(), path)` wrote,
            for which torch must be installed, or of an `.npz` of arrays.

    Returns:
        Dict of NumPy arrays.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or has anything but arrays in it.
        ImportError: torch is not installed.
    """
    path = check_path("path", path)
    with path.open("rb") as file:  # raises OSError if it cannot be opened
        if path.suffix == ".npz":
            try:
                return dict(np.load(file, allow_pickle=False))
            except Exception as error:
                raise ValueError(
                    "An .npz file must be an archive of arrays. "
                    f"Received: {path}: {error}"
                ) from error
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "Reading a checkpoint of PyTorch needs PyTorch: pip install torch. "
            "Or save the arrays to an .npz file where it is installed"
        ) from error
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "A checkpoint must have tensors only, as other objects could run "
            f"code when read. Received: {path}, with other objects or damaged"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            "A checkpoint must be a state dict saved by `torch.save`. "
            f"Received: {path}, empty, damaged or something else: {error!r}"
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
            f"real numbers. Received: {path}, with other entries: {wrong}"
        )
    return {name: t.detach().double().numpy() for name, t in tensors.items()}
