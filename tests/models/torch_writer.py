"""`torch.save` without PyTorch: complete files, and pickle fragments for hand-made files."""

import collections
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np


def write_torch_file(path: Path, content: object) -> None:
    """Writes nested dicts of arrays in the zip format of `torch.save`, without PyTorch."""
    rebuild = types.ModuleType("torch._utils")
    torch = types.ModuleType("torch")

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("only its name is pickled")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    rebuild._rebuild_tensor_v2 = _rebuild_tensor_v2
    names = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
    names |= {"float8_e4m3fn": "float8_e4m3fn"}
    for name in names.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))

    class Storage:
        def __init__(self, array):
            self.array = array

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __reduce__(self):
            shape = self.array.shape
            strides = tuple(
                s // self.array.itemsize for s in np.ascontiguousarray(self.array).strides
            )
            arguments = (Storage(self.array), 0, shape, strides, False, collections.OrderedDict())
            return _rebuild_tensor_v2, arguments

    storages = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            storages.append(value.array)
            kind = getattr(torch, names[value.array.dtype.name])
            return "storage", kind, str(len(storages) - 1), "cpu", value.array.size

    def wrap(value):
        if isinstance(value, np.ndarray):
            return Tensor(value)
        return (
            type(value)((k, wrap(v)) for k, v in value.items())
            if isinstance(value, dict)
            else value
        )

    sys.modules.update({"torch": torch, "torch._utils": rebuild})
    try:
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("archive/data.pkl", "w") as file:
                Pickler(file, protocol=2).dump(wrap(content))
            for number, array in enumerate(storages):
                archive.writestr(f"archive/data/{number}", np.ascontiguousarray(array).tobytes())
    finally:
        del sys.modules["torch"], sys.modules["torch._utils"]


def piece(value: object) -> bytes:
    """Returns the operations that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    shape: object = (2, 3),
    strides: object = (3, 1),
    offset: object = 0,
    *,
    key: object = "0",
    elements: object = 6,
    kind: bytes = b"ctorch\nFloatStorage\n",
    more: bytes = b"",
) -> bytes:
    """Returns the operations that push a tensor."""
    storage = b"(" + piece("storage") + kind + piece(key) + piece("cpu") + piece(elements)
    storage += more + b"tQ"
    rest = piece(offset) + piece(shape) + piece(strides) + b"\x89)"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def state_dict(*values: bytes) -> bytes:
    """Returns a pickle of a dict w0, w1, ... of the values that operations push."""
    items = b"".join(piece(f"w{number}") + value for number, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def write_archive(path: Path, pickled: bytes, data: bytes = bytes(range(24))) -> Path:
    """Writes a file with a hand-made pickle and one storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return path


def write_legacy_file(path: Path, content: dict[str, np.ndarray], *, elements: int = 0) -> Path:
    """Writes a state dict of float32 arrays in the format before torch 1.6.

    Args:
      path: the file.
      content: the arrays.
      elements: number that is added to the recorded number of elements of each storage.
    """
    tensors = [
        piece(key)
        + tensor(
            value.shape,
            tuple(stride // 4 for stride in np.ascontiguousarray(value).strides),
            key=str(number),
            elements=value.size,
            more=b"N",
        )
        for number, (key, value) in enumerate(content.items())
    ]
    magic = 0x1950A86A20F9469CFC6C
    head = [piece(magic), piece(1001), piece({"protocol_version": 1001, "little_endian": True})]
    head += [b"}(" + b"".join(tensors) + b"u", piece([str(n) for n in range(len(content))])]
    storages = [
        (value.size + elements).to_bytes(8, "little") + np.ascontiguousarray(value).tobytes()
        for value in content.values()
    ]
    path.write_bytes(b"".join(b"\x80\x02" + each + b"." for each in head) + b"".join(storages))
    return path
