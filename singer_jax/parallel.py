"""The device mesh, what is sharded over it, and how several hosts find each other.

One mesh with two axes. A batch is split over both; parameters over `fsdp` (fully sharded data
parallelism) by the rules below and replicated over `data`. One device is a 1 x 1 mesh.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from singer_jax.errors import InputError

# Which dimension of a parameter is split over `fsdp`; the first rule that matches the end of a
# parameter's path decides, also inside an optimizer state. Everything else is replicated.
SHARDING_RULES = (
    (r"(qkv|fc1|fc1_g|fc1_x|q|kv)/kernel", PartitionSpec(None, "fsdp")),
    (r"(proj|fc2)/kernel", PartitionSpec("fsdp", None)),
    (r"head/kernel", PartitionSpec(None, "fsdp")),
    (r"adapter/\d+/kernel", PartitionSpec(None, "fsdp")),
)


def start(precision: str | None = None) -> None:
    """Joins the other hosts, and keeps compiled programs between runs.

    Args:
      precision: of the run; `float32` means it: no TF32, no bfloat16 passes.
    """
    _join_hosts()
    if precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "singer_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _join_hosts() -> None:
    """Joins the other processes of a multi-host job, where the environment describes one.

    Cloud TPU pods, SLURM and MPI are detected by JAX; elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JAX_PROCESS_ID"]),
        )
    elif (
        int(environment.get("SLURM_NTASKS", 1)) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    ):
        jax.distributed.initialize()


def make_mesh(data: int | None = None, fsdp: int = 1) -> Mesh:
    """A `data` x `fsdp` mesh; `data` None takes all devices.

    Raises:
      InputError: if the devices are not a multiple of `fsdp` or too few.
    """
    devices = jax.device_count()
    if fsdp < 1 or (data is None and devices % fsdp):
        raise InputError(f"mesh.fsdp: {fsdp} does not divide the {devices} devices")
    data = devices // fsdp if data is None else data
    if data < 1 or data * fsdp > devices:
        raise InputError(f"mesh: data {data} x fsdp {fsdp} needs more than the {devices} devices")
    return jax.make_mesh(
        (data, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: data * fsdp],
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def leaf_name(path: tuple) -> str:
    """A leaf's place in a tree, such as `params/student/blocks/0/attn/qkv/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every leaf of `tree` (arrays or `jax.ShapeDtypeStruct`s) by the rules."""

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        for pattern, spec in SHARDING_RULES:
            if re.search(f"(^|/){pattern}$", name) and _divides(mesh, spec, leaf.shape):
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)


def with_shardings(mesh: Mesh, tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s that carry the sharding of the rules."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(mesh, tree),
    )


def _divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(spec) and all(
        axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True)
    )


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds, onto the devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """This process's part of a global batch (NumPy arrays), onto its devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def compiler_options() -> dict[str, str] | None:
    """Options for `jax.jit` of a function with a backward pass.

    On the CPU XLA drops optimization barriers before it fuses, and then recomputes the residual
    stream in each of its consumers; and its YNN library multiplies the narrow matrices of small
    models more slowly than Eigen (benchmarks/choices.py measures both).
    """
    if jax.default_backend() == "cpu":
        return {
            "xla_disable_hlo_passes": "cse_barrier_expander",
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        }
    return None
