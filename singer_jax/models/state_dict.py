"""Which part of a checkpoint is the model: nesting, averaged weights and prefixes of keys.

Training code writes a state dict among other things (`state_dict`, `model`, `teacher`), and wraps
the model whose state it is (`module.`, `_orig_mod.`, `backbone.`, `visual.trunk.`). A part of a
checkpoint is one dict of tensors in it, and a prefix under which the keys of a known format lie.
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

# Averaged weights, which timm 1.0.31 takes before others; `teacher` too, beside a `student`.
_AVERAGED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema"),
    *("ema_model", "swa_model"),
)
_TEACHER, _STUDENT = "teacher", "student"
# Then the names under which training code saves the model, the first before the others.
_USUAL = ("state_dict", "model", "module", "model_state_dict", "model_state", "net", "network")

_DEEPEST = 6  # dicts within dicts in which tensors are looked for
_MOST_DICTS = 10_000
_LONGEST_KEY = 200  # characters of a tensor's name, far above timm's


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken of a file.

    Attributes:
      part: keys of the nested dicts, joined by dots; empty: the file is one state dict.
      prefix: what was taken off the keys.
      format: name of the format whose keys were converted; empty: timm's own keys.
      left_out: keys beside the model, and keys that are no part of a timm model.
      beside: other parts that could have been taken.
    """

    part: str = ""
    prefix: str = ""
    format: str = ""
    left_out: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"part {self.part}"] if self.part else []
        told += [f"prefix {self.prefix} taken off"] if self.prefix else []
        told += [f"keys converted from {self.format}"] if self.format else []
        told += [f"left out: {listed(self.left_out)}"] if self.left_out else []
        told += [f"not taken: {listed(self.beside)}"] if self.beside else []
        return ", ".join(told)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A part that could be the model."""

    path: tuple[str, ...]
    prefix: str
    format: Format | None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the nested dicts, then the parts of the prefix."""
        return *self.path, *filter(None, self.prefix.split("."))

    @property
    def label(self) -> str:
        return ".".join(self.names) or "(top)"


class StateDict(dict[str, StoredTensor]):
    """The tensors of a model by timm's keys, none of them read yet.

    Args:
      tensors: by key.
      taken: which part of the file they are.
      unread: names of the objects that are not read, by the key where a tensor could be.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        taken: Taken = Taken(),
        unread: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.taken = taken
        self.unread = dict(unread or {})


def choose(where: object, content: Any, wanted: str = "") -> StateDict:
    """Returns the model in a checkpoint.

    Args:
      where: the file, for messages.
      content: tensors by key, or nested dicts of them among anything else.
      wanted: names the part; empty: averaged weights before others, as timm takes them.

    Raises:
      InputError: no tensors, several parts of which none comes first, or no such part.
    """
    dicts = dict(_dicts(where, content))
    if not dicts:
        raise InputError(_without_tensors(where, content))
    found = [
        _Candidate(path, prefix, form)
        for path, tensors in dicts.items()
        for prefix, form in foreign.recognise(where, tensors)
    ]
    # Without a known format: the dict as it is, for `check_weights` to say what its keys lack.
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
    taken = Taken(".".join(best.path), best.prefix, form, tuple(left_out), beside)
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
                    raise InputError(f"{where} names a tensor {key[:100]!a}: no weights")
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
    """Returns the candidates whose names contain the wanted ones, one after the other."""
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
    """Returns the candidate that is taken before the others."""
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
            "them by weights_key"
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
    """Yields the names of the objects that were passed over, near the top."""
    values = content.values() if isinstance(content, dict) else content
    for value in values if isinstance(values, Iterable) and not isinstance(values, str) else ():
        if isinstance(value, Unknown):
            yield value.name
