"""Where weights come from: local files, runs, the Hugging Face hub; opened without reading them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from singer_jax.errors import InputError
from singer_jax.io import limits
from singer_jax.io.files import as_path, cached, download, is_remote
from singer_jax.models.architecture import FIELDS
from singer_jax.models.torch_file import open_torch_file
from singer_jax.settings import ranges
from singer_jax.settings.ranges import POSITIVE, SIDE, Allowed, Each, Range, Text

WEIGHTS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"

# What is read of timm's config.json beside weights; its `model_args` are fields of `Architecture`.
HUB_CONFIG: Mapping[str, Allowed] = {
    "architecture": Text("\\S+", "the name of a model"),
    "num_classes": FIELDS["num_classes"].allowed,
    "pretrained_cfg.input_size": Each(SIDE, length=3),
    "pretrained_cfg.mean": Each(Range(), length=3),
    "pretrained_cfg.std": Each(POSITIVE, length=3),
}

_LARGEST_CONFIG = _LARGEST_HEADER = 2**24  # bytes; timm's have 1 KiB and 0.1 MiB
_LONGEST_KEY = 200  # characters of a tensor's name, far above timm's


class StoredTensor(Protocol):
    """A tensor still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Its values, or a part of them, in PyTorch's layout."""


@dataclasses.dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor still in its `.safetensors` file; `read` returns its values."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Its values, or a part; `InputError`: the file has changed, or no array has its shape."""
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.key)[part] if part else file.get_tensor(self.key)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise _not_complete(self.path, error) from error


def find_weights(weights: str) -> Path:
    """The local file behind `weights`.

    Args:
      weights: a `.safetensors`, `.pth` or `.bin` file; a folder that holds `model.safetensors` or
        is a run with `student/model.safetensors`; the URL of such a file or folder, which is
        copied into the cache; or a hub name such as
        `timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k` (without owner: `timm/`), downloaded once
        and then read from the Hugging Face cache, also without network.

    Raises:
      InputError: nothing there, or a hub name that is neither cached nor reachable.
    """
    path = as_path(weights) if is_remote(weights) else Path(weights).expanduser()
    for file in (path, path / WEIGHTS_FILE, path / "student" / WEIGHTS_FILE):
        if file.is_file():
            return _local(file)
    if path.is_dir():
        several = sorted(file.parent.name for file in path.glob(f"students/*/{WEIGHTS_FILE}"))
        hint = f"; give one of its students/{{{','.join(several)}}}" if several else ""
        raise InputError(f"{path} holds neither {WEIGHTS_FILE} nor student/{WEIGHTS_FILE}{hint}")
    if path.suffix in (".safetensors", ".pth", ".bin") or path.is_absolute() or len(path.parts) > 2:
        raise InputError(f"no weights file at {path}")
    return _download(weights if "/" in weights else f"timm/{weights}")


def _local(file: Path | epath.Path) -> Path:
    """The file on this machine, with the `config.json` beside it."""
    beside = file.parent / CONFIG_FILE
    if is_remote(file):
        if beside.is_file():
            download(beside)
        else:
            cached(beside).unlink(missing_ok=True)
    return download(file)


def _download(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # Without network it warns a dozen times; the error below says it once.
    hub_logging.set_verbosity_error()

    try:
        for name in (WEIGHTS_FILE, TORCH_FILE):
            cached = huggingface_hub.try_to_load_from_cache(repo, name)
            if isinstance(cached, str):
                return Path(cached)
        try:
            path = huggingface_hub.hf_hub_download(repo, WEIGHTS_FILE)
        except LocalEntryNotFoundError:
            raise  # no network; the next is its base class: no such file in the repository
        except EntryNotFoundError:
            path = huggingface_hub.hf_hub_download(repo, TORCH_FILE)
        with contextlib.suppress(EntryNotFoundError):
            huggingface_hub.hf_hub_download(repo, CONFIG_FILE)
        return Path(path)
    except (OSError, ValueError, ImportError, EntryNotFoundError) as error:
        # ImportError: of the package that a SOCKS proxy needs.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"weights {repo!r}: no local file, not in the cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and not downloaded ({reason}); give a "
            f".safetensors file, or fetch them where there is a network: hf download {repo}"
        ) from error


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by timm key, none of them read yet.

    Raises:
      InputError: unknown suffix, damaged file, or a pickle that would run code.
    """
    tensors = _open(path)
    for key in tensors:
        if not key.isprintable() or len(key) > _LONGEST_KEY:
            raise InputError(f"{path} names a tensor {key[:_LONGEST_KEY]!a}: no weights")
    return tensors


def _open(path: Path) -> dict[str, StoredTensor]:
    if path.suffix in (".pth", ".bin", ".pt"):
        tensors = open_torch_file(path)
        if any(key.startswith("encoder.") for key in tensors):
            return _of_unic(tensors)
        # DistributedDataParallel adds module.
        return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if path.suffix != ".safetensors":
        raise InputError(f"weights {path}: expected a .safetensors, .pth or .bin file")
    try:
        _check_header(path)
        with safe_open(path, framework="numpy") as file:
            return {
                key: SafetensorsTensor(
                    path,
                    key,
                    tuple(file.get_slice(key).get_shape()),
                    _dtype(file.get_slice(key).get_dtype()),
                )
                for key in file.keys()  # noqa: SIM118 - safe_open is not a mapping
            }
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} holds tensors of a kind that is not read: {error}") from error
    except (SafetensorError, OSError, _BadHeader) as error:
        raise _not_complete(path, error) from error


class _BadHeader(Exception):
    """A safetensors file that does not hold what it says."""


def _check_header(path: Path) -> None:
    """Raises `_BadHeader` for a header that is larger than its file, or than any should be."""
    try:
        whole = limits.file_size(path)
    except ValueError as error:
        raise _BadHeader(str(error)) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > whole:
        raise _BadHeader(f"{size} bytes of header in a file of {whole}")
    if told := limits.excess(size, _LARGEST_HEADER, "bytes of header"):
        raise _BadHeader(told)


def _not_complete(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a complete safetensors file ({error}); download or export it again"
    )


def _dtype(name: str) -> np.dtype:
    """A safetensors dtype such as F32 or BF16."""
    kind = {"F": "float", "I": "int", "U": "uint", "B": "bfloat"}[name[0]]
    return np.dtype("bool" if name == "BOOL" else f"{kind}{name.lstrip('BFIU')}")


def _of_unic(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The encoder of a UNIC checkpoint (github.com/naver/unic) under timm's keys."""
    encoder = {
        re.sub(r"^blocks\.0\.(\d+)\.", r"blocks.\1.", key.removeprefix("encoder.")): tensor
        for key, tensor in tensors.items()
        if key.startswith("encoder.")
    }
    encoder.pop("mask_token", None)
    return encoder


def read_hub_config(folder: Path) -> dict[str, Any]:
    """timm's `config.json` in `folder`; empty where there is none.

    Raises:
      InputError: it is no JSON object, or says what no model can be.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        content = limits.read_json(file, _LARGEST_CONFIG)
    except OSError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    stated = {"": content}
    for key in ("model_args", "pretrained_cfg"):
        stated[key] = content.get(key) or {} if isinstance(content, dict) else None
    for key, section in stated.items():
        if not isinstance(section, dict):
            raise InputError(f"{file}: {key or 'its content'} is not a JSON object")
    for key, allowed in HUB_CONFIG.items():
        section, _, name = key.rpartition(".")
        if name in stated[section]:
            ranges.check(f"{file}: {key}", stated[section][name], allowed)
    return content | {key: section for key, section in stated.items() if section and key}
