"""Reader of PyTorch files that neither needs PyTorch nor runs pickled code.

There are two formats. Since torch 1.6 a file is a zip archive: `data.pkl` describes the tensors,
and `data/N` hold their bytes. An older file has five pickles, followed by the bytes of all
storages. Both formats are treated as untrusted. The pickle is interpreted here with the few
operations that build data. Only functions of this module are called, no attribute is set, objects
of other types are skipped, and the extent of each tensor is checked against the bytes in the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from singer_jax.errors import InputError, excerpt
from singer_jax.io import limits
from singer_jax.models.archive import (
    FAILURES,
    LARGEST_DIRECTORY,
    check_entry,
    entry_start,
    open_archive,
    read_entry,
)

# Far above any published checkpoint (ViT-7B: 10,000 operations); an operation allocates at most
# about 100 bytes.
_MOST_OPERATIONS = 10**6
_MOST_DIMENSIONS = _MOST_ARGUMENTS = 16
_MOST_EMPTY = 2**48  # product of the other sides of a tensor with a side of 0

# The first pickle of a file before torch 1.6 is this number, in protocol 2 or above.
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Placeholder for an object of an unsupported type, which is never created.

    Attributes:
      name: description for messages.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The elements of one or several tensors.

    Attributes:
      path: the file.
      entry: entry of the archive; in the old format, the key of the storage.
      dtype: dtype of the elements.
      elements: number of elements.
      starts: positions of the first bytes by key in the old format; None: an archive.
    """

    path: Path
    entry: str
    dtype: np.dtype
    elements: int
    starts: Mapping[str, int] | None = dataclasses.field(default=None, repr=False, compare=False)

    def read(self, first: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Reads a range of elements without allocating memory for the others."""
        start, size = first * dtype.itemsize, count * dtype.itemsize
        if self.starts is not None:
            place = self.starts[self.entry]
        else:
            with zipfile.ZipFile(self.path) as archive:
                if 2 * size >= check_entry(archive, self.entry).file_size:  # verifies the checksum
                    return np.frombuffer(read_entry(archive, self.entry), dtype, count, start)
                place = entry_start(archive, self.entry)
        with self.path.open("rb") as file:
            file.seek(place + start)
            return np.frombuffer(file.read(size), dtype, count)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor in a file, which `read` loads."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values or a part of them as a contiguous array.

        Raises:
          InputError: the file is damaged, or has changed since it was opened.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[part].copy()
        try:
            last = _last_element(self.offset, self.shape, self.strides)
            numbers = self.storage.read(self.offset, last + 1 - self.offset, self.dtype)
        except FAILURES as error:
            raise _not_complete(self.storage.path, error) from error
        strides = [
            stride * self.dtype.itemsize if size > 1 else 0
            for size, stride in zip(self.shape, self.strides, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(numbers, self.shape, strides)
        return np.array(view[part], order="C")


# A tensor whose values are the negatives or conjugates of those that are stored, and the like.
_LAZY = Unknown("stored with metadata that changes its values")


def _rebuild_tensor(
    storage: _Storage | Unknown,
    offset: int,
    shape: tuple,
    strides: tuple,
    _grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
) -> TorchTensor | Unknown:
    """Stands for `torch._utils._rebuild_tensor_v2`, for a tensor that lies inside its storage."""
    if metadata:
        return _LAZY
    if isinstance(storage, Unknown):
        return storage
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_typed_tensor(
    storage: _Storage | Unknown,
    offset: int,
    shape: tuple,
    strides: tuple,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TorchTensor | Unknown:
    """Stands for `torch._utils._rebuild_tensor_v3`, whose storage has no dtype of its own."""
    if metadata:
        return _LAZY
    if isinstance(storage, Unknown) or isinstance(dtype, Unknown):
        return dtype if isinstance(dtype, Unknown) else storage
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    return _tensor(storage, dtype, offset, shape, strides)


def _tensor(
    storage: _Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple
) -> TorchTensor:
    if (
        not (type(shape) is type(strides) is tuple)
        or not (len(shape) == len(strides) <= _MOST_DIMENSIONS)
        or any(type(number) is not int or number < 0 for number in (offset, *shape, *strides))
    ):
        raise pickle.UnpicklingError(
            f"{storage.entry}: offset, shape and strides of its tensor are not integers >= "
            f"0, in at most {_MOST_DIMENSIONS} dimensions"
        )
    elements = storage.elements * storage.dtype.itemsize // dtype.itemsize
    if 0 in shape:
        inside = math.prod(side or 1 for side in shape) <= _MOST_EMPTY
    else:
        # Limit the elements too: with a stride of 0, a file with one number could fill the memory.
        inside = _last_element(offset, shape, strides) < elements
        inside = inside and math.prod(shape) <= elements
    if not inside:
        raise pickle.UnpicklingError(
            f"{storage.entry}: shape {list(shape)} with strides {list(strides)} from element "
            f"{offset} exceeds its {elements} stored elements"
        )
    return TorchTensor(storage, dtype, offset, shape, strides)


def _last_element(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _rebuild_parameter(tensor: TorchTensor | Unknown, *_: Any) -> TorchTensor | Unknown:
    """Stands for `torch._utils._rebuild_parameter` and `_rebuild_parameter_with_state`."""
    if not isinstance(tensor, (TorchTensor, Unknown)):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return tensor


def _mapping(items: Any = (), *_: Any) -> dict[Any, Any]:
    """Stands for a container; the state in the pickle is ignored.

    Args:
      items: a dict, or a list of pairs (an OrderedDict of Python 2); other values are ignored.
    """
    if type(items) is list and all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in items
    ):
        return {key: value for key, value in items if type(key) is str}
    return dict(items) if type(items) is dict else {}


def _size(items: Any = (), *_: Any) -> tuple[Any, ...]:
    """Stands for `torch.Size`."""
    return tuple(items) if type(items) in (list, tuple) else ()


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}
_DTYPES = {
    **{name: name for name in ("float64", "float32", "float16", "bool")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

# Functions for the names in a pickle; every other name is an `Unknown`.
_NAMES: dict[tuple[str, str], np.dtype | Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): _size,
    **{("collections", name): _mapping for name in ("OrderedDict", "Counter")},
    ("collections", "defaultdict"): lambda *_: {},
    ("argparse", "Namespace"): _mapping,
} | {
    (module, name): np.dtype(dtype)
    for name, dtype in (_STORAGES | _DTYPES).items()
    for module in ("torch", "torch.storage")
}

# Operations that push a constant, and operations that push their argument.
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"),
}


class _Interpreter:
    """Pickle's stack machine, limited to the operations that build data.

    Args:
      storage: function from the identifier that `torch.save` writes to a storage.
    """

    def __init__(self, storage: Callable[[Any], _Storage | Unknown]) -> None:
        self.storage = storage
        self.operations = 0
        self._start()

    def _start(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}

    def run(self, pickled: io.BytesIO) -> Any:
        """Returns the content of the next pickle."""
        self._start()
        most = limits.most(_MOST_OPERATIONS)
        for operation, argument, _ in pickletools.genops(pickled):
            self.operations += 1
            if self.operations > most:
                excess = limits.excess(self.operations, _MOST_OPERATIONS, "operations")
                raise pickle.UnpicklingError(excess)
            if operation.name != "STOP":
                self._step(operation.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _CONSTANTS:
                push(_CONSTANTS[name]())
            case _ if name in _LITERALS:
                push(argument)
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE" | "FROZENSET":
                items = tuple(self._marked())
                self.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            case "POP":
                pop()
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [pop()] if name == "APPEND" else self._marked()
                if (top := self._top(list)) is not None:
                    top.extend(items)
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if name == "SETITEM" else self._marked()
                pairs = zip(items[::2], items[1::2], strict=True)
                if (top := self._top(dict)) is not None:
                    # Other keys are skipped: hashing a deeply nested tuple overflows the C stack.
                    top.update((k, v) for k, v in pairs if type(k) is str)
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GLOBAL":
                push(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                named = pop()
                push(_named(pop(), named))
            case "REDUCE" | "NEWOBJ":
                arguments = pop()
                push(_call(pop(), arguments))
            case "NEWOBJ_EX":
                pop()
                arguments = pop()
                push(_call(pop(), arguments))
            case "BUILD":
                pop()
            case "BINPERSID":
                push(self.storage(pop()))
            case _:
                raise pickle.UnpicklingError(f"operation {name}, which torch.save does not use")

    def _marked(self) -> list[Any]:
        """Pops and returns the items above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: type) -> Any:
        """Returns the container on the stack, or None for a skipped object."""
        if isinstance(self.stack[-1], Unknown):
            return None
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"items of an object that is not a {kind.__name__}")
        return self.stack[-1]


def _named(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise pickle.UnpicklingError("a name that is not text")
    return _NAMES.get((module, name)) or Unknown(f"made by {excerpt(f'{module}.{name}')}")


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Unknown):
        return function
    if isinstance(function, np.dtype):  # of a storage's subclass, never in a state dict
        return Unknown(f"made by {function}")
    if not isinstance(function, types.FunctionType) or type(arguments) is not tuple:
        raise pickle.UnpicklingError("a call of an object that is not a function")
    if len(arguments) > _MOST_ARGUMENTS:
        raise pickle.UnpicklingError(f"a call with {len(arguments)} arguments")
    return function(*arguments)


def _described(pid: Any) -> tuple[np.dtype | Unknown, str, int]:
    """Returns dtype, key and elements of the identifier that `torch.save` writes for a storage."""
    kind, dtype, key, _, elements, *view = pid
    if kind != "storage" or not isinstance(dtype, (np.dtype, Unknown)) or type(key) is not str:
        raise pickle.UnpicklingError("a reference that is not a storage")
    if type(elements) is not int or elements < 0:
        raise pickle.UnpicklingError(
            f"storage {excerpt(key)}: the number of elements is not an integer"
        )
    if view and view[0] is not None:
        raise pickle.UnpicklingError(f"storage {excerpt(key)} is a view of another storage")
    return dtype, key, elements


def _load_archive(path: Path, archive: zipfile.ZipFile) -> Any:
    """Returns the content of the pickle in an archive."""
    names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise InputError(
            f"{path} is TorchScript, a program: refused. Load it with torch.jit.load and save its "
            "state_dict()"
        )
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise zipfile.BadZipFile(f"it has {len(pickles)} entries data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")
    order = f"{folder}/byteorder"
    if order in names and read_entry(archive, order, LARGEST_DIRECTORY) != b"little":
        raise zipfile.BadZipFile("its numbers are big-endian")

    def storage(pid: Any) -> _Storage | Unknown:
        dtype, key, elements = _described(pid)
        if isinstance(dtype, Unknown):
            return dtype
        entry = archive.getinfo(f"{folder}/data/{key}")
        if elements * dtype.itemsize > entry.file_size:
            raise pickle.UnpicklingError(
                f"{entry.filename} holds {entry.file_size} bytes, not {elements} {dtype}"
            )
        return _Storage(path, entry.filename, dtype, elements)

    pickled = read_entry(archive, pickles[0], LARGEST_DIRECTORY)
    return _Interpreter(storage).run(io.BytesIO(pickled))


def _load_legacy(path: Path) -> Any:
    """Returns the content of a file in the format from before torch 1.6.

    The magic number, the version and the platform precede the content, the list of the storages'
    keys and, for each, its number of elements and their bytes.
    """
    storages: dict[str, _Storage | Unknown] = {}
    starts: dict[str, int] = {}
    with path.open("rb") as file:
        begin = io.BytesIO(file.read(limits.most(LARGEST_DIRECTORY)))

        def storage(pid: Any) -> _Storage | Unknown:
            dtype, key, elements = _described(pid)
            if isinstance(dtype, Unknown):
                return storages.setdefault(key, dtype)
            found = _Storage(path, key, dtype, elements, starts)
            if storages.setdefault(key, found) != found:
                raise pickle.UnpicklingError(f"storage {excerpt(key)} is described in two ways")
            return found

        interpreter = _Interpreter(storage)
        for number in range(3):
            content = interpreter.run(begin)
            if number == 1 and content != _LEGACY_PROTOCOL:
                raise pickle.UnpicklingError("its format version is not supported")
            if number == 2 and isinstance(content, dict) and content.get("little_endian") is False:
                raise pickle.UnpicklingError("its numbers are big-endian")
        content = interpreter.run(begin)
        keys = interpreter.run(begin)
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise pickle.UnpicklingError("its list of storages is not a list of keys")
        starts.update(_starts(file, begin.tell(), keys, storages))
    for key, found in storages.items():
        if key not in starts and isinstance(found, _Storage):
            raise pickle.UnpicklingError(f"storage {excerpt(key)} is not in the file")
    return content


def _starts(
    file: io.BufferedReader,
    position: int,
    keys: list[str],
    storages: dict[str, _Storage | Unknown],
) -> Iterator[tuple[str, int]]:
    """Yields the position of the first byte of each storage."""
    whole = file.seek(0, io.SEEK_END)
    for key in keys:
        found = storages.get(key)
        if not isinstance(found, _Storage):
            raise pickle.UnpicklingError(f"storage {excerpt(key)} has an unsupported dtype")
        file.seek(position)
        elements = int.from_bytes(file.read(8), "little")
        size = found.elements * found.dtype.itemsize
        if elements != found.elements or position + 8 + size > whole:
            raise pickle.UnpicklingError(
                f"storage {excerpt(key)} does not have its {found.elements:,} elements"
            )
        yield key, position + 8
        position += 8 + size


def _not_complete(path: Path, error: BaseException) -> InputError:
    reason = excerpt(str(error) or type(error).__name__, 120)
    return InputError(
        f"{path} is not a complete PyTorch file ({reason}); download it again or convert it to "
        ".safetensors"
    )


def load_torch_file(path: Path, legacy: bool = False) -> Any:
    """Returns the content of a PyTorch file: dicts, lists, numbers, and tensors to read on demand.

    Args:
      path: the file.
      legacy: True if the file has the format before torch 1.6.

    Raises:
      InputError: the file is damaged, or is TorchScript.
    """
    try:
        if legacy:
            limits.file_size(path)
            return _load_legacy(path)
        with open_archive(path) as archive:
            return _load_archive(path, archive)
    except InputError:
        raise
    except FAILURES as error:
        raise _not_complete(path, error) from error
