"""What the compiler makes of the training step for a TPU, part by part, without a TPU.

  pip install ".[dev]"
  python -m benchmarks.compiled --parts
  python -m benchmarks.compiled --step --topology v5e:4x4

`--parts`: one block, the embedding, the loss's pieces and the null space at the width of a model
and 128 images a chip, each in the form that the CPU takes (or that a library offers) and in the
one that the TPU takes. `--step`: the whole SiNGER step. CPU seconds of the compiler, all threads;
temporaries, memory traffic (`singer_jax.platform.hlo`) and operations of one chip, where the body
of a loop counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from benchmarks.make_inputs import write_blank_weights
from benchmarks.results import report
from benchmarks.topology import Program, compile_timed, tpu_mesh
from singer_jax.config import default, settings_of
from singer_jax.methods import singer
from singer_jax.methods.jacobi import left_singular
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.layers import patch_products
from singer_jax.models.weights import abstract_model
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import setup_students


def convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`layers.patch_products` by the library."""
    strides = kernel.shape[:2]
    return jax.lax.conv_general_dilated(
        images, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def parts(model: str, mesh: Mesh, images: int) -> Iterator[tuple[str, str, Callable, tuple]]:
    """Part, form, function and abstract arguments."""
    arch = dataclasses.replace(lookup(model).arch, depth=12)
    tokens, dim = arch.num_prefix_tokens + arch.num_patches, arch.embed_dim
    split, whole = parallel.batch_sharding(mesh), parallel.replicated(mesh)

    def batch(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((images * mesh.size, *shape), dtype, sharding=split)

    stream = batch(tokens, dim)
    for form, platform in (("of the CPU", "cpu"), ("of the TPU", "tpu")):
        stacked = platform == "tpu"
        policy = ComputePolicy(jnp.bfloat16, jnp.bfloat16, backend=platform, stacked=stacked)
        graph, params = abstract_model(arch, policy)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params
        )

        def block(params: Any, x: Any, graph: Any = graph) -> Any:
            return nnx.merge(graph, params).apply_block(0, x)

        def gradient(function: Callable) -> Callable:
            def squared(*args: Any) -> Any:
                return jnp.mean(jnp.square(function(*args).astype(jnp.float32)))

            return jax.grad(squared, argnums=(0, 1))

        def twelve(params: Any, x: Any, graph: Any = graph) -> Any:
            return nnx.merge(graph, params).features_at(x, (11,))[11]

        pixels = batch(*arch.img_size, 3, dtype=jnp.uint8)
        yield "block, forward", form, block, (params, stream)
        yield "block, forward and backward", form, gradient(block), (params, stream)
        yield "12 blocks, forward", form, twelve, (params, pixels)

    def squares(kernel: Any, x: Any, embed: Callable) -> Any:
        return jnp.mean(jnp.square(embed(x.astype(jnp.bfloat16), kernel).astype(jnp.float32)))

    side = arch.patch_size
    kernel = jax.ShapeDtypeStruct((side, side, 3, dim), jnp.bfloat16, sharding=whole)
    for form, embed in (("matrix", patch_products), ("convolution", convolution)):
        yield "embedding", form, lambda k, x, f=embed: f(x.astype(k.dtype), k), (kernel, pixels)
        gradient_of_kernel = jax.grad(functools.partial(squares, embed=embed))
        yield "embedding, forward and backward", form, gradient_of_kernel, (kernel, pixels)

    norms = batch(arch.num_patches, dtype=jnp.float32)
    yield (
        "outlier threshold",
        "jnp.quantile",
        lambda x: jnp.quantile(x, 0.97, axis=1, keepdims=True),
        (norms,),
    )
    yield "outlier threshold", "top_k", lambda x: singer.outlier_threshold(x, 0.97), (norms,)
    yield "median of all norms", "bisection", lambda x: singer.batch_quantile(x, 0.5), (norms,)
    yield (
        "cosine matrices",
        "-",
        singer.cosine_similarity_matrix,
        (batch(arch.num_patches, dim, dtype=jnp.float32),),
    )
    matrix = jax.ShapeDtypeStruct((dim, dim), jnp.float32, sharding=whole)
    yield "singular vectors", "Jacobi", left_singular, (matrix,)
    yield (
        "singular vectors",
        "jnp.linalg.svd",
        lambda x: jnp.linalg.svd(x, full_matrices=False)[:2],
        (matrix,),
    )


def whole_step(teacher: str, student: str, mesh: Mesh, images: int) -> Program:
    """The recommended SiNGER step."""
    config = default()
    config.teacher.model, config.student.model = teacher, student
    config.batch_size = images * mesh.size
    with tempfile.TemporaryDirectory() as folder:
        weights = write_blank_weights(Path(folder) / "teacher.safetensors", teacher)
        config.teacher.weights = str(weights)
        run = setup_students(settings_of(config), 1_281_167, 1000, mesh)
    split = parallel.batch_sharding(mesh)
    shape = (config.batch_size, run.image_size, run.image_size, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }
    logged = jax.ShapeDtypeStruct((), jnp.bool_, sharding=parallel.replicated(mesh))
    step = jit_step(run.any.distillation, mesh, run.any.state, run.teacher)
    return compile_timed(step, run.any.state, run.teacher, batch, logged)


def row(part: str, form: str, program: Program) -> dict[str, str]:
    """Of the table."""
    return {
        "part": part,
        "form": form,
        "CPU s": f"{program.cpu_seconds:.1f}",
        "temporaries GiB": f"{program.temporary_gib:.2f}",
        "traffic GB": f"{program.traffic_gb:.2f}",
        "GFLOP": f"{program.cost('flops') / 1e9:.1f}",
    }


def main() -> None:
    """Compiles what the arguments ask for and reports a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--teacher", default="vit_large_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=128, help="a chip")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    mesh = tpu_mesh(arguments.topology)
    rows = []
    if arguments.parts:
        for part, form, function, args in parts(arguments.teacher, mesh, arguments.images):
            if arguments.only in part:
                rows.append(row(part, form, compile_timed(jax.jit(function), *args)))
                print(rows[-1], flush=True)
    if arguments.step:
        pair = (arguments.teacher, arguments.student)
        program = whole_step(*pair, mesh, arguments.images)
        rows.append(row(" -> ".join(pair), "whole step", program))
    import sys

    report(
        f"Compiled for {arguments.topology}, {arguments.images} images a chip, bfloat16",
        f"python -m benchmarks.compiled {' '.join(sys.argv[1:])}",
        rows,
        "",
        ("jax", "libtpu"),
    )


if __name__ == "__main__":
    main()
