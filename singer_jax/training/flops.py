"""The number of floating-point operations of a training step, counted without a compiler.

Only matrix products and convolutions count, with two operations per multiply-add, as for model
FLOPs utilisation. Recomputed blocks (rematerialisation) count again. XLA's own cost analysis needs
a compiled program, covers one device, and counts the body of a loop once.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from singer_jax.models.quantised import FP8_PRODUCT
from singer_jax.models.shift_average import views
from singer_jax.models.summary import features_flops
from singer_jax.platform.hlo import part_of
from singer_jax.training.step import PARTS, Students, TrainState


def step_flops(
    students: Students, states: Mapping[str, TrainState], teacher: Any, batch_size: int
) -> int:
    """Returns the sum of `parts_flops`."""
    return sum(parts_flops(students, states, teacher, batch_size).values())


def parts_flops(
    students: Students,
    states: Mapping[str, TrainState],
    teacher: Any,
    batch_size: int,
    quantised: bool = False,
) -> dict[str, int]:
    """Counts the operations of one step on all devices together, by part of the step.

    Args:
      students: The students of the step.
      states, teacher: Arguments of the step; they may be abstract.
      batch_size: Global batch size.
      quantised: Counts only products of 8-bit numbers.
    """
    grad_accum_steps = next(iter(students.each.values())).grad_accum_steps
    images = batch_size // grad_accum_steps
    features, taught, network = {}, 0, students.teacher
    if network:
        arch, reads = network.spec.arch, students.teacher_reads
        blocks = max(reads) + 1
        model = network.merge(teacher)
        passes = len(views(arch.grid)) if model.policy.artifact_removal == "shift_average" else 1
        tokens = model.num_added_tokens + arch.num_prefix_tokens + arch.num_patches
        shape = (images, tokens, arch.embed_dim)
        feature = jax.ShapeDtypeStruct(shape, model.policy.dtype)
        features = dict.fromkeys(reads, feature)
        if quantised:
            block = jax.make_jaxpr(lambda params, x: network.merge(params).apply_block(0, x))
            taught = passes * blocks * _of_jaxpr(block(teacher, feature).jaxpr, quantised).total()
        else:
            taught = passes * images * features_flops(arch, blocks, model.num_added_tokens)
    networks = [own.student for own in students.each.values()] + [network] * bool(network)
    size = max(each.image_size for each in networks)
    batch = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = collections.Counter(teacher=taught)
    for name, own in students.each.items():
        gradient = jax.make_jaxpr(jax.grad(lambda *xs, own=own: own.loss(*xs)[0]))
        state = states[name]
        traced = gradient(state.params, state.constants, teacher, features, batch, key)
        found += _of_jaxpr(traced.jaxpr, quantised)
    return {part: grad_accum_steps * number for part, number in found.items()}


def count(function: Any, *args: Any) -> int:
    """Counts the operations of the matrix products and convolutions of a function.

    Args:
      function: A traceable function.
      args: Arguments of the function; they may be abstract.

    Raises:
      ValueError: They are inside a loop of unknown length.
    """
    return sum(count_parts(function, *args).values())


def count_parts(function: Any, *args: Any) -> collections.Counter[str]:
    """Returns `count` for each scope in `PARTS`, and under "" for operations outside of them."""
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any, quantised: bool = False) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        own = part_of(str(equation.source_info.name_stack), PARTS)
        for part, number in _of_equation(equation, quantised).items():
            found[own or part] += number
    return found


def _of_equation(equation: Any, quantised: bool) -> Mapping[str, int]:
    name, params = equation.primitive.name, equation.params
    if quantised and params.get("name") == FP8_PRODUCT:  # an ordinary product of rounded numbers
        quantised = False
    product = name in ("dot_general", "conv_general_dilated")
    if quantised and product and max(x.aval.dtype.itemsize for x in equation.invars) > 1:
        return {}
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return {"": 2 * depth * math.prod(equation.outvars[0].aval.shape)}
    if name == "conv_general_dilated":
        return {"": _of_convolution(equation)}
    if name.startswith("dot_product_attention_") and not quantised:  # cuDNN's
        batch, queries, heads, dim = equation.invars[0].aval.shape
        products = 2 if "_fwd" in name else 4
        return {"": 2 * products * batch * heads * queries * equation.invars[1].aval.shape[1] * dim}
    inner = [_of_jaxpr(jaxpr, quantised) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner, key=lambda branch: branch.total())
    total = sum(inner, collections.Counter())
    if name == "while" and total:
        raise ValueError("a while loop of unknown length contains matrix products; use a scan")
    times = params["length"] if name == "scan" else 1
    return {part: times * number for part, number in total.items()}


def _of_convolution(equation: Any) -> int:
    """Counts a convolution without products with padding or the zeros of a dilated input."""
    params = equation.params
    inputs, kernel = (variable.aval.shape for variable in equation.invars)
    output = equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    found = 2 * output[numbers.out_spec[0]] * output[numbers.out_spec[1]]
    found *= kernel[numbers.rhs_spec[1]]
    for axis, stride in enumerate(params["window_strides"]):
        apart = params["lhs_dilation"][axis]
        taps = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * params["rhs_dilation"][axis]
        starts = np.arange(output[numbers.out_spec[2 + axis]]) * stride
        read = starts[:, None] + taps - params["padding"][axis][0]
        last = (inputs[numbers.lhs_spec[2 + axis]] - 1) * apart
        found *= int(np.sum((read >= 0) & (read <= last) & (read % apart == 0)))
    return found
