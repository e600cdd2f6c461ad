"""The distillation configurations that are shipped, and a text of what each one is.

  python -m tests.shipped

writes the texts anew; a change in them is a change for users.
"""

import collections
import importlib.util
import math
import os
import re
import tempfile
from pathlib import Path
from types import ModuleType

import jax
from ml_collections import ConfigDict

from benchmarks.make_inputs import write_blank_weights
from singer_jax.config import PROTOCOLS, settings_of
from singer_jax.platform import parallel
from singer_jax.settings.settings import flatten
from singer_jax.training.setup import StudentSetup, setup_students

ROOT = Path(__file__).parents[1]
TEXTS = Path(__file__).with_name("shipped")


def distillations() -> dict[str, ConfigDict]:
    """By name and protocol, such as `singer_vitl_vitt_paper`."""
    found = {}
    for file in sorted((ROOT / "configs").glob("*.py")):
        for protocol in variants(file.stem):
            config = load(file.stem).get_config(protocol)
            if config.job == "distill":
                found[f"{file.stem}_{protocol}"] = config
    return found


def variants(name: str) -> tuple[str, ...]:
    """What may stand behind the colon of a shipped configuration."""
    return ("small", "full") if name == "study" else PROTOCOLS


def load(name: str) -> ModuleType:
    """A shipped configuration file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(config: ConfigDict) -> str:
    """Every key, the distilled layers, and every group of parameters on a 4 x 2 mesh.

    Of several students not their groups: each is that of another shipped configuration.
    """
    config = config.copy_and_resolve_references()
    lines = [f"{key}: {value!r}" for key, value in sorted(flatten(config).items())]
    with tempfile.TemporaryDirectory() as folder:
        weights = write_blank_weights(Path(folder) / "t.safetensors", config.teacher.model)
        config.teacher.weights = str(weights)
        run = setup_students(settings_of(config), 1_281_167, 1000, parallel.make_mesh(4, 2))
    for name, own in run.each.items():
        lines.append(f"layers: {name} {_layers(own)}".replace("  ", " "))
    lines.append(f"steps: {run.any.steps}")
    lines += [f"teacher/{group}, frozen" for group in _groups(run.teacher)]
    if "" in run.each:  # several are those of other configurations
        decay, state = config.optimizer.weight_decay, run.each[""].state
        lines += [f"trained/{group}, weight decay {decay:g}" for group in _groups(state.params)]
        lines += [f"kept/{group}, not trained" for group in _groups(state.constants)]
    return "\n".join(lines) + "\n"


def _layers(run: StudentSetup) -> str:
    state = run.state
    method = run.method_of(state)
    pairs = zip(method.teacher_layers, method.student_layers, strict=True)
    return ", ".join(f"{own} <- {layer}" for layer, own in pairs)


def _groups(tree: object) -> list[str]:
    """Leaves whose names differ only by numbers together."""
    groups = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"\b\d+\b", "*", parallel.leaf_name(path))
        groups[name, leaf.dtype.name, leaf.sharding.spec].append(math.prod(leaf.shape))
    return [
        f"{name}: {len(sizes)} x {sizes[0]:,} {dtype} {tuple(spec) or 'replicated'}"
        for (name, dtype, spec), sizes in groups.items()
    ]


if __name__ == "__main__":
    if jax.device_count() < 8:
        raise SystemExit("set XLA_FLAGS=--xla_force_host_platform_device_count=8")
    TEXTS.mkdir(exist_ok=True)
    for name, config in distillations().items():
        (TEXTS / f"{name}.txt").write_text(describe(config))
        print(name, os.path.relpath(TEXTS))
