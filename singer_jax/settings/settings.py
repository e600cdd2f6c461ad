"""Settings: frozen dataclasses whose fields have a default, a unit, a range and a description.

Each package declares the settings that its code reads; a section is a field that holds settings.
The check of a configuration, its keys (`section.key`) and docs/configuration.md derive from them.
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
"""The default of a key that may be missing."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value: its default, its range, its description and its unit."""

    default: Any
    allowed: Allowed
    meaning: str
    unit: str = ""


def setting(default: Any, allowed: Allowed, meaning: str, unit: str = "") -> Any:
    """Returns a field of `Settings` with a default, a range, a description and a unit."""
    metadata = {"setting": Setting(default, allowed, meaning, unit)}
    return dataclasses.field(default=default, metadata=metadata)


class Section(Protocol):
    """The interface that derives the keys of a section from its value."""

    def leaves(self, value: Any, prefix: str) -> dict[str, Setting]:
        """Returns the keys of a value, as the function `leaves`."""

    def to_dict(self, value: Any) -> dict[str, Any]:
        """Returns the values by key, as the function `to_dict`."""

    def from_flat(self, value: Any, flat: Mapping[str, Any], prefix: str) -> Any:
        """Returns the value with other values, as the function `from_flat`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of all settings, which checks every value against the range of its field.

    Raises:
      InputError: a value is outside the range of its field.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            known, value = field.metadata.get("setting"), getattr(self, field.name)
            if known:
                object.__setattr__(self, field.name, _as_tuple(value))
                ranges.check(f"{type(self).__name__}.{field.name}", value, known.allowed)


class _Fields:
    """Section whose keys are the fields of the settings that it holds."""

    def leaves(self, value: Settings, prefix: str) -> dict[str, Setting]:
        return leaves(value, prefix)

    def to_dict(self, value: Settings) -> dict[str, Any]:
        return to_dict(value)

    def from_flat(self, value: Settings, flat: Mapping[str, Any], prefix: str) -> Settings:
        return from_flat(value, flat, prefix)


def section(default: Any, kind: Section | None = None) -> Any:
    """Returns a field of `Settings` that holds settings, or a value whose keys `kind` derives."""
    return dataclasses.field(
        default_factory=lambda: copy.copy(default), metadata={"section": kind or _Fields()}
    )


S = TypeVar("S", bound=Settings)


def leaves(settings: Settings, prefix: str = "") -> dict[str, Setting]:
    """Returns every key of settings, including their sections; the defaults are the values."""
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(settings):
        key, value = prefix + field.name, getattr(settings, field.name)
        if "setting" in field.metadata:
            found[key] = dataclasses.replace(field.metadata["setting"], default=value)
        else:
            found |= field.metadata["section"].leaves(value, f"{key}.")
    return found


def to_dict(settings: Settings) -> dict[str, Any]:
    """Returns the values by key, with a nested dict for each section."""
    return {
        field.name: value
        if "setting" in field.metadata
        else field.metadata["section"].to_dict(value)
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
    }


def from_flat(settings: S, flat: Mapping[str, Any], prefix: str = "") -> S:
    """Returns settings with other values.

    Args:
      settings: values for the keys that `flat` does not have.
      flat: values by dotted key; other keys are ignored.
      prefix: prefix of the keys of these settings in `flat`.

    Raises:
      InputError: a value is outside the range of its field.
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
      known: settings by key; NAME in a key stands for any name.
      flat: values by dotted key, as returned by `flatten`.
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
    """Returns the values whose keys start with `prefix`, by the rest of their keys."""
    start = len(prefix)
    return {key[start:]: value for key, value in flat.items() if key.startswith(prefix)}


def flatten(nested: Any, prefix: str = "", *, empty: bool = False) -> dict[str, Any]:
    """Returns the values of nested dicts by dotted key, with lists converted to tuples.

    Values that were stored as JSON therefore compare equal.

    Args:
      nested: the dicts.
      prefix: prefix of the returned keys.
      empty: True if an empty dict is a value.
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
