"""Tensors out of a PyTorch `.pth`/`.bin` file without PyTorch and without running what it pickles.

The file is a zip archive: `data.pkl` describes the tensors, `data/N` hold their bytes. The file is
taken for hostile: its pickle is interpreted here, by the few operations that build data. Nothing is
called but three functions of this module, no attribute is set, and what a tensor may reach is
checked against the bytes that are really there.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from singer_jax.errors import InputError
from singer_jax.io import limits

# Far above any published checkpoint (ViT-7B: 0.1 MB and 10,000 operations); an operation makes at
# most some 100 bytes.
_LARGEST_PICKLE = 2**24  # bytes; also of the archive's directory
_MOST_OPERATIONS = 10**6
_MOST_DIMENSIONS = _MOST_ARGUMENTS = 16
_MOST_EMPTY = 2**48  # elements that an empty tensor would have without its sides of 0

# What zipfile, pickletools and the interpreter below raise at a damaged or hostile file.
_FAILURES = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # an encrypted entry; NotImplementedError: a zip format that Python cannot read
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor still in its file; `read` returns its values."""

    path: Path
    entry: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Its values, or a part of them, contiguous.

        Raises:
          InputError: the file is damaged, or has changed since it was opened.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[part].copy()
        try:
            with zipfile.ZipFile(self.path) as archive:
                stored = _read_entry(archive, self.entry)
            last = _last_element(self.offset, self.shape, self.strides)
            storage = np.frombuffer(stored, self.dtype, last + 1)
        except _FAILURES as error:
            raise _not_complete(self.path, error) from error
        strides = [
            stride * self.dtype.itemsize if size > 1 else 0
            for size, stride in zip(self.shape, self.strides, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides)
        return np.array(view[part], order="C")


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The numbers of one or several tensors: an entry of the archive."""

    path: Path
    entry: str
    dtype: np.dtype
    elements: int


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> TorchTensor:
    """`torch._utils._rebuild_tensor_v2`, for a tensor that lies inside its storage."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if (
        not (type(shape) is type(strides) is tuple)
        or not (len(shape) == len(strides) <= _MOST_DIMENSIONS)
        or any(type(number) is not int or number < 0 for number in (offset, *shape, *strides))
    ):
        raise pickle.UnpicklingError(
            f"{storage.entry}: offset, shape and strides of its tensor are not whole numbers from "
            f"0, in at most {_MOST_DIMENSIONS} dimensions"
        )
    if 0 in shape:
        inside = math.prod(side or 1 for side in shape) <= _MOST_EMPTY
    else:
        # The number of elements too: with a stride of 0 a file of one number fills the memory.
        inside = _last_element(offset, shape, strides) < storage.elements
        inside = inside and math.prod(shape) <= storage.elements
    if not inside:
        raise pickle.UnpicklingError(
            f"{storage.entry}: shape {list(shape)} with strides {list(strides)} from element "
            f"{offset} reaches outside its {storage.elements} stored elements"
        )
    return TorchTensor(storage.path, storage.entry, storage.dtype, offset, shape, strides)


def _last_element(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _rebuild_parameter(tensor: TorchTensor, *_: Any) -> TorchTensor:
    """`torch._utils._rebuild_parameter`."""
    if not isinstance(tensor, TorchTensor):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return tensor


def _mapping() -> dict[Any, Any]:
    """A container of settings; the state that a pickle gives it is dropped."""
    return {}


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
}

# What a name in the pickle stands for.
_NAMES: dict[tuple[str, str], np.dtype | Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _mapping,
    ("argparse", "Namespace"): _mapping,
} | {
    (module, name): np.dtype(dtype)
    for name, dtype in _STORAGES.items()
    for module in ("torch", "torch.storage")
}

# Operations that push a constant, and those that push their argument.
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
    """Pickle's machine with the operations of `torch.save`."""

    def __init__(self, path: Path, storage: Callable[[Any], _Storage]) -> None:
        self.path, self.storage = path, storage
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        most = limits.most(_MOST_OPERATIONS)
        for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
            if number > most:
                told = limits.excess(number, _MOST_OPERATIONS, "operations")
                raise pickle.UnpicklingError(told)
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
            case "TUPLE":
                items = tuple(self._marked())
                self.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [pop()] if name == "APPEND" else self._marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if name == "SETITEM" else self._marked()
                pairs = zip(items[::2], items[1::2], strict=True)
                # Other keys are left out: hashing a deeply nested tuple overflows the C stack.
                self._top(dict).update((k, v) for k, v in pairs if type(k) is str)
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GLOBAL":
                push(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                named = pop()
                push(self._named(pop(), named))
            case "REDUCE" | "NEWOBJ":
                arguments = pop()
                push(_call(pop(), arguments))
            case "BUILD":
                pop()
            case "BINPERSID":
                push(self.storage(pop()))
            case _:
                raise pickle.UnpicklingError(f"operation {name}, which torch.save does not use")

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which is taken away."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"items of something that is no {kind.__name__}")
        return self.stack[-1]

    def _named(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise pickle.UnpicklingError("a name that is no text")
        if (module, name) not in _NAMES:
            raise InputError(
                f"{self.path} wants to load {_shown(f'{module}.{name}')}, which can run code: "
                "refused. Save the state dict alone, best as .safetensors "
                "(safetensors.torch.save_file)"
            )
        return _NAMES[module, name]


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, types.FunctionType) or type(arguments) is not tuple:
        raise pickle.UnpicklingError("a call of something that is no function")
    if len(arguments) > _MOST_ARGUMENTS:
        raise pickle.UnpicklingError(f"a call with {len(arguments)} arguments")
    return function(*arguments)


def _read_entry(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> bytes:
    """An entry that is stored as `torch.save` does it: as it is, and inside the file."""
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise zipfile.BadZipFile(f"{name} is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile(f"{name} is compressed, torch.save does not compress")
    whole = Path(archive.filename).stat().st_size
    if entry.header_offset + entry.file_size > whole:
        raise zipfile.BadZipFile(f"{name} ends behind the end of the file")
    if limit is not None and (told := limits.excess(entry.file_size, limit, "bytes")):
        raise zipfile.BadZipFile(f"{name} has {told}")
    return archive.read(entry)


class _Bounded(io.FileIO):
    """A file of which no more is read at once than of a pickle or a directory of an archive."""

    def read(self, size: int = -1) -> bytes:
        if told := limits.excess(size, _LARGEST_PICKLE, "bytes"):
            raise zipfile.BadZipFile(f"its directory has {told}")
        return super().read(size)


def _load(path: Path, archive: zipfile.ZipFile) -> Any:
    """What is pickled in an archive."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise zipfile.BadZipFile("it holds two entries of one name")
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise zipfile.BadZipFile(f"it holds {len(pickles)} entries data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")
    order = f"{folder}/byteorder"
    if order in names and _read_entry(archive, order, 16) != b"little":
        raise zipfile.BadZipFile("its numbers are big-endian")

    def storage(pid: Any) -> _Storage:
        """The storage of `torch.save`'s ("storage", type, key, device, elements)."""
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("a reference that is no storage")
        entry = archive.getinfo(f"{folder}/data/{key}")
        if type(elements) is not int or not 0 <= elements * dtype.itemsize <= entry.file_size:
            raise pickle.UnpicklingError(
                f"{entry.filename} holds {entry.file_size} bytes, not {elements} {dtype}"
            )
        return _Storage(path, entry.filename, dtype, elements)

    return _Interpreter(path, storage).run(_read_entry(archive, pickles[0], _LARGEST_PICKLE))


def _not_complete(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"{path} is not a complete PyTorch file in the zip format of torch >= 1.6 "
        f"({_shown(str(error) or type(error).__name__)}); download it again or convert it to "
        ".safetensors"
    )


def _shown(text: str) -> str:
    """A stranger's text in a message: one short line."""
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.isprintable() else ascii(text)


def open_torch_file(path: Path) -> dict[str, TorchTensor]:
    """The tensors of a `.pth`/`.bin` file by their state-dict keys, not yet read.

    Nested state dicts under `model` or `state_dict` are entered, as timm does.

    Raises:
      InputError: not a PyTorch zip file, damaged, without tensors, or one that would run code.
    """
    try:
        limits.file_size(path)
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            content = _load(path, archive)
    except InputError:
        raise
    except _FAILURES as error:
        raise _not_complete(path, error) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    if isinstance(content, dict):
        tensors = {key: value for key, value in content.items() if isinstance(value, TorchTensor)}
    if not tensors:
        raise InputError(f"{path} holds no state dict of tensors")
    return tensors
