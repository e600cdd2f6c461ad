"""A run whose step is a sum: the loop, checkpoints, lock and signals of `distill`, without a model.

  python -m tests.loop --workdir=DIR [--config.steps=12 ...]

It understands the flags below and ignores others, so that it takes the place of `singer_jax.main`.
`HOLD_AFTER=N` in the environment lets this run, or a real one, wait after step N until it is
stopped: a test that sends a signal then does not depend on how fast the machine is.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from etils import epath
from safetensors.numpy import save_file

from singer_jax.errors import InputError, RunError, Stopped
from singer_jax.io.files import make_workdir, replacing, working_disks
from singer_jax.platform import hosts, parallel, signals
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG, MetricsWriter, StepMetrics
from singer_jax.runs.recorder import RecordedSteps, Recorder
from singer_jax.training.loop import LoopHooks, train

FLAGS = {
    "config.steps": 12,
    "config.checkpoint.every_steps": 3,
    "config.checkpoint.keep": 2,
    "config.mesh.data": 1,
    "config.mesh.fsdp": 1,
    "coordinator": "",
    "processes": 1,
    "process": 0,
    "fail_at": 0,  # an error of this process alone before that step
    "nan_at": 0,
}
WIDTH = 8


def hold_if_asked() -> None:
    """Applies `HOLD_AFTER`."""
    step, stop_after = int(os.environ.get("HOLD_AFTER", 0)), hosts.stop_after

    def holding_stop_after(now: int) -> bool:
        while now == step and not (
            signals.requested() or (hosts._group and hosts._group.announced)
        ):
            time.sleep(0.01)
        return stop_after(now)

    hosts.stop_after = holding_stop_after


def _batches(flags: dict[str, Any], mesh: jax.sharding.Mesh, start: int) -> Iterator[Any]:
    sharding = parallel.batch_sharding(mesh)
    rows = WIDTH // jax.process_count()
    for step in range(start + 1, flags["config.steps"] + 1):
        if step == flags["fail_at"]:
            raise RunError("images cannot be read")
        values = np.random.default_rng(step).standard_normal((WIDTH, 4)).astype(np.float32)
        if step == flags["nan_at"]:
            values[:] = np.nan
        first = jax.process_index() * rows
        yield parallel.put_batch({"image": values[first : first + rows]}, sharding), 0


@jax.jit
def _step(state: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[Any, Any]:
    mean = batch["image"].mean(0)
    new = {"sum": 0.9 * state["sum"] + mean, "step": state["step"] + 1}
    metrics = {"loss": jnp.sum(new["sum"]), "grad_norm": jnp.sum(mean**2)}
    return new, StepMetrics.pack({"": metrics})


def run(flags: dict[str, Any], workdir: epath.Path) -> None:
    """Runs the loop with checkpoints, lock and signals as `distill` does."""
    mesh = parallel.make_mesh(flags["config.mesh.data"], flags["config.mesh.fsdp"])
    every = parallel.replicated(mesh)
    state = {"sum": np.zeros(4, np.float32), "step": np.int32(0)}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=every), state
    )
    make_workdir(workdir)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(holding(workdir, jax.process_index() == 0))
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(workdir, flags["config.checkpoint.keep"]))
        )
        start = checkpoints.newest_whole() or 0
        if start:
            LOG.info("%s: continuing after step %d of %d", workdir, start, flags["config.steps"])
            checkpoints.set_aside()
            state = checkpoints.restore(start, like)
        else:
            put = {name: lambda _, x=x: np.asarray(x) for name, x in state.items()}
            state = {
                name: jax.make_array_from_callback(like[name].shape, every, put[name])
                for name in state
            }
        if start < flags["config.steps"]:
            state = _train(flags, workdir, mesh, held, checkpoints, start, state)
        if jax.process_index() == 0:
            with replacing(workdir / "student" / "model.safetensors") as file:
                save_file({"sum": np.asarray(state["sum"])}, file)
            with replacing(workdir / "student" / "config.json") as file:
                file.write_text(json.dumps({"steps": flags["config.steps"]}))
        parallel.of_first_process(None)
    LOG.info("%s: %d steps done, student exported", workdir, flags["config.steps"])


def _train(
    flags: dict[str, Any],
    workdir: epath.Path,
    mesh: jax.sharding.Mesh,
    held: Any,
    checkpoints: Checkpoints,
    start: int,
    state: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    def step(states: Any, teacher: Any, batch: Any, logs: Any) -> tuple[Any, Any]:
        new, metrics = _step(states[""], batch)
        return {"": new}, metrics

    def save(states: Any, now: int) -> None:
        held.check()
        checkpoints.save(states[""], now, {})

    with contextlib.ExitStack() as stack:
        writer = MetricsWriter(workdir, start)
        stack.callback(writer.close)
        recorder = Recorder(
            writer,
            RecordedSteps(
                start=start,
                steps=flags["config.steps"],
                every=1,
                batch_size=WIDTH,
                flops=1,
                devices=mesh.devices.ravel(),
            ),
        )
        stack.callback(recorder.close)
        between = LoopHooks(
            save=save,
            save_every=flags["config.checkpoint.every_steps"],
            kept_in=str(workdir),
            saved=checkpoints.wait,
            evaluate=None,
            evaluate_every=0,
            first=lambda states, metrics: None,
        )
        batches = _batches(flags, mesh, start)
        return train(step, {"": state}, None, batches, between, recorder)[""]


def main(arguments: list[str]) -> int:
    """Runs as `singer_jax.main`: exit status, one line for an error, log lines on stderr."""
    from singer_jax import main as command_line  # defines flags; a real run has its own

    # tensorboardX imports the client of gs:// if there is one; these runs write to disks.
    sys.modules.setdefault("google.cloud.storage", None)
    given = dict(argument.lstrip("-").split("=", 1) for argument in arguments)
    flags = {name: type(value)(given.get(name, value)) for name, value in FLAGS.items()}
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)
    command_line._quieten_libraries()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    folder = epath.Path(given["workdir"])
    joining = {name: flags[name] for name in ("coordinator", "processes", "process")}
    try:
        hosts.join(**joining if flags["coordinator"] else {})
        with hosts.together(), working_disks(folder):
            run(flags, folder)
    except (InputError, RunError, Stopped) as error:
        print(f"singer_jax: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    with signals.handled():
        hold_if_asked()
        sys.exit(main(sys.argv[1:]))
