"""Weights files: finds them locally, in runs or on the Hugging Face Hub, and opens them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from singer_jax.errors import InputError, excerpt, listed
from singer_jax.io import limits
from singer_jax.io.files import as_path, cached, download, is_remote
from singer_jax.models.architecture import FIELDS
from singer_jax.models.checkpoint import INDEX, read_content, shards
from singer_jax.models.state_dict import StateDict, choose
from singer_jax.models.transformers_config import as_timm_config, as_timm_input
from singer_jax.settings import ranges
from singer_jax.settings.ranges import POSITIVE, SIDE, Allowed, Each, Range, Text

WEIGHTS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
STUDENT_FOLDER = "student"  # in a work directory: the exported student
STUDENTS_FOLDER = "students"  # in a work directory of several students: a folder for each
_PREPROCESSING_FILE = "preprocessor_config.json"  # transformers' file of input statistics

# Files of a folder or a repository in order of preference: those of timm and transformers, then
# those of open_clip.
_FILES = (
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX,
    TORCH_FILE,
    TORCH_FILE + INDEX,
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Suffixes of file names, which Hub names do not have.
_SUFFIXES = (".safetensors", ".pth", ".bin", ".pt", ".tar", ".ckpt", ".npz", ".model", ".json")

# Values of timm's config.json that are used; its `model_args` are fields of `Architecture`.
HUB_CONFIG: Mapping[str, Allowed] = {
    "architecture": Text("\\S+", "the name of a model"),
    "num_classes": FIELDS["num_classes"].allowed,
    "pretrained_cfg.input_size": Each(SIDE, length=3),
    "pretrained_cfg.mean": Each(Range(), length=3),
    "pretrained_cfg.std": Each(POSITIVE, length=3),
    "pretrained_cfg.interpolation": Text("\\S+", "the name of an interpolation"),
    "pretrained_cfg.crop_pct": POSITIVE,
}

_LARGEST_CONFIG = 2**24  # bytes; timm's have 1 KiB


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    Attributes:
      path: the file, or the index of a sharded file.
      part: name of the part to load (`state_dict.choose`); empty: the preferred part.
    """

    path: Path
    part: str = ""


def find_weights(weights: str) -> Path:
    """Returns the local weights file for a user's `weights`.

    Args:
      weights: One of the following. A file of any name. A folder with `model.safetensors`,
        `pytorch_model.bin` or the index of such a file in shards, or a run with
        `student/model.safetensors`. A URL of such a file or folder, which is copied to the cache.
        A Hub name such as `timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k` (the default owner is
        `timm/`), which is downloaded once and then read from the Hugging Face cache, also offline.

    Raises:
      InputError: there is no such file, or the Hub name is neither cached nor reachable.
    """
    path = as_path(weights) if is_remote(weights) else Path(weights).expanduser()
    try:
        exported = path / STUDENT_FOLDER / WEIGHTS_FILE
        for file in (path, *(path / name for name in _FILES), exported):
            if file.is_file():
                return _local(file)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno != errno.ENAMETOOLONG:
            raise
        name = excerpt(str(path), 100)
        raise InputError(f"weights {name}: cannot be read ({error.strerror})") from error
    if path.is_dir():
        several = sorted(
            file.parent.name for file in path.glob(f"{STUDENTS_FOLDER}/*/{WEIGHTS_FILE}")
        )
        hint = f"; give one of its {STUDENTS_FOLDER}/{{{','.join(several)}}}" if several else ""
        raise InputError(
            f"{path} holds neither {WEIGHTS_FILE}, {TORCH_FILE} or their shards nor "
            f"{STUDENT_FOLDER}/{WEIGHTS_FILE}{hint}"
        )
    if path.suffix in _SUFFIXES or path.is_absolute() or len(path.parts) > 2:
        raise InputError(f"no weights file at {path}")
    return _download(weights if "/" in weights else f"timm/{weights}")


def _local(file: Path | epath.Path) -> Path:
    """Returns the local copy of a file, together with its shards and accompanying files."""
    for name in (CONFIG_FILE, _PREPROCESSING_FILE):
        beside = file.parent / name
        if is_remote(file):
            if beside.is_file():
                download(beside)
            else:
                cached(beside).unlink(missing_ok=True)
    local = download(file)
    if is_remote(file) and file.name.endswith(INDEX):
        for name in sorted(set(shards(local).values())):
            download(file.parent / name)
    return local


def _download(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # Without network the library warns a dozen times; the error below is enough.
    hub_logging.set_verbosity_error()

    def fetch(name: str) -> Path | None:
        """Returns a file of the repository, or None if the repository does not have it."""
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            raise  # no network; its base class, below, means no such file
        except EntryNotFoundError:
            return None

    try:
        for name in _FILES:
            kept = huggingface_hub.try_to_load_from_cache(repo, name)
            if isinstance(kept, str):
                for beside in (CONFIG_FILE, _PREPROCESSING_FILE):
                    # None: the cache does not say that the repository has no such file.
                    if huggingface_hub.try_to_load_from_cache(repo, beside) is None:
                        with contextlib.suppress(OSError, ValueError, EntryNotFoundError):
                            fetch(beside)
                return _with_shards(Path(kept), fetch)
        for name in _FILES:
            if path := fetch(name):
                for beside in (CONFIG_FILE, _PREPROCESSING_FILE):
                    with contextlib.suppress(EntryNotFoundError):
                        fetch(beside)
                return _with_shards(path, fetch)
        raise ValueError(f"it holds none of {listed(_FILES)}")
    except InputError:
        raise
    except (OSError, ValueError, ImportError, EntryNotFoundError) as error:
        # ImportError is raised without the package for SOCKS proxies.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"weights {repo!r}: no local file, not in the cache "
            f"{huggingface_hub.constants.HF_HUB_CACHE}, and not downloaded ({reason}); give a "
            f".safetensors file, or run on a machine with network: hf download {repo}"
        ) from error


def _with_shards(path: Path, fetch: Callable[[str], Path | None]) -> Path:
    """Returns the local file; if it is an index, its shards are fetched into the same folder."""
    if path.name.endswith(INDEX):
        for name in sorted(set(shards(path).values())):
            if not (path.parent / name).is_file():
                fetch(name)
    return path


def open_weights(weights: Path | WeightsFile) -> StateDict:
    """Returns the tensors of a file by timm's keys, which are read on demand.

    Raises:
      InputError: the file is damaged, is not readable or has no weights, or it is a pickle that
        would run code.
    """
    file = weights if isinstance(weights, WeightsFile) else WeightsFile(weights)
    return choose(file.path, read_content(file.path), file.part)


def read_hub_config(folder: Path) -> dict[str, Any]:
    """Returns timm's `config.json` of a folder, or transformers' converted to timm's.

    The result is empty if there is neither.

    Raises:
      InputError: the file is not a JSON object, or describes an impossible model.
    """
    file = folder / CONFIG_FILE
    content = _read_object(file)
    if "model_type" in content and "architecture" not in content:
        preprocessing = _read_object(folder / _PREPROCESSING_FILE)
        content = as_timm_config(file, content)
        content["pretrained_cfg"] |= as_timm_input(
            file.with_name(_PREPROCESSING_FILE), preprocessing
        )
    return _checked(file, content)


def read_input(folder: Path) -> dict[str, Any]:
    """Returns what the files beside weights state of the input, as timm's `pretrained_cfg`.

    The architecture is not read: a user may have named the model.

    Raises:
      InputError: as `read_hub_config`, of the input alone.
    """
    file = folder / CONFIG_FILE
    content = _read_object(file)
    if "pretrained_cfg" in content or "model_type" not in content:
        stated = {"pretrained_cfg": content.get("pretrained_cfg")}
        return _checked(file, stated).get("pretrained_cfg") or {}
    file = folder / _PREPROCESSING_FILE
    return as_timm_input(file, _read_object(file))


def _checked(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Returns timm's `config.json` with both its sections, without values that are null."""
    stated = {"": content}
    for key in ("model_args", "pretrained_cfg"):
        stated[key] = content.get(key) or {}
    for key, section in stated.items():
        if not isinstance(section, dict):
            raise InputError(f"{file}: {key} is not a JSON object")
    given = stated["pretrained_cfg"].items()
    stated["pretrained_cfg"] = {name: value for name, value in given if value is not None}
    for key, allowed in HUB_CONFIG.items():
        section, _, name = key.rpartition(".")
        if name in stated[section]:
            ranges.check(f"{file}: {key}", stated[section][name], allowed)
    return content | {key: section for key, section in stated.items() if section and key}


def _read_object(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file; empty if there is no such file."""
    try:
        if not file.is_file():
            return {}
        content = limits.read_json(file, _LARGEST_CONFIG)
    except OSError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: its content is not a JSON object")
    return content
