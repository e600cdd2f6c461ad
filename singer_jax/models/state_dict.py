"""Selection of the model in a checkpoint: nested dicts, averaged weights and key prefixes.

Training code stores a state dict beside other objects (`state_dict`, `model`, `teacher`) and wraps
the model (`module.`, `_orig_mod.`, `backbone.`, `visual.trunk.`). A part of a checkpoint is a dict
of tensors, together with the prefix of the keys of a known format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from singer_jax.errors import InputError, excerpt, listed
from singer_jax.models import foreign
from singer_jax.models.foreign import Format
from singer_jax.models.tensors import StoredTensor
from singer_jax.models.torch_file import Unknown

# Averaged weights, which timm 1.0.31 prefers; also `teacher` if there is a `student`.
_AVERAGED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema"),
    *("ema_model", "swa_model"),
)
_TEACHER, _STUDENT = "teacher", "student"
# Names under which training code saves the model, in order of preference.
_USUAL = ("state_dict", "model", "module", "model_state_dict", "model_state", "net", "network")

_DEEPEST = 6  # depth of nested dicts that are searched for tensors
_MOST_DICTS = 10_000
_LONGEST_KEY = 200  # characters of a tensor's name, far above timm's


@dataclasses.dataclass(frozen=True)
class LoadedPart:
    """The part of a file that is loaded.

    Attributes:
      part: keys of the nested dicts, joined by dots; empty: the file is a single state dict.
      prefix: prefix that was removed from the keys.
      format: name of the format whose keys were converted; empty: timm's own keys.
      left_out: keys outside the model, and keys that are not part of a timm model.
      beside: other parts that could be loaded.
    """

    part: str = ""
    prefix: str = ""
    format: str = ""
    left_out: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"part {self.part}"] if self.part else []
        parts += [f"prefix {self.prefix} removed"] if self.prefix else []
        parts += [f"keys converted from {self.format}"] if self.format else []
        parts += [f"left out: {listed(self.left_out)}"] if self.left_out else []
        parts += [f"not loaded: {listed(self.beside)}"] if self.beside else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A part that could be the model."""

    path: tuple[str, ...]
    prefix: str
    format: Format | None

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the keys of the nested dicts, followed by the parts of the prefix."""
        return *self.path, *filter(None, self.prefix.split("."))

    @property
    def label(self) -> str:
        return ".".join(self.names) or "(top)"


class StateDict(dict[str, StoredTensor]):
    """The tensors of a model by timm's keys, which are read on demand.

    Args:
      tensors: tensors by key.
      taken: the part of the file that contains the tensors.
      unread: names of unsupported objects, by the key where a tensor is expected.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        taken: LoadedPart = LoadedPart(),
        unread: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.taken = taken
        self.unread = dict(unread or {})


def choose(where: object, content: Any, wanted: str = "") -> StateDict:
    """Returns the model in a checkpoint.

    Args:
      where: file that is named in errors.
      content: tensors by key, or nested dicts of tensors and other objects.
      wanted: name of the part; empty: averaged weights are preferred, as in timm.

    Raises:
      InputError: there are no tensors, several parts without a preferred one, or no such part.
    """
    dicts = dict(_dicts(where, content))
    if not dicts:
        raise InputError(_without_tensors(where, content))
    found = [
        _Candidate(path, prefix, form)
        for path, tensors in dicts.items()
        for prefix, form in foreign.recognise(where, tensors)
    ]
    # Unknown format: the dict is returned unchanged, and `check_weights` reports its keys.
    found = found or [_Candidate(path, "", None) for path in dicts]
    best = _first(where, _named(where, found, wanted) if wanted else found)
    tensors, left_out = foreign.convert(where, dicts[best.path], best.prefix, best.format)
    unread = {
        key.removeprefix(best.prefix): value.name
        for key, value in _at(content, best.path).items()
        if isinstance(value, Unknown) and key.startswith(best.prefix)
    }
    form = best.format.name if best.format else ""
    beside = (*(each.label for each in found if each != best), *_lists(content))
    taken = LoadedPart(".".join(best.path), best.prefix, form, tuple(left_out), beside)
    return StateDict(tensors, taken, unread)


def _dicts(
    where: object, content: Any
) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
    """Yields every dict that holds tensors, after the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_DICTS:
        path, value = waiting.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        tensors = {key: each for key, each in value.items() if hasattr(each, "read")}
        if tensors:
            for key in (*path, *tensors):
                if not key.isprintable() or len(key) > _LONGEST_KEY:
                    raise InputError(
                        f"{where} has a tensor named {key[:100]!a}, so it is not a weights file"
                    )
            yield path, tensors
        if len(path) < _DEEPEST:
            nested = [(key, each) for key, each in value.items() if isinstance(each, dict)]
            waiting += [((*path, key), each) for key, each in nested[::-1]]


def _lists(content: Any) -> Iterator[str]:
    """Yields the labels of lists of tensors, such as averaged weights without their names."""
    for name, value in content.items():
        for path, each in ((name, value), *_nested(name, value)):
            if isinstance(each, list) and each and all(hasattr(one, "read") for one in each):
                yield f"{excerpt(path)} (a list of {len(each)} tensors without names)"


def _nested(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a dict by their labels."""
    for key, each in value.items() if isinstance(value, dict) else ():
        yield f"{name}.{key}", each


def _at(content: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    for key in path:
        content = content[key]
    return content


def _named(where: object, found: list[_Candidate], wanted: str) -> list[_Candidate]:
    """Returns the candidates whose names contain all wanted names in the same order."""
    names = tuple(wanted.strip(".").split("."))
    matching = [
        each
        for each in found
        if each.label == wanted
        or any(each.names[start : start + len(names)] == names for start in range(len(each.names)))
    ]
    if not matching:
        raise InputError(
            f"weights_key: {where} has no part {excerpt(wanted)!r}; its parts: "
            f"{listed(each.label for each in found)}"
        )
    return matching


def _first(where: object, found: list[_Candidate]) -> _Candidate:
    """Returns the preferred candidate."""
    student = any(_STUDENT in each.names for each in found)

    def rank(each: _Candidate) -> tuple[int, int]:
        averaged = [_AVERAGED.index(name) for name in each.names if name in _AVERAGED]
        if student and _TEACHER in each.names:
            averaged.append(len(_AVERAGED))
        usual = [_USUAL.index(name) for name in each.path if name in _USUAL]
        first = -1 if not each.names else min(usual, default=len(_USUAL))
        return min(averaged, default=len(_AVERAGED) + 1), first

    found = sorted(found, key=rank)
    if len(found) > 1 and rank(found[0]) == rank(found[1]):
        raise InputError(
            f"{where} holds several models: {listed(each.label for each in found)}; name one of "
            "them with weights_key"
        )
    return found[0]


def _without_tensors(where: object, content: Any) -> str:
    """Returns the message for a file without a state dict."""
    advice = "Save the state dict alone, best as .safetensors"
    if isinstance(content, Unknown):
        return (
            f"{where} is a whole object {content.name}, and opening it can run code: refused. "
            f"{advice}"
        )
    unknown = next(_unknown(content), "")
    if "meta_tensor" in unknown:
        return f"{where} holds tensors without values (torch's device meta); save the loaded model"
    if unknown.startswith("made"):
        return (
            f"{where} holds no tensors, but an object {unknown}, which can run code: refused. "
            f"{advice}"
        )
    if unknown:
        return f"{where} holds only tensors {unknown}, which is not read; save floats of 16 bits"
    kind = {dict: "a dict", list: "a list", tuple: "a tuple"}.get(type(content), "a value")
    return f"{where} holds no state dict of tensors, but {kind}. {advice}"


def _unknown(content: Any) -> Iterator[str]:
    """Yields the names of the skipped objects near the top level."""
    values = content.values() if isinstance(content, dict) else content
    for value in values if isinstance(values, Iterable) and not isinstance(values, str) else ():
        if isinstance(value, Unknown):
            yield value.name
