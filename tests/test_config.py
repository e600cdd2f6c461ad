"""One table says what every key may be, and no key can be forgotten."""

import math
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from singer_jax import config as config_lib
from singer_jax import main
from singer_jax.allowed import ARCHITECTURE, CONFIGURATION, HUB_CONFIG, METHODS, TASKS
from singer_jax.errors import InputError
from singer_jax.ranges import Each, Either, Flag, Nothing, OneOf, Range, Text, check

ROOT = Path(__file__).parents[1]
JOBS = sorted(main.JOBS)

# Nothing that any setting may be.
ALWAYS_WRONG = [math.nan, math.inf, -math.inf, 10**400, -(10**400), object(), {1: 2}, b"x", 1j]


def wrong_values(allowed: object) -> list[object]:
    """Values next to what is allowed, and of other types."""
    match allowed:
        case Range(low, high, low_open, high_open, whole):
            wrong: list[object] = ["x", "1", True, None, (1,), [], ""]
            if low is not None:
                wrong += [low if low_open else low - 1, -(10**30)]
            if high is not None:
                wrong += [high if high_open else high + 1, 10**30]
            return wrong + ([1.5, 1.0] if whole else [])
        case OneOf(names):
            return [names[0] + "x", names[0].upper(), "", None, 1, True, names]
        case Flag():
            return [0, 1, "True", "", None, ()]
        case Text(pattern):
            wrong = [1, None, True, ("a",), "two\nlines", "bell\a"]
            return wrong + ([] if re.fullmatch(pattern, "") else [""])
        case Each(item, length, least, ascending):
            wrong = ["abc", None, 1, True, {}]
            good = right_values(item)
            for count in {length, max(least, 1)} - {None}:
                for value in wrong_values(item):
                    row = [good[0]] * (count - 1) + [value]
                    wrong += [tuple(row), row]
            wrong += [(good[0],) * (length + 1), (good[0],) * (length - 1)] if length else []
            wrong += [(good[-1], good[0])] if ascending else []
            return wrong + ([()] if least else [])
        case Either(kinds):
            return [v for kind in kinds for v in wrong_values(kind) if not _admitted(kinds, v)]
        case Nothing():
            return [0, "", False, "None"]
    raise AssertionError(f"no wrong values for {allowed}")


def _admitted(kinds: tuple, value: object) -> bool:
    return any(kind.admits(value) for kind in kinds)


def right_values(allowed: object) -> list[object]:
    """Two different values at the ends of what is allowed."""
    match allowed:
        case Range(low, high, low_open, high_open, whole):
            low, high = -1e9 if low is None else low, 1e9 if high is None else high
            step = 1 if whole else (high - low) / 1e6
            return [low + step * low_open, high - step * high_open]
        case OneOf(names):
            return [names[0], names[-1]]
        case Flag():
            return [True, False]
        case Text(pattern):
            return ["rank=3", "quantile=.5e-1"] if "rank" in pattern else ["a", "a/b.c"]
        case Each(item, length, least):
            ends = right_values(item)
            count = least if length is None else length
            return [tuple(ends[:1] * count), list(ends[-1:] * max(count, 1))]
        case Either(kinds):
            return [value for kind in kinds for value in right_values(kind)]
        case Nothing():
            return [None]
    raise AssertionError(f"no values for {allowed}")


TABLES = CONFIGURATION | {f"overrides.{k}": v for k, v in ARCHITECTURE.items()} | HUB_CONFIG


@pytest.mark.parametrize("key", TABLES)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(key):
    for value in [*wrong_values(TABLES[key]), *ALWAYS_WRONG]:
        with pytest.raises(InputError) as caught:
            check(key, value, TABLES[key])
        message = str(caught.value)
        assert key in message and len(message.splitlines()) == 1, message
        assert "; give " in message or "; known: " in message or "; closest: " in message, message
    for value in right_values(TABLES[key]):
        check(key, value, TABLES[key])


def set_key(config, key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = value


@pytest.mark.parametrize("job", JOBS)
def test_every_key_of_every_job_is_checked_at_the_front_door(job, capsys, tmp_path, monkeypatch):
    """Before anything is imported or started; each key with a wrong value of its own."""
    from singer_jax import parallel

    def started(*arguments):
        raise AssertionError("work began")

    monkeypatch.setattr(parallel, "start", started)
    allowed = config_lib.allowed_of(job)
    assert set(config_lib.flatten(config_lib._DEFAULTS[job]())) <= set(allowed)
    for key, values in allowed.items():
        if key == "job":
            continue
        config = config_lib._DEFAULTS[job]()
        set_key(config, key, wrong_values(values)[0])
        assert main.run(config, tmp_path) == 2, key
        printed = capsys.readouterr().err
        assert key in printed and len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_configuration_that_is_shipped_passes():
    for path in sorted((ROOT / "configs").glob("*.py")):
        spec = spec_from_file_location(path.stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        for protocol in config_lib.PROTOCOLS:
            config_lib.check(module.get_config(protocol))


@pytest.mark.parametrize("given", [{}, {"job": None}, {"job": ["distill"]}])
def test_a_configuration_without_a_job_is_one_line(given, tmp_path, capsys):
    assert main.run(ConfigDict(given), tmp_path) == 2
    assert "unknown job" in capsys.readouterr().err


def test_keys_that_are_missing_or_unknown_are_named():
    config = config_lib.default()
    del config.method.rank
    with pytest.raises(InputError, match=r"^method\.rank: missing; start from"):
        config_lib.check(config)
    config = config_lib.evaluation()
    config.probe.lerning_rates = (0.1,)
    with pytest.raises(InputError, match=r"closest: probe\.learning_rates"):
        config_lib.check(config)


def test_no_entry_of_the_table_is_left_over():
    used = {k for job in JOBS for k in config_lib.flatten(config_lib._DEFAULTS[job]())}
    assert set(CONFIGURATION) == {k for k in used if k in CONFIGURATION}
    assert set(config_lib._DEFAULTS) == set(main.JOBS)


def test_the_table_knows_what_the_code_knows():
    import dataclasses

    from singer_jax import methods
    from singer_jax.evaluation import table1
    from singer_jax.models import architecture, layers

    assert set(METHODS) == set(methods.METHODS)
    assert set(TASKS) == set(table1.TASKS)
    assert set(ARCHITECTURE) == {
        field.name for field in dataclasses.fields(architecture.Architecture)
    }
    assert set(architecture.ACTIVATIONS) == set(layers.ACTIVATIONS)
    assert set(architecture.MLPS) == set(layers.MLPS)
    for name, known in (
        ("act_layer", architecture.ACTIVATIONS),
        ("mlp_layer", architecture.MLPS),
        ("global_pool", architecture.POOLS),
    ):
        assert set(ARCHITECTURE[name].names) == set(known)
    assert set(CONFIGURATION["precision"].names) == set(architecture.PRECISIONS)
