"""The job `plan`: what a distillation would take on chips that are not here."""

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
from singer_jax.settings import settings as settings_lib
from singer_jax.settings.ranges import COUNT, FROM_ZERO, POSITIVE, TEXT, OneOf, Text, optional
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.roofline import DECODED, Cost, DoesNotFit, cost
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import setup_students


@dataclasses.dataclass(frozen=True)
class PlanSettings(Settings):
    """What to plan, and for which chips."""

    job: str = setting("plan", OneOf(("plan",)), "the command")
    plan: str = setting(
        "", TEXT, "configuration of the distillation, `:protocol` behind it; a shipped one by name"
    )
    overrides: str = setting(
        "", TEXT, "settings of it, as `key=value key=value`, such as `mesh.fsdp=8`"
    )
    topology: str = setting("v5e:4x4", TEXT, "TPU and shape of the slice, such as v5p:4x4x4")
    batch_size: str = setting(
        "",
        Text(r"max|[1-9]\d{0,8}|", "a number of images or max"),
        "of all chips together; `max`: the largest that fits; empty: the distillation's",
    )
    images: int = setting(1_281_167, COUNT, "of the training split")
    classes: int = setting(1000, FROM_ZERO, "of its labels")
    price: float | None = setting(None, optional(POSITIVE), "of a chip hour, in any currency")

    @functools.cached_property
    def distillation(self) -> DistillSettings:
        """What is planned; raises `InputError` where it is wrong."""
        if not self.plan:
            raise InputError("plan: empty; give the configuration of a distillation")
        return _distillation(self.plan, self.overrides)

    @property
    def precision(self) -> str:
        """Of what is planned."""
        return self.distillation.precision


def plan(settings: PlanSettings, workdir: epath.Path) -> None:
    """Prints the plan.

    Args:
      settings: what to plan.
      workdir: not used.

    Raises:
      InputError: the settings cannot work, or the step does not fit.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and no chip that is here is taken
    devices = chips.described(settings.topology)
    jax.config.update("jax_enable_compilation_cache", False)  # it would hide the compiler's time
    found = planned(settings, devices)
    print(f"{settings.plan} {settings.overrides}".rstrip())
    print(as_text(found, settings))


def planned(settings: PlanSettings, devices: Any) -> Cost:
    """The cost of a step on some devices; raises as `plan`."""
    if settings.batch_size == "max":
        return _largest(settings, devices)
    return _cost(settings, devices, int(settings.batch_size or settings.distillation.batch_size))


def as_text(found: Cost, settings: PlanSettings) -> str:
    """The plan in words and numbers."""
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
        f"{found.images / found.count:g} images a chip",
        f"compiled in {found.compile_seconds:.0f} s ({found.compile_cpu_seconds:.0f} CPU s)",
    ]
    lines += [found.told] if found.told else []
    lines += ["", "a step, on each chip"]
    for name, amount, time in rows:
        shown = f"{1e3 * time:9.2f} ms" if time != "" else ""
        lines.append(f"  {name:<18}{amount:>22}{shown}".rstrip())
    lines += [
        "",
        "of them by part",
        *(
            f"  {part or 'other':<18}{flops / 1e12:>14.2f} TFLOP{traffic / 1e9:>9.1f} GB"
            for part, (flops, traffic) in found.parts.items()
        ),
        "",
        "predicted by these (no step was run; a real one is slower)",
        f"  {1e3 * found.step_seconds:.1f} ms a step, bound by {found.binds}",
        f"  {found.images_per_second:,.0f} images/s, MFU {found.mfu:.0%}",
        f"  {steps:,} steps: {_days(hours)}, {hours * found.count:,.1f} chip hours"
        + (
            f", {hours * found.count * settings.price:,.0f} at {settings.price:g}"
            if settings.price
            else ""
        ),
        f"  decoding: {cores:.1f} cores a chip at {DECODED} images/s a core"
        + (f"; Google Cloud has {chip.cores}" if chip.cores else ""),
    ]
    return "\n".join(lines)


def _days(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def _cost(settings: PlanSettings, devices: Any, batch_size: int) -> Cost:
    run = dataclasses.replace(settings.distillation, batch_size=batch_size)
    mesh = parallel.make_mesh(run.mesh.data, run.mesh.fsdp, devices)
    prepared = setup_students(run, settings.images, settings.classes, mesh, weights_needed=False)
    return cost(prepared, batch_size, run.students.execution)


def _largest(settings: PlanSettings, devices: Any) -> Cost:
    """The cost at the largest batch that fits, to about a tenth.

    Memory grows in proportion to the batch: two programs say where the limit must be, and it is
    tried from there downwards.
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
            raise DoesNotFit("batch_size: not even one image a chip fits")
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
        raise InputError(f"plan: {file} is of the job {config.get('job')!r}, not a distillation")
    flat = settings_lib.flatten(config, empty=True) | _changes(change)
    defaults = DistillSettings()
    settings_lib.check(settings_lib.leaves(defaults), flat)
    found = settings_lib.from_flat(defaults, flat)
    # A model that is named needs no weights to be planned; none are fetched.
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
