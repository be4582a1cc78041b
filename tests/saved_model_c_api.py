"""Runs a SavedModel through TensorFlow's C API, as servers in C++ or Go do.

    python saved_model_c_api.py FOLDER SIGNATURE INPUTS OUTPUTS [SIGNATURE ...]

INPUTS and OUTPUTS are .npz files with one array for each name. INPUTS may be
several files joined by commas; arrays that the signature does not take are
ignored. So a SIGNATURE can continue from the OUTPUTS of the one before.

Neither TensorFlow's Python code nor Keras is ever imported here.
"""

import ctypes
import importlib.util
import math
import pathlib
import sys
from ctypes import POINTER
from ctypes import byref
from ctypes import c_char_p
from ctypes import c_int
from ctypes import c_int64
from ctypes import c_size_t
from ctypes import c_void_p

import numpy as np

DTYPES = {  # DataType in types.proto
    1: np.dtype("float32"),
    2: np.dtype("float64"),
    3: np.dtype("int32"),
    9: np.dtype("int64"),
    10: np.dtype("bool"),
    19: np.dtype("float16"),
}


class Buffer(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t), ("free", c_void_p)]


class Output(ctypes.Structure):
    _fields_ = [("operation", c_void_p), ("index", c_int)]


FUNCTIONS = {  # name: result, arguments
    "TF_NewStatus": (c_void_p,),
    "TF_GetCode": (c_int, c_void_p),
    "TF_Message": (c_char_p, c_void_p),
    "TF_NewGraph": (c_void_p,),
    "TF_NewSessionOptions": (c_void_p,),
    "TF_LoadSessionFromSavedModel": (
        c_void_p,
        *(c_void_p, c_void_p, c_char_p, POINTER(c_char_p), c_int),
        *(c_void_p, POINTER(Buffer), c_void_p),
    ),
    "TF_GraphOperationByName": (c_void_p, c_void_p, c_char_p),
    "TF_AllocateTensor": (c_void_p, c_int, POINTER(c_int64), c_int, c_size_t),
    "TF_DeleteTensor": (None, c_void_p),
    "TF_TensorData": (c_void_p, c_void_p),
    "TF_TensorType": (c_int, c_void_p),
    "TF_NumDims": (c_int, c_void_p),
    "TF_Dim": (c_int64, c_void_p, c_int),
    "TF_SessionRun": (
        None,
        *(c_void_p, c_void_p),
        *(POINTER(Output), POINTER(c_void_p), c_int),
        *(POINTER(Output), POINTER(c_void_p), c_int),
        *(c_void_p, c_int, c_void_p, c_void_p),
    ),
}


def load_library():
    folder = pathlib.Path(importlib.util.find_spec("tensorflow").origin).parent
    ctypes.CDLL(folder / "libtensorflow_framework.so.2", ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(folder / "libtensorflow_cc.so.2")
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


# The signatures, out of a serialized MetaGraphDef.


def fields(message):
    """Yields (field number, value) of a protobuf message, undecoded."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[position : position + length]
        position += length


def entries(message, number):
    """Dict of the map field with this number."""
    pairs = [dict(fields(value)) for n, value in fields(message) if n == number]
    return {pair[1].decode(): pair[2] for pair in pairs}


def tensor_names(meta_graph, signature):
    """Two dicts, of inputs and outputs: name in the signature: in the graph."""
    signatures = entries(meta_graph, 5)  # MetaGraphDef.signature_def
    return [
        {
            name: dict(fields(info))[1].decode()  # TensorInfo.name
            for name, info in entries(signatures[signature], number).items()
        }
        for number in (1, 2)  # SignatureDef.inputs, .outputs
    ]


class Session:
    """A SavedModel, loaded and initialized.

    Args:
        folder: path of the SavedModel.
    """

    def __init__(self, folder):
        self.library = load_library()
        self.status = self.library.TF_NewStatus()
        self.graph = self.library.TF_NewGraph()
        meta_graph = Buffer()
        self.session = self.library.TF_LoadSessionFromSavedModel(
            self.library.TF_NewSessionOptions(),
            None,
            str(folder).encode(),
            (c_char_p * 1)(b"serve"),
            1,
            self.graph,
            byref(meta_graph),
            self.status,
        )
        self.check()
        self.meta_graph = ctypes.string_at(meta_graph.data, meta_graph.length)

    def check(self):
        if self.library.TF_GetCode(self.status):
            message = self.library.TF_Message(self.status)
            raise RuntimeError(message.decode())

    def run(self, signature, arrays):
        """Returns the outputs of a signature, a dict of arrays.

        Args:
            signature: str, its name.
            arrays: dict of arrays, with its inputs among them.
        """
        inputs, outputs = tensor_names(self.meta_graph, signature)
        given = [self.tensor(arrays[name]) for name in inputs]
        results = (c_void_p * len(outputs))()
        self.library.TF_SessionRun(
            self.session,
            None,
            self.places(inputs),
            (c_void_p * len(given))(*given),
            len(given),
            self.places(outputs),
            results,
            len(outputs),
            None,
            0,
            None,
            self.status,
        )
        self.check()
        values = dict(zip(outputs, map(self.array, results)))
        for tensor in [*given, *results]:
            self.library.TF_DeleteTensor(tensor)
        return values

    def places(self, names):
        places = (Output * len(names))()
        for place, name in zip(places, names.values()):
            operation, _, index = name.partition(":")
            place.operation = self.library.TF_GraphOperationByName(
                self.graph, operation.encode()
            )
            place.index = int(index)
        return places

    def tensor(self, array):
        array = np.ascontiguousarray(array)
        number = {dtype: n for n, dtype in DTYPES.items()}[array.dtype]
        shape = (c_int64 * array.ndim)(*array.shape)
        tensor = self.library.TF_AllocateTensor(
            number, shape, array.ndim, array.nbytes
        )
        data = self.library.TF_TensorData(tensor)
        ctypes.memmove(data, array.ctypes.data, array.nbytes)
        return tensor

    def array(self, tensor):
        dtype = DTYPES[self.library.TF_TensorType(tensor)]
        rank = self.library.TF_NumDims(tensor)
        shape = [self.library.TF_Dim(tensor, axis) for axis in range(rank)]
        size = math.prod(shape) * dtype.itemsize
        data = ctypes.string_at(self.library.TF_TensorData(tensor), size)
        return np.frombuffer(data, dtype).reshape(shape)


def main(folder, *arguments):
    session = Session(folder)
    for signature, inputs, outputs in zip(
        arguments[::3], arguments[1::3], arguments[2::3], strict=True
    ):
        arrays = {}
        for path in inputs.split(","):
            arrays.update(np.load(path))
        np.savez(outputs, **session.run(signature, arrays))
    imported = {"keras", "tensorflow", "keras_memory"} & set(sys.modules)
    assert not imported, imported


if __name__ == "__main__":
    main(*sys.argv[1:])
