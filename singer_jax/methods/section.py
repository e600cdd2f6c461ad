"""The section `method` of a configuration, with the settings of all methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from singer_jax.errors import InputError
from singer_jax.methods import METHODS, WeightedSumSettings, chosen
from singer_jax.settings import ranges
from singer_jax.settings.ranges import NOT_NEGATIVE, OneOf, optional
from singer_jax.settings.settings import Setting, Settings, from_flat, leaves


class MethodSection:
    """The keys `name` and `method_weights`, and the keys of every method, each once.

    Methods share the keys of the same name. If their defaults differ, the key's default is None,
    and each method uses its own default.
    """

    def leaves(self, value: Settings, prefix: str) -> dict[str, Setting]:
        """Returns every key with its value in these settings, or its default if they lack it."""
        flat = self._flat(value)
        return {
            prefix + key: dataclasses.replace(known, default=flat[key])
            for key, known in _keys().items()
        }

    def to_dict(self, value: Settings) -> dict[str, Any]:
        """Returns the settings as a nested dict with the keys of all methods.

        Raises:
          InputError: Summed methods have different values of a key that they share.
        """
        nested: dict[str, Any] = {}
        for key, single in self._flat(value).items():
            *sections, name = key.split(".")
            within = nested
            for section in sections:
                within = within.setdefault(section, {})
            within[name] = single
        return nested

    def from_flat(self, value: Settings, flat: Mapping[str, Any], prefix: str) -> Settings:
        """Returns the settings of the chosen method, or of the sum of several."""
        keys = _keys()
        given = self._flat(value) | {
            key: flat[prefix + key] for key in keys if prefix + key in flat
        }
        for key in ("name", *(f"method_weights.{name}" for name in METHODS)):
            ranges.check(f"{prefix}{key}", given[key], keys[key].allowed)
        weights = {name: float(given[f"method_weights.{name}"]) for name in METHODS}
        weights = {name: weight for name, weight in weights.items() if weight}
        weights = weights or {given["name"]: 1.0}
        parts = tuple((weight, _own(name, given)) for name, weight in weights.items())
        return parts[0][1] if weights == {given["name"]: 1.0} else WeightedSumSettings(parts)

    def _flat(self, value: Settings) -> dict[str, Any]:
        keys, parts = _keys(), chosen(value)
        flat = {key: known.default for key, known in keys.items()}
        flat["name"] = next(iter(parts))
        if isinstance(value, WeightedSumSettings):
            flat |= {f"method_weights.{name}": weight for name, (weight, _) in parts.items()}
        given = {name: leaves(own) for name, (_, own) in parts.items()}
        defaults = {name: leaves(METHODS[name].Settings()) for name in parts}
        for key in keys:
            readers = [name for name in parts if key in given[name]]
            values = {given[name][key].default for name in readers}
            if all(given[name][key] == defaults[name][key] for name in readers):
                continue
            if len(values) > 1:
                listed = " and ".join(map(repr, sorted(values, key=repr)))
                raise InputError(
                    f"method.{key}: {listed}; summed methods share this key, so give one value"
                )
            flat[key] = values.pop()
        return flat


def _own(name: str, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of one method; None selects its default unless None is allowed."""
    settings = METHODS[name].Settings()
    own = {
        key: given[key]
        for key, known in leaves(settings).items()
        if given[key] is not None or known.allowed.admits(None)
    }
    return from_flat(settings, own)


def _keys() -> dict[str, Setting]:
    """Returns every key of the section."""
    names = tuple(METHODS)
    keys = {"name": Setting("singer", OneOf(names), "Name of the distillation method.")}
    for name in names:
        meaning = f"Weight of {name} in a weighted sum of methods, which replaces `name`."
        keys[f"method_weights.{name}"] = Setting(0.0, NOT_NEGATIVE, meaning)
    read = {name: leaves(method.Settings()) for name, method in METHODS.items()}
    for key in dict.fromkeys(key for own in read.values() for key in own):
        readers = {name: own[key] for name, own in read.items() if key in own}
        first, *others = readers.values()
        if any(other.allowed != first.allowed for other in others):
            raise ValueError(f"the methods {', '.join(readers)} allow different values of {key}")
        if any(other.default != first.default for other in others):
            each = ", ".join(f"{name} {known.default:g}" for name, known in readers.items())
            meaning = f"{first.meaning} None: {each}."
            first = Setting(None, optional(first.allowed), meaning, first.unit)
        plural = "s" if len(readers) > 1 else ""
        meaning = f"{first.meaning} Method{plural}: {', '.join(readers)}."
        keys[key] = dataclasses.replace(first, meaning=meaning)
    return keys
