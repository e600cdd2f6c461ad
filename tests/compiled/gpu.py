"""Compiles a run's programs for NVIDIA GPUs that are not here, and prints the texts as JSON.

A process of its own, because jax looks for a device wherever it finds its plugin for GPUs.
"""

import json
import tempfile
from pathlib import Path

import jax
import numpy as np

from singer_jax.platform import chips, parallel
from singer_jax.training.program import jit_step
from tests.compiled.compiling import abstract
from tests.compiled.test_tpu import batch_of, prepare


def main() -> None:
    """The step of SiNGER at ViT-L's width, and the state before it."""
    jax.config.update("jax_platforms", "cpu")
    mesh = parallel.make_mesh(described=chips.described("h100:4"))
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Path(folder), mesh)
    step = jit_step(run.any.distillation, mesh, run.any.state, run.teacher)
    logged = abstract(jax.ShapeDtypeStruct((), bool), parallel.replicated(mesh))
    student = parallel.with_shardings(mesh, jax.eval_shape(run.any.draw_student, np.uint32(0)))
    programs = {
        "step": step.lower(run.any.state, run.teacher, batch_of(run), logged),
        "states": run.make_states().lower(run.teacher, {"": student}),
    }
    options = chips.WITHOUT_A_GPU
    print(json.dumps({name: p.compile(options).as_text() for name, p in programs.items()}))


if __name__ == "__main__":
    main()
