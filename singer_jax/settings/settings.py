"""Settings: frozen dataclasses whose fields say their default, unit, range and meaning.

Each room declares those that its code reads; a section is a field that holds settings. From them
come the check of a configuration, its keys (`section.key`), and docs/configuration.md.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Protocol, TypeVar

from singer_jax.errors import InputError, unknown
from singer_jax.settings import ranges
from singer_jax.settings.ranges import Allowed, Elsewhere
from singer_jax.settings.renamed import current_key

ABSENT = object()
"""The default of a key that need not be there."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value: its default, what it may be, what it means, in which unit."""

    default: Any
    allowed: Allowed
    meaning: str
    unit: str = ""


def setting(default: Any, allowed: Allowed, meaning: str, unit: str = "") -> Any:
    """A field of `Settings`."""
    metadata = {"setting": Setting(default, allowed, meaning, unit)}
    return dataclasses.field(default=default, metadata=metadata)


class Section(Protocol):
    """How the keys of a section follow from its value."""

    def leaves(self, value: Any, prefix: str) -> dict[str, Setting]:
        """As `leaves` of a value."""

    def to_dict(self, value: Any) -> dict[str, Any]:
        """As `to_dict` of a value."""

    def from_flat(self, value: Any, flat: Mapping[str, Any], prefix: str) -> Any:
        """As `from_flat`, from a value with the defaults."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a piece of code lets its user choose.

    Raises:
      InputError: a value that its field may not have.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            known, value = field.metadata.get("setting"), getattr(self, field.name)
            if known:
                object.__setattr__(self, field.name, _as_tuple(value))
                ranges.check(f"{type(self).__name__}.{field.name}", value, known.allowed)


class _Fields:
    """The keys are the fields of the settings that the section holds."""

    def leaves(self, value: Settings, prefix: str) -> dict[str, Setting]:
        return leaves(value, prefix)

    def to_dict(self, value: Settings) -> dict[str, Any]:
        return to_dict(value)

    def from_flat(self, value: Settings, flat: Mapping[str, Any], prefix: str) -> Settings:
        return from_flat(value, flat, prefix)


def section(default: Any, kind: Section | None = None) -> Any:
    """A field of `Settings` that holds settings, or what `kind` says."""
    return dataclasses.field(
        default_factory=lambda: copy.copy(default), metadata={"section": kind or _Fields()}
    )


S = TypeVar("S", bound=Settings)


def leaves(settings: Settings, prefix: str = "") -> dict[str, Setting]:
    """Every key of settings, those of their sections included; the defaults are their values."""
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(settings):
        key, value = prefix + field.name, getattr(settings, field.name)
        if "setting" in field.metadata:
            found[key] = dataclasses.replace(field.metadata["setting"], default=value)
        else:
            found |= field.metadata["section"].leaves(value, f"{key}.")
    return found


def to_dict(settings: Settings) -> dict[str, Any]:
    """The values by key, a dict for each section."""
    return {
        field.name: value
        if "setting" in field.metadata
        else field.metadata["section"].to_dict(value)
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
    }


def from_flat(settings: S, flat: Mapping[str, Any], prefix: str = "") -> S:
    """These settings with other values.

    Args:
      settings: keep their value where no other is given.
      flat: values by key; keys that are not theirs are not read.
      prefix: of their keys.

    Raises:
      InputError: a value that its field may not have.
    """
    changed = {}
    for field in dataclasses.fields(settings):
        key, value = prefix + field.name, getattr(settings, field.name)
        if "setting" in field.metadata:
            changed[field.name] = flat.get(key, value)
        else:
            section = field.metadata["section"]
            changed[field.name] = section.from_flat(value, flat, f"{key}.")
    return dataclasses.replace(settings, **changed)


def check(known: Mapping[str, Setting], flat: Mapping[str, Any]) -> None:
    """Raises `InputError` for the first key that is unknown, wrong or missing.

    Args:
      known: by key; NAME in one stands for any name.
      flat: values by key, as of `flatten`.
    """
    sections = {key.partition("NAME")[0] for key in known if "NAME." in key}
    for key, value in flat.items():
        place = key if key in known else _place(key, sections)
        if value == {} and any(other.startswith(f"{place}.") for other in known):
            continue
        if place not in known and current_key(key) != key:
            raise InputError(f"{key} is now {current_key(key)}")
        if place not in known:
            section = place.rpartition(".")[0]
            given = [k for k, one in known.items() if not isinstance(one.allowed, Elsewhere)]
            beside = [other for other in given if section and other.startswith(f"{section}.")]
            raise unknown("configuration key", key, beside or given)
        ranges.check(key, value, known[place].allowed)
    missing = [k for k, setting in known.items() if k not in flat and setting.default is not ABSENT]
    if missing:
        raise InputError(
            f"{missing[0]}: missing; start from singer_jax.config, which has all keys of a job"
        )


def _place(key: str, sections: Set[str]) -> str:
    """Returns the key with NAME in the place of a name, where a section has keys of any name."""
    for section in sections:
        if key.startswith(section):
            _, dot, rest = key.removeprefix(section).partition(".")
            return f"{section}NAME{dot}{rest}"
    return key


def below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose keys start with `prefix`, by the rest of their keys."""
    start = len(prefix)
    return {key[start:]: value for key, value in flat.items() if key.startswith(prefix)}


def flatten(nested: Any, prefix: str = "", *, empty: bool = False) -> dict[str, Any]:
    """Values of nested dicts by dotted key; lists as tuples, so that JSON changes nothing.

    Args:
      nested: the dicts.
      prefix: of their keys.
      empty: whether a dict without keys is a value, `{}`.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if hasattr(value, "items"):
            within = flatten(value, f"{prefix}{key}.", empty=empty)
            flat |= within if within or not empty else {f"{prefix}{key}": {}}
        else:
            flat[f"{prefix}{key}"] = _as_tuple(value)
    return flat


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
