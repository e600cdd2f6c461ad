"""Exports a model as an ONNX program (extra `onnx`), and compares it with the model."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from singer_jax.errors import InputError, RunError
from singer_jax.io.files import replacing
from singer_jax.models.model_card import ONNX_FILE
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.program import largest_difference

OPSET = 18
INPUT, OUTPUTS = "pixel_values", ("last_hidden_state", "pooler_output", "logits")

# Largest difference from the model relative to the largest output value, in float32.
_TOLERANCE = 1e-4
_COMPARED = (1, 3)  # batch sizes


def check_onnx() -> None:
    """Raises `InputError` if the converter or onnxruntime is not installed."""
    for package in ("jax2onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"formats: onnx needs {package}, which is not installed; "
                "pip install 'singer-jax[onnx]'"
            )


def export_onnx(folder: epath.Path, network: Network, params: Params) -> float:
    """Writes `model.onnx` after checking that onnxruntime computes the same as the model.

    The program takes `pixel_values`, normalised float32 images [batch, 3, height, width] of any
    batch size. It returns `last_hidden_state`, the tokens after the final norm [batch, tokens, dim]
    (the output of the last block if the last norm follows the pooling or is left out),
    `pooler_output`, the input of the head [batch, dim], and `logits` if the model has a head.

    Args:
      folder: output folder, which is made if needed.
      network: the model, which computes in float32.
      params: parameters of the model, which are stored as float32.

    Returns:
      The largest difference from the model relative to the largest output value.

    Raises:
      InputError: the converter is not installed.
      RunError: the outputs differ from the model's, or the file cannot be written.
    """
    check_onnx()
    from jax2onnx import to_onnx

    arch = network.spec.arch
    shape = (3, *arch.img_size)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

    def outputs(images: jax.Array) -> tuple[jax.Array, ...]:
        model = network.merge(params)
        tokens = model.features(jnp.transpose(images, (0, 2, 3, 1)))[-1]
        found = (model.norm(tokens), model.pooled(tokens))
        return (*found, model.head_output(tokens)) if arch.num_classes else found

    names = OUTPUTS[: 3 if arch.num_classes else 2]
    with _quiet():
        program = to_onnx(
            outputs,
            [("batch", *shape)],
            model_name=network.spec.name,
            opset=OPSET,
            input_names=[INPUT],
            output_names=list(names),
        )
    with replacing(folder / ONNX_FILE) as file:
        file.write_bytes(program.SerializeToString())
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        differences = []
        for batch in _COMPARED:
            rng = np.random.default_rng(batch)
            images = rng.standard_normal((batch, *shape)).astype(np.float32)
            with jax.default_matmul_precision("highest"):
                expected = jax.jit(outputs)(images)
            found = session.run(list(names), {INPUT: images})
            differences.append(largest_difference(found, expected))
        difference = float(np.max(differences))
        if not difference <= _TOLERANCE:
            file.unlink()
            raise RunError(
                f"{folder / ONNX_FILE}: onnxruntime differs from the model by {difference:.2g} of "
                "its largest value; nothing is written, report it with the versions of both"
            )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the converter's warnings about plugins and shapes, which do not matter to users."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
