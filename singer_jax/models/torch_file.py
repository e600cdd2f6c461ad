"""Tensors out of a PyTorch `.pth`/`.bin` file without PyTorch and without running what it pickles.

The file is a zip archive: `data.pkl` describes the tensors, `data/N` hold their bytes. Only names
that rebuild tensors are resolved, each to a function of this module; any other name is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from singer_jax.errors import InputError

_STORAGE_DTYPES = {
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


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor still in its file; `read` returns its values."""

    path: Path
    entry: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            storage = np.frombuffer(archive.read(self.entry), self.dtype)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(storage[self.offset :], self.shape, strides)


class _Inert(dict):
    """Stands for a harmless container of settings (argparse.Namespace); keeps its state."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update(state)


def _rebuild_tensor(storage: tuple, offset: int, shape: tuple, strides: tuple, *_: Any) -> Any:
    path, entry, dtype = storage
    return TorchTensor(path, entry, np.dtype(dtype), offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: TorchTensor, *_: Any) -> TorchTensor:
    return tensor


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): _Inert,
}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path, prefix: str) -> None:
        super().__init__(file)
        self.path, self.prefix = path, prefix

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise InputError(
            f"{self.path} wants to load {module}.{name}, which can run code: refused. Save the "
            "state dict alone, best as .safetensors (safetensors.torch.save_file)"
        )

    def persistent_load(self, pid: Any) -> tuple[Path, str, Any]:
        _, dtype, key, *_ = pid
        return self.path, f"{self.prefix}/data/{key}", dtype


def open_torch_file(path: Path) -> dict[str, TorchTensor]:
    """The tensors of a `.pth`/`.bin` file by their state-dict keys, not yet read.

    Nested state dicts under `model` or `state_dict` are entered, as timm does.

    Raises:
      InputError: not a PyTorch zip file, damaged, without tensors, or one that would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(pickled) as file:
                prefix = pickled.removesuffix("/data.pkl")
                content = _TensorUnpickler(file, path, prefix).load()
    except InputError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} is not a complete PyTorch file in the zip format of torch >= 1.6 ({error}); "
            "download it again or convert it to .safetensors"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {key: value for key, value in content.items() if isinstance(value, TorchTensor)}
    if not tensors:
        raise InputError(f"{path} holds no state dict of tensors")
    return tensors
