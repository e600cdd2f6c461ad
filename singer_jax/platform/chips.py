"""Peak rates of accelerators, and descriptions of chips for compilation without the device."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from typing import Any
from unittest import mock

from singer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, according to its vendor's data sheet.

    Attributes:
      bf16, int8: Dense operations per second.
      memory: Memory in bytes.
      bandwidth: Memory bandwidth in bytes per second.
      network: Bandwidth to other chips in one direction, of all links together, in bytes per
        second.
      cores: CPU cores of the host per chip in Google Cloud; 0 if they vary.
      fp8: True if a quantised teacher's fp8 products run as fast as int8; otherwise, also on a TPU,
        they run at the bf16 rate.
      fp32: Dense float32 operations per second, without TF32; 0 for a TPU, which computes a float32
        product from six bfloat16 products.
    """

    bf16: float
    int8: float
    memory: float
    bandwidth: float
    network: float
    cores: int = 0
    fp8: bool = False
    fp32: float = 0

    @property
    def float32(self) -> float:
        """Dense operations per second of float32 products."""
        return self.fp32 or self.bf16 / 6


# Keys are prefixes of `device_kind`.
CHIPS = {
    "NVIDIA H200": Chip(989e12, 1979e12, 141e9, 4.8e12, 450e9, fp8=True, fp32=67e12),
    "NVIDIA H100": Chip(989e12, 1979e12, 80e9, 3.35e12, 450e9, fp8=True, fp32=67e12),
    "NVIDIA A100": Chip(312e12, 624e12, 80e9, 2.0e12, 300e9, fp32=19.5e12),
    "NVIDIA L4": Chip(121e12, 242e12, 24e9, 0.3e12, 32e9, fp8=True, fp32=30.3e12),
    "TPU v4": Chip(275e12, 275e12, 32 * 2**30, 1.2e12, 150e9, 60),
    "TPU v5 lite": Chip(197e12, 394e12, 16 * 2**30, 0.82e12, 100e9, 28),
    "TPU v5e": Chip(197e12, 394e12, 16 * 2**30, 0.82e12, 100e9, 28),
    "TPU v5": Chip(459e12, 918e12, 95 * 2**30, 2.765e12, 300e9, 52),
    "TPU v6 lite": Chip(918e12, 1836e12, 32 * 2**30, 1.64e12, 200e9, 45),
    "TPU v6e": Chip(918e12, 1836e12, 32 * 2**30, 1.64e12, 200e9, 45),
    "TPU7x": Chip(2307e12, 4614e12, 192 * 2**30, 7.37e12, 600e9),
}


def chip(kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`; None if it is not listed."""
    known = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(known, key=len)] if known else None


def is_described(device: Any) -> bool:
    """Returns True for a described device: programs can be compiled for it, but not run."""
    return "CompileOnly" in type(device.client).__name__


# Prevents waiting for a metadata server, and lets several processes load the library.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


_EXAMPLES = "give kind and shape, such as v5e:4x4, v5p:2x2x1 or h100:8"

# Properties that the compiler needs in addition to the data sheet, by name in a topology: device
# name, compute capability, number of multiprocessors, and shared memory of each in bytes.
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 167936),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 233472),
    "h200": ("NVIDIA H200", 9, 132, 233472),
}

WITHOUT_A_GPU = {"xla_gpu_autotune_level": 0}
"""Compiler options for a GPU without the device, on which alone the compiler can autotune."""

# Version of the driver and of CUDA. Without these the compiler puts neither cuBLASLt nor cuDNN into
# CUDA graphs, and the program differs from that of a device.
_CUDA = (13, 0, 0)
_CUDNN = "9.8.0"  # where the installed version is unknown: the oldest of the extra `plan-gpu`


def described(topology: str) -> list[Any]:
    """Returns described devices of a TPU slice or a GPU node, for which jax can compile.

    Args:
      topology: Kind and shape of a TPU slice, such as `v5e:4x4` or `v5p:2x2x1`, or kind and number
        of GPUs, such as `h100:8`.

    Raises:
      InputError: The topology is unknown, or its compiler is not installed.
    """
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind in _GPUS:
        platform, package = "cuda", "jax_cuda13_plugin"
        install = "'jax[cuda13-local]' 'nvidia-cudnn-cu13>=9.8'"
        options = {"topology_name": "", "target_config": _target(kind)}
        options["topology"] = f"1x1x{shape}"
    else:
        platform, package, install = "tpu", "libtpu", "libtpu"
        options = {"topology_name": topology}
        if kind == "v4":  # both cores of a chip are one device, as on Google Cloud
            options["chip_config_name"] = "megacore"
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"topology: the compiler for {topology!r} is not installed; pip install {install}"
        )
    try:
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            found = topologies.get_topology_desc(platform=platform, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"topology: {topology!r}: {reason}; {_EXAMPLES}") from error
    return list(found.devices)


def _target(kind: str) -> str:
    """Returns a `GpuTargetConfigProto`, with which XLA compiles without the device."""
    name, capability, cores, shared = _GPUS[kind]
    sheet = chip(name)
    cuda = ".".join(map(str, _CUDA))
    try:
        cudnn = ".".join(importlib.metadata.version("nvidia-cudnn-cu13").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        cudnn = _CUDNN
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} }}
          core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.5 threads_per_warp: 32
          threads_per_block_limit: 1024 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {shared - 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {sheet.bandwidth:.0f} device_memory_size: {sheet.memory:.0f}
          l2_cache_size: 52428800
          driver_version: "{cuda}" runtime_version: "{cuda}" compile_time_toolkit_version: "{cuda}"
          dnn_version: "{cudnn}"
        }}
        platform_name: "CUDA" runtime_version {{ major: {_CUDA[0]} }}
        dnn_version_info {{ major: {cudnn.partition(".")[0]} }} device_description_str: "{name}"
    """
