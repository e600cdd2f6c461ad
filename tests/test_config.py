"""Tests that every key of every job is checked, and that docs/configuration.md is current."""

import ast
import contextlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from singer_jax import config as config_lib
from singer_jax import main
from singer_jax.errors import InputError
from singer_jax.jobs import JOBS
from singer_jax.methods import METHODS, WeightedSumSettings, chosen
from singer_jax.methods.fitnet import FitNetSettings
from singer_jax.methods.singer import SingerSettings
from singer_jax.models import architecture, layers
from singer_jax.models.architecture import FIELDS, Architecture
from singer_jax.models.weight_files import HUB_CONFIG
from singer_jax.settings import ranges
from singer_jax.settings.ranges import (
    Allowed,
    Each,
    Either,
    Elsewhere,
    Flag,
    Nothing,
    OneOf,
    Range,
    Text,
    check,
)
from singer_jax.settings.reference import has_tuple, type_of
from singer_jax.settings.settings import ABSENT, flatten, from_flat, leaves, to_dict
from singer_jax.training.settings import DistillSettings, of_saved
from tests import shipped

ROOT = Path(__file__).parents[1]

# Nothing that any setting may be.
ALWAYS_WRONG = [math.nan, math.inf, -math.inf, 10**400, -(10**400), object(), {1: 2}, b"x", 1j]


def wrong_values(allowed: object) -> list[object]:
    """Returns values just outside the allowed range, and values of other types."""
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
        case Elsewhere():
            return [0, "a", None, ()]
    raise AssertionError(f"no wrong values for {allowed}")


def _admitted(kinds: tuple, value: object) -> bool:
    return any(kind.admits(value) for kind in kinds)


def right_values(allowed: object) -> list[object]:
    """Returns two different values at the ends of the allowed range."""
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
            of_form = {
                "rank": ["rank=3", "quantile=.5e-1"],
                "max": ["max", "4096"],
                "visible": ["none", "visible-random-1.5"],
            }
            return next((v for word, v in of_form.items() if word in pattern), ["a", "a/b.c"])
        case Each(item, length, least):
            ends = right_values(item)
            count = least if length is None else length
            return [tuple(ends[:1] * count), list(ends[-1:] * max(count, 1))]
        case Either(kinds):
            return [value for kind in kinds for value in right_values(kind)]
        case Nothing():
            return [None]
        case Elsewhere():
            return []
    raise AssertionError(f"no values for {allowed}")


def keys() -> dict[str, Allowed]:
    """Returns the keys of all jobs; those of the quickstart are those of its parts."""
    jobs = [leaves(config_lib.defaults(job)) for job in JOBS if job != "quickstart"]
    return {key: setting.allowed for known in jobs for key, setting in known.items()} | HUB_CONFIG


KEYS = keys()
KINDS = sorted({type(allowed).__name__ for allowed in KEYS.values()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_one_line_with_key_value_and_range(kind):
    """Every key of every job, by the kind of its range."""
    for key, allowed in KEYS.items():
        if type(allowed).__name__ != kind:
            continue
        for value in [*wrong_values(allowed), *ALWAYS_WRONG]:
            with pytest.raises(InputError) as caught:
                check(key, value, allowed)
            message = str(caught.value)
            assert key in message and len(message.splitlines()) == 1, message
            assert any(f"; {word}" in message for word in ("give ", "known: ", "closest: ")), (
                message
            )
        for value in right_values(allowed):
            check(key, value, allowed)


def config_of(job: str) -> ConfigDict:
    names = {"distill": "default", "evaluate": "evaluation", "nullspace": "null_spaces"}
    return getattr(config_lib, names.get(job, job))()


@contextlib.contextmanager
def with_value(config: ConfigDict, key: str, value: object) -> Iterator[None]:
    """Sets one key, and puts the configuration back as it was."""
    *sections, name = key.split(".")
    made = None
    for section in sections:
        if section not in config:  # a student's, which is made only for this key
            made = made or (config, section)
            config[section] = {}
        config = config[section]
    before = config.get(name, ABSENT)
    with config.ignore_type():
        config[name] = value
    yield
    if made:
        parent, section = made
        del parent[section]
    elif before is ABSENT:
        del config[name]
    else:
        with config.ignore_type():
            config[name] = before


@pytest.mark.parametrize("job", JOBS)
def test_every_key_of_every_job_is_checked_before_any_work(job, capsys, tmp_path, monkeypatch):
    """Each key gets its own wrong value, and the error comes before any work starts."""
    from singer_jax.platform import parallel

    def started(*arguments):
        raise AssertionError("work began")

    monkeypatch.setattr(parallel, "start", started)
    known = leaves(config_lib.defaults(job))
    config = config_of(job)
    whole = flatten(config, empty=True)
    assert set(flatten(config)) == {k for k, s in known.items() if s.default is not ABSENT}
    for key, setting in known.items():
        if key.endswith("job"):
            continue
        with with_value(config, key, wrong_values(setting.allowed)[0]):
            assert main.run(config, tmp_path) == 2, key
        printed = capsys.readouterr().err
        assert key in printed and len(printed.splitlines()) == 1
    assert flatten(config, empty=True) == whole  # one key at a time was wrong
    assert not list(tmp_path.iterdir())


def test_every_configuration_that_is_shipped_passes():
    for path in sorted((ROOT / "configs").glob("*.py")):
        spec = spec_from_file_location(path.stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        for variant in shipped.variants(path.stem):
            config_lib.settings_of(module.get_config(variant))


@pytest.mark.parametrize("given", [{}, {"job": None}, {"job": ["distill"]}])
def test_a_configuration_without_a_job_is_one_line(given, tmp_path, capsys):
    assert main.run(ConfigDict(given), tmp_path) == 2
    assert "unknown job" in capsys.readouterr().err


def test_keys_that_are_missing_or_unknown_are_named():
    config = config_lib.default()
    del config.method.rank
    with pytest.raises(InputError, match=r"^method\.rank: missing; start from"):
        config_lib.settings_of(config)
    config = config_lib.evaluation()
    config.probe.lerning_rates = (0.1,)
    with pytest.raises(InputError, match=r"closest: probe\.learning_rates"):
        config_lib.settings_of(config)


@pytest.mark.parametrize("job", JOBS)
def test_settings_come_back_from_their_keys(job):
    settings = config_lib.defaults(job)
    assert config_lib.settings_of(config_of(job)) == settings
    changed = {
        key: next(v for v in right_values(known.allowed) if v != known.default)
        for key, known in leaves(settings).items()
        if right_values(known.allowed)
        and not key.endswith("job")
        and ".overrides." not in key
        and ".method_weights." not in key
    }
    # The first of several methods; its settings hold only what it reads.
    changed |= {key: "singer" for key in changed if key.endswith("method.name")}
    other = from_flat(settings, changed)
    assert from_flat(settings, flatten(to_dict(other))) == other
    assert other != settings or not changed


@pytest.mark.parametrize("name", METHODS)
def test_a_key_that_a_method_does_not_read_is_left_at_its_default(name):
    """A key that the method does not read must not make a different run."""
    config = config_lib.default()
    config.method.name, config.method.rank, config.method.mask_ratio = name, 3, 0.25
    section = to_dict(config_lib.settings_of(config))["method"]
    assert section["name"] == name
    assert section["rank"] == (3 if name == "singer" else 64)
    assert section["mask_ratio"] == (0.25 if "vitkd" in name else 0.5)


def test_each_method_has_its_own_default_where_they_differ():
    config = config_lib.default()
    config.method.method_weights.singer, config.method.method_weights.fitnet = 1.0, 0.5
    (_, singer), (_, fitnet) = config_lib.settings_of(config).method.methods
    assert (singer.loss_weights.kd, fitnet.loss_weights.kd) == (1.0, 10.0)
    config.method.loss_weights.kd = 1.0
    settings = config_lib.settings_of(config)
    (_, singer), (_, fitnet) = settings.method.methods
    assert (singer.loss_weights.kd, fitnet.loss_weights.kd) == (1.0, 1.0)
    assert to_dict(settings)["method"]["loss_weights"]["kd"] == 1.0


def test_a_run_older_than_a_default_is_as_it_was():
    assert FitNetSettings().match.norm_clip_quantile == 0.9
    assert of_saved({"method": {"name": "fitnet"}}).method.match.norm_clip_quantile == 1
    assert (
        of_saved(
            {"method": {"name": "fitnet", "match": {"norm_clip_quantile": 0.8}}}
        ).method.match.norm_clip_quantile
        == 0.8
    )
    # SiNGER clips by default since 0.2.0, where its section has `loss_scale`.
    assert SingerSettings().match.norm_clip_quantile == 0.9
    for saved, clip in (
        ({"match": {"norm_clip_quantile": None}}, 1),
        ({"match": {"norm_clip_quantile": 0.8}}, 0.8),
        ({"match": {"norm_clip_quantile": None}, "loss_scale": "absolute"}, 0.9),
    ):
        method = {"name": "singer", **saved}
        assert of_saved({"method": method}).method.match.norm_clip_quantile == clip
        student = of_saved({"students": {"a": {"method": method}}}).each()["a"]
        assert student.method.match.norm_clip_quantile == clip


def test_settings_check_themselves():
    with pytest.raises(InputError, match=r"^SingerSettings\.rank: 0; give an integer"):
        SingerSettings(rank=0)
    with pytest.raises(InputError, match=r"Architecture\.act_layer .relu."):
        Architecture(act_layer="relu")
    assert SingerSettings(layers=[1, 2]).layers == (1, 2)


def test_summed_methods_share_their_keys():
    parts = ((1.0, SingerSettings(layers=(1,))), (1.0, FitNetSettings(layers=(2,))))
    settings = DistillSettings(method=WeightedSumSettings(parts))
    with pytest.raises(InputError, match=r"method\.layers: \(1,\) and \(2,\); summed"):
        to_dict(settings)
    with pytest.raises(ValueError, match="each once"):
        chosen(WeightedSumSettings(parts[:1] * 2))


def test_the_page_of_all_keys_is_current():
    """`python -m singer_jax.config > docs/configuration.md` updates the page."""
    assert (ROOT / "docs" / "configuration.md").read_text() == config_lib.documentation()


@pytest.mark.parametrize("job", [job for job in JOBS if job != "quickstart"])
def test_every_key_that_takes_a_tuple_has_a_valid_example(job):
    """docs/configuration.md shows how a tuple is written on the command line."""
    examples = config_lib.EXAMPLES | config_lib.OF_JOB.get(job, {})
    for key, known in config_lib._keys(job).items():
        name = key.rpartition(".")[2]
        if has_tuple(known.allowed) and ".overrides." not in key:
            argument, _, value = examples[name].partition("=")
            assert known.allowed.admits(ast.literal_eval(value.strip('"'))), key
            assert "NAME" in key or argument.endswith(name)


@pytest.mark.parametrize("name", config_lib.OF_OVERRIDES)
def test_every_example_of_an_override_is_valid(name):
    value = ast.literal_eval(config_lib.OF_OVERRIDES[name])
    assert FIELDS[name].allowed.admits(value[name])


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (ranges.COUNT, "int >= 1"),
        (ranges.SEED, "int in [0, 2**32)"),
        (ranges.SHARE, "float in [0, 1]"),
        (ranges.POSITIVE, "float > 0"),
        (ranges.optional(ranges.Flag()), "bool or None"),
        (ranges.OneOf(("a", "b", "c")), "`'a'`, `'b'` or `'c'`"),
        (
            ranges.Each(ranges.SHARE, 2, ascending=True),
            "tuple of float in [0, 1], 2 values, ascending",
        ),
    ],
)
def test_the_type_of_a_key_is_written_as_in_python(allowed, text):
    assert type_of(allowed) == text


def test_reading_a_configuration_starts_no_device():
    code = (
        "import singer_jax.config as c; from jax._src import xla_bridge\n"
        "[c.defaults(job) for job in c.JOBS]; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_names_that_are_said_twice_agree():
    assert set(architecture.ACTIVATIONS) == set(layers.ACTIVATIONS)
    assert set(architecture.MLPS) == set(layers.MLPS)
