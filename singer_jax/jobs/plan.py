"""Job `plan`: predicts memory, time and cost of a distillation on chips that are not attached."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
import shlex
from pathlib import Path
from typing import Any

import jax
from etils import epath

from singer_jax.errors import InputError
from singer_jax.io.files import config_file
from singer_jax.platform import chips, parallel
from singer_jax.runs.metrics import LOG
from singer_jax.settings import settings as settings_lib
from singer_jax.settings.ranges import COUNT, FROM_ZERO, POSITIVE, TEXT, OneOf, Text, optional
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.roofline import DECODED, Cost, DoesNotFit, cost
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import setup_students


@dataclasses.dataclass(frozen=True)
class PlanSettings(Settings):
    """Settings of the job `plan`."""

    job: str = setting("plan", OneOf(("plan",)), "Name of the command.")
    plan: str = setting(
        "",
        TEXT,
        "Configuration of the distillation to plan: a file or the name of a shipped one, "
        "optionally followed by `:protocol`.",
    )
    overrides: str = setting(
        "",
        TEXT,
        "Settings of the distillation to change, as `key=value key=value`, such as `mesh.fsdp=8` "
        "or `student.overrides.depth=3`.",
    )
    topology: str = setting(
        "v5e:4x4",
        TEXT,
        "TPU generation and slice shape, such as v5p:4x4x4, or kind and number of GPUs of one "
        "node, such as h100:8.",
    )
    batch_size: str = setting(
        "",
        Text(r"max|[1-9]\d{0,8}|", "a number of images or max"),
        "Global batch size. `max`: the largest that fits. Empty: that of the distillation.",
    )
    images: int = setting(1_281_167, COUNT, "Number of training images.")
    classes: int = setting(1000, FROM_ZERO, "Number of classes of the labels.")
    price: float | None = setting(None, optional(POSITIVE), "Price per chip hour, in any currency.")

    @functools.cached_property
    def distillation(self) -> DistillSettings:
        """Settings of the planned distillation; raises `InputError` if they are invalid."""
        if not self.plan:
            raise InputError(
                "plan: empty; give a configuration of distill, such as singer_vitl_vitt"
            )
        return _distillation(self.plan, self.overrides)

    @property
    def precision(self) -> str:
        """Precision of the planned distillation."""
        return self.distillation.precision


def plan(settings: PlanSettings, workdir: epath.Path) -> None:
    """Prints the plan.

    Args:
      settings: settings of the job.
      workdir: unused.

    Raises:
      InputError: the settings are inconsistent, or the step does not fit into memory.
    """
    jax.config.update("jax_platforms", "cpu")  # only compiles; attached chips stay free
    devices = chips.described(settings.topology)
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no compile time
    found = planned(settings, devices)
    print(f"{settings.plan} {settings.overrides}".rstrip())
    print(as_text(found, settings))


def planned(settings: PlanSettings, devices: Any) -> Cost:
    """Returns the cost of a step on some devices; raises as `plan`."""
    if settings.batch_size == "max":
        return _largest(settings, devices)
    return _cost(settings, devices, int(settings.batch_size or settings.distillation.batch_size))


def as_text(found: Cost, settings: PlanSettings) -> str:
    """Returns the plan as text."""
    chip, seconds = found.chip, found.seconds
    run = settings.distillation
    steps = run.steps or run.epochs * math.ceil(settings.images / found.images)
    hours = steps * found.step_seconds / 3600
    cores = found.images_per_second / found.count / DECODED
    gib = 2**30
    rows = [
        ("memory", f"{found.peak / gib:.2f} of {chip.memory / gib:.0f} GiB", ""),
        ("  arguments", f"{found.arguments / gib:.2f} GiB", ""),
        ("  temporaries", f"{found.temporaries / gib:.2f} GiB", ""),
        ("operations", f"{found.flops / 1e12:.2f} TFLOP", seconds["operations"]),
        ("memory traffic", f"{found.traffic / 1e9:.1f} GB", seconds["memory traffic"]),
        ("collectives", "" if found.collectives else "none", seconds["collectives"]),
    ]
    rows += [
        (f"  {kind}", f"{count:.0f} x, {size / 1e6:.1f} MB", "")
        for kind, (count, size) in found.collectives.items()
    ]
    lines = [
        f"{settings.topology}: {found.count} x {found.kind}; batch {found.images}, "
        f"{found.images / found.count:g} images per chip",
        f"compiled in {found.compile_seconds:.0f} s ({found.compile_cpu_seconds:.0f} CPU s)",
    ]
    lines += [found.description] if found.description else []
    lines += ["", "per step and chip"]
    for name, amount, time in rows:
        shown = f"{1e3 * time:9.2f} ms" if time != "" else ""
        lines.append(f"  {name:<18}{amount:>22}{shown}".rstrip())
    lines += [
        "",
        "by part of the model",
        *(
            f"  {part or 'other':<18}{flops / 1e12:>14.2f} TFLOP{traffic / 1e9:>9.1f} GB"
            for part, (flops, traffic) in found.parts.items()
        ),
        *_of_gpu(found),
        "",
        "lower bound predicted from these numbers (no step was run)",
        f"  {1e3 * found.step_seconds:.1f} ms per step, bound by {found.binds}",
        f"  {found.images_per_second:,.0f} images/s, MFU {found.mfu:.0%}",
        f"  {steps:,} steps: {_days(hours)}, {hours * found.count:,.1f} chip hours"
        + (
            f", {hours * found.count * settings.price:,.0f} at {settings.price:g}"
            if settings.price
            else ""
        ),
        f"  decoding: {cores:.1f} cores per chip at {DECODED} images/s per core"
        + (f"; Google Cloud has {chip.cores}" if chip.cores else ""),
    ]
    return "\n".join(lines)


def _of_gpu(found: Cost) -> list[str]:
    """Returns lines about the kernels of a GPU's program; none for other chips."""
    kernels, launches = found.kernels, found.launches
    if kernels is None:
        return []
    device, host = 1e3 * kernels.device_seconds, 1e3 * kernels.host_seconds
    return [
        "",
        "kernels of the compiled program",
        f"  {kernels.count:,} kernels, {launches.graphs} CUDA graphs, {launches.others} launches "
        f"outside of graphs, {kernels.waits} waits of the host",
        f"  modelled time {device + host:.1f} ms: kernels {device:.1f} ms, host {host:.1f} ms for "
        f"{kernels.arrays:,} arrays",
        "  (a model, fitted to one measurement of an H200; collectives count as memory traffic)",
    ]


def _days(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def _cost(settings: PlanSettings, devices: Any, batch_size: int) -> Cost:
    run = dataclasses.replace(settings.distillation, batch_size=batch_size)
    mesh = parallel.make_mesh(run.mesh.data, run.mesh.fsdp, devices)
    prepared = setup_students(run, settings.images, settings.classes, mesh, weights_needed=False)
    LOG.info("compiling for %s, batch %d (takes minutes)", settings.topology, batch_size)
    return cost(prepared, batch_size, run.students.execution)


def _largest(settings: PlanSettings, devices: Any) -> Cost:
    """Returns the cost at the largest batch that fits, to within about a tenth.

    Memory grows linearly with the batch. Two programs predict the limit, and smaller batches are
    tried from there.
    """
    unit = len(devices) * settings.distillation.grad_accum_steps

    def at(count: int) -> Cost | None:
        try:
            return _cost(settings, devices, count * unit)
        except DoesNotFit:
            return None

    small, large = at(16), at(32)
    if large is None:
        found = small or next(filter(None, map(at, (8, 4, 2, 1))), None)
        if found is None:
            raise DoesNotFit("batch_size: one image per chip does not fit; raise mesh.fsdp")
        return found
    grows = (large.peak - small.peak) / 16
    count = 16 + int((large.chip.memory - small.peak) / grows)
    while count >= 40:
        count -= count % 8
        if found := at(count):
            return found
        count = count * 9 // 10
    return large


def _distillation(file: str, change: str) -> DistillSettings:
    path, _, protocol = config_file(file).partition(":")
    spec = importlib.util.spec_from_file_location("planned", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*filter(None, [protocol]))
    if config.get("job") != "distill":
        raise InputError(f"plan: {file} has job {config.get('job')!r}; give one of job distill")
    flat = settings_lib.flatten(config, empty=True) | _changes(change)
    defaults = DistillSettings()
    settings_lib.check(settings_lib.leaves(defaults), flat)
    found = settings_lib.from_flat(defaults, flat)
    # A model with a name can be planned without its weights, so that none are downloaded.
    unread = {
        role: dataclasses.replace(model, weights="")
        for role in ("teacher", "student")
        if (model := getattr(found, role)).model and not Path(model.weights).exists()
    }
    return dataclasses.replace(found, **unread)


def _changes(change: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in shlex.split(change):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"overrides: {item!r}; write key=value")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found
