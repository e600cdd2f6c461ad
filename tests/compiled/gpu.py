"""Compiles a run's programs for NVIDIA GPUs that are not here, and prints the texts as JSON.

A process of its own, because jax looks for a device wherever it finds its plugin for GPUs.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from singer_jax.platform import chips, kernels, parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup
from singer_jax.training.step import PARTS
from tests.compiled.test_tpu import batch_of, prepare

IMAGES = 128  # of the step on one GPU, whose kernels are counted


def prepared(topology: str, **changes: object) -> RunSetup:
    """SiNGER at ViT-L's width on described GPUs."""
    mesh = parallel.make_mesh(described=chips.described(topology))
    with tempfile.TemporaryDirectory() as folder:
        return prepare(Path(folder), mesh, **changes)


def lowered(run: RunSetup, images: int, logged: Any = None) -> jax.stages.Lowered:
    """The step of all students."""
    step = jit_step(run.students, run.any.mesh, run.states, run.teacher)
    return step.lower(run.states, run.teacher, batch_of(run, images), logged)


def counted(**changes: object) -> dict[str, float]:
    """The launches and the memory traffic of the step on one GPU."""
    published = {"method.match.norm_clip_quantile": 1.0}  # as in benchmarks.levers
    run = prepared("h200:1", batch_size=IMAGES, **published, **changes)
    with kernels.launches() as launches, parallel.computing("bfloat16"):
        text = lowered(run, IMAGES).compile(chips.WITHOUT_A_GPU).as_text()
        launched = launches()
    found = kernels.read(text, chips.CHIPS["NVIDIA H200"], PARTS)
    libraries = kernels.epilogues(found)
    return {
        "kernels": found.count,
        "gigabytes": found.traffic / 1e9,
        "graphs": launched.graphs,
        "outside of graphs": launched.others,
        "waits": found.waits,
        "epilogues": sum(count for kind, count in libraries.items() if "BIAS" in kind),
        "gelu epilogues": sum(count for kind, count in libraries.items() if "GELU" in kind),
        "fp8 products": text.count('custom_call_target="__cublas$lt$matmul$f8"'),
    }


def main() -> None:
    """The step of SiNGER at ViT-L's width, the state before it, and counts of two steps."""
    jax.config.update("jax_platforms", "cpu")
    run = prepared("h100:4")
    student = parallel.with_shardings(
        run.any.mesh, jax.eval_shape(run.any.draw_student, np.uint32(0))
    )
    with parallel.computing("bfloat16"):
        programs = {
            "step": lowered(run, 16),
            "states": run.make_states().lower(run.teacher, {"": student}),
        }
        options = chips.WITHOUT_A_GPU
        texts: dict[str, Any] = {name: p.compile(options).as_text() for name, p in programs.items()}
    texts["counts"] = {
        "exact": counted(),
        "approximate": counted(**{"teacher.approximate_gelu": True}),
        "fp8": counted(**{"teacher.approximate_gelu": True, "teacher.precision": "fp8"}),
    }
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
