"""The device mesh and the sharding of batches and parameters.

The mesh has two axes. A batch is split over both. Parameters are split over `fsdp` (fully sharded
data parallelism) by the rules below and replicated over `data`. One device is a 1 x 1 mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from singer_jax.errors import InputError
from singer_jax.io import files
from singer_jax.platform import backends, chips
from singer_jax.settings.ranges import COUNT, optional
from singer_jax.settings.settings import Settings, setting

# The dimension of a parameter that is split over `fsdp`. The first rule that matches the end of a
# parameter's path decides, also inside an optimizer state. Everything else is replicated.
SHARDING_RULES = (
    (r"(qkv|q_proj|k_proj|v_proj|fc1|fc1_g|fc1_x|q|kv)/kernel", PartitionSpec(None, "fsdp")),
    (r"(proj|fc2)/kernel", PartitionSpec("fsdp", None)),
    (r"head(_dist)?/kernel", PartitionSpec(None, "fsdp")),
    (r"adapter/\d+/kernel", PartitionSpec(None, "fsdp")),
)

_PART = 2**26  # bytes that a process sends to the others in one message


@dataclasses.dataclass(frozen=True)
class MeshSettings(Settings):
    """Settings of the device mesh."""

    data: int | None = setting(
        None,
        optional(COUNT),
        "Number of devices along the mesh axis `data`, over which only batches are split. "
        "None: all devices / fsdp.",
    )
    fsdp: int = setting(
        1,
        COUNT,
        "Number of devices along the mesh axis `fsdp`, over which batches and parameters are "
        "split.",
    )


def start() -> None:
    """Enables the persistent compilation cache.

    Raises:
      InputError: JAX_PLATFORMS names a backend that cannot be started on this machine.
    """
    if jax.config.jax_platforms:
        try:
            jax.devices()
        except RuntimeError as error:
            raise InputError(
                f"JAX_PLATFORMS: {jax.config.jax_platforms!r} cannot be started on this machine; "
                "unset it, or install its drivers and jax plugin"
            ) from error
    if jax.config.jax_compilation_cache_dir is None:
        cache = files.cache_folder()
        if cache is None:  # a container without a home folder: programs are compiled at each start
            return
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def computing(precision: str | None = None) -> Iterator[None]:
    """Sets the precision of matrix products that this thread traces inside the context.

    64-bit numbers are disabled, even if JAX_ENABLE_X64 is set.

    Args:
      precision: `bfloat16` computes float32 products with the backend's default precision. Other
        values compute them in full precision, without TF32 or bfloat16 passes. None means
        `float32`.
    """
    products = None if precision == "bfloat16" else "highest"
    with jax.default_matmul_precision(products), jax.enable_x64(False):
        yield


def make_mesh(
    data: int | None = None, fsdp: int = 1, described: Sequence[Any] | None = None
) -> Mesh:
    """Makes a `data` x `fsdp` mesh; `data` None takes all devices.

    Args:
      data, fsdp: Sizes of the axes.
      described: Described devices (`chips.described`); None for the devices of this machine.

    Raises:
      InputError: The number of devices is not a multiple of `fsdp`, or too small.
    """
    devices = list(jax.devices() if described is None else described)
    if fsdp < 1 or (data is None and len(devices) % fsdp):
        raise InputError(
            f"mesh.fsdp: {fsdp} does not divide the {len(devices)} devices; use a divisor of "
            f"{len(devices)}"
        )
    data = len(devices) // fsdp if data is None else data
    if data < 1 or data * fsdp > len(devices):
        raise InputError(
            f"mesh: data {data} x fsdp {fsdp} needs more than the {len(devices)} devices; reduce "
            "mesh.data or mesh.fsdp"
        )
    mesh = jax.make_mesh(
        (data, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * fsdp],
    )
    if described is not None:
        return mesh
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) < jax.process_count():
        raise InputError(
            f"mesh: data {data} x fsdp {fsdp} uses devices of only {len(processes)} of "
            f"{jax.process_count()} processes; use devices of all, or start fewer processes"
        )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples are split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def gathered(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's results, so that this process can read every row.

    With several processes, every device holds all rows; otherwise each device holds its own.
    """
    return replicated(mesh) if jax.process_count() > 1 else batch_sharding(mesh)


def leaf_name(path: tuple) -> str:
    """Returns a leaf's path in a tree, such as `params/student/blocks/0/attn/qkv/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns a sharding by the rules for every leaf (arrays or `jax.ShapeDtypeStruct`s)."""

    def choose(path: tuple, leaf: Any) -> NamedSharding:
        name = leaf_name(path)
        for pattern, spec in SHARDING_RULES:
            if len(leaf.shape) == len(spec) + 1:  # stacked over blocks
                spec = PartitionSpec(None, *spec)
            if re.search(f"(^|/){pattern}$", name) and _divides(mesh, spec, leaf.shape):
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)


def with_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct`s with the shardings of the rules."""
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
    """Puts a host array that every process holds onto the devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Returns the indices of an array's rows on this process's devices, in ascending order."""
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_rows(batch: Any, sharding: NamedSharding, rows: int) -> Any:
    """Puts this process's `local_rows` of a batch of `rows` rows (NumPy) onto its devices."""
    held = local_rows(sharding, rows)

    def put_array(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = np.searchsorted(held, start)
            return array[first : first + stop - start]

        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part, array.dtype)

    return jax.tree.map(put_array, batch)


def of_first_process(value: Any) -> Any:
    """Returns the value of process 0 (any picklable object) in every process.

    It is used if only process 0 may decide or read files, because the others may see another file
    system.
    """
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    parts = np.array(divmod(len(content), _PART), np.int32)
    whole, rest = (int(n) for n in multihost_utils.broadcast_one_to_all(parts))
    mine = np.zeros(whole * _PART + rest, np.uint8)
    if jax.process_index() == 0:
        mine[:] = content
    for start in range(0, len(mine), _PART):
        part = mine[start : start + _PART]
        part[:] = multihost_utils.broadcast_one_to_all(part)
    return pickle.loads(mine)


def of_each_process(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; all processes must call the function.

    Args:
      value: value of this process; it must be possible to pickle it.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content))).tolist()
    padded = np.pad(content, (0, max(sizes) - len(content)))
    parts = multihost_utils.process_allgather(padded)
    return [pickle.loads(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Puts this process's part of a global batch (NumPy arrays) onto its devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def platform(mesh: Mesh) -> str:
    """Returns the platform of a mesh's devices, which need not be those of this machine."""
    return mesh.devices.flat[0].platform


def gather_of_processes(mesh: Mesh) -> Callable[[np.ndarray], jax.Array] | None:
    """Returns a function that gathers a part of each process; None if there is one process.

    The function does not block. The parts are those of a batch, so that their rows can be divided
    among the devices.
    """
    if jax.process_count() == 1:
        return None
    sharding = batch_sharding(mesh)
    copy = jax.jit(lambda parts: parts, out_shardings=replicated(mesh))
    return lambda part: copy(jax.make_array_from_process_local_data(sharding, part))


@functools.cache
def device_memory(mesh: Mesh) -> int:
    """Returns the memory in bytes of the mesh's smallest device.

    GPUs and TPUs report it; that of described devices comes from the data sheet. CPU devices share
    the memory of the host.
    """
    first = mesh.devices.flat[0]
    if chips.is_described(first):
        return int(chips.chip(first.device_kind).memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    found = min(
        (device.memory_stats() or {}).get("bytes_limit", host) for device in mesh.local_devices
    )
    if jax.process_count() > 1:  # all processes must agree; in MiB, because integers have 32 bits
        found = int(multihost_utils.process_allgather(np.int32(found >> 20)).min()) << 20
    return found


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns the options of `jax.jit` for a function with a backward pass."""
    options = dict(backends.choices(platform(mesh)).compiler_options)
    if platform(mesh) == "gpu" and chips.is_described(mesh.devices.flat[0]):
        options |= chips.WITHOUT_A_GPU
    return options or None
