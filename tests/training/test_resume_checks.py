"""Settings that make a run another one, when it is continued and when it is compared."""

import dataclasses
import json
from pathlib import Path

import pytest
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation.results import provenance
from singer_jax.jobs.compare import CompareSettings, compare
from singer_jax.settings.settings import to_dict
from singer_jax.training.resume_checks import check_same_run
from singer_jax.training.settings import DistillSettings

RUN = DistillSettings()
# None of them changes which images a step reads.
SAME_IMAGES = {"max_unreadable": 0.5, "fail_on_unreadable": True, "workers": 3}


def with_data(**changes: object) -> DistillSettings:
    return dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, **changes))


def test_a_run_continues_with_another_tolerance_of_unreadable_images():
    saved = {"data": "digest", "config": to_dict(RUN)}
    for key, value in SAME_IMAGES.items():
        check_same_run(with_data(**{key: value}), epath.Path("run"), saved, saved)
    with pytest.raises(InputError, match=r"data\.flip"):
        check_same_run(with_data(flip=0.1), epath.Path("run"), saved, saved)


def write_evaluated(run: Path, settings: DistillSettings) -> str:
    results = {"table1": {}, "tasks": {"digits": {"top1": 90.0 + settings.seed}}}
    results |= provenance({}, {"digits": "0a"}, 2, "0b")
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 0.5, "train/loss": 2.0}\n')
    (run / "config.json").write_text(json.dumps(to_dict(settings)))
    return str(run)


def test_seeds_share_a_row_whatever_their_tolerance_of_unreadable_images(tmp_path):
    runs = [write_evaluated(tmp_path / "first", RUN)]
    for seed, (key, value) in enumerate(SAME_IMAGES.items(), start=1):
        settings = dataclasses.replace(with_data(**{key: value}), seed=seed)
        runs.append(write_evaluated(tmp_path / key, settings))
    compare(CompareSettings(runs=tuple(runs)), epath.Path(tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["digits top1"]["runs"] for row in rows.values()] == [4]
