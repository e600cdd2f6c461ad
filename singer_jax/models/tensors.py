"""Tensors that are still in their files, and tensors that are computed from those when read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from singer_jax.errors import InputError
from singer_jax.io import limits

_LARGEST_BIAS = 2**24  # elements, as many as a head may have classes


class StoredTensor(Protocol):
    """A tensor still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns its values, or a part of them, in PyTorch's layout."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor that is computed from stored ones when it is read.

    Attributes:
      sources: the stored tensors.
      shape: shape of the result.
      dtype: dtype of the result.
      compute: makes the result of the whole sources.
    """

    sources: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[..., np.ndarray]

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns its values, or a part of them; reads the sources whole."""
        whole = self.compute(*(source.read() for source in self.sources))
        return np.ascontiguousarray(whole[part])


def joined(*sources: StoredTensor) -> Derived:
    """Returns the concatenation along the first axis.

    Raises:
      InputError: the shapes do not fit together.
    """
    first = sources[0]
    if not first.shape or any(each.shape[1:] != first.shape[1:] for each in sources):
        shapes = ", ".join(str(list(each.shape)) for each in sources)
        raise InputError(f"tensors of shapes {shapes[:100]} cannot be joined")
    shape = (sum(each.shape[0] for each in sources), *first.shape[1:])
    return Derived(sources, shape, first.dtype, lambda *arrays: np.concatenate(arrays))


def reshaped(source: StoredTensor, shape: tuple[int, ...]) -> Derived:
    """Returns the same elements in another shape.

    Raises:
      InputError: the number of elements differs.
    """
    if math.prod(source.shape) != math.prod(shape):
        raise InputError(f"a tensor of shape {list(source.shape)} is not one of {list(shape)}")
    return Derived((source,), shape, source.dtype, lambda array: array.reshape(shape))


def transposed(source: StoredTensor, axes: tuple[int, ...]) -> Derived:
    """Returns the tensor with its axes in another order.

    Raises:
      InputError: another number of axes.
    """
    if len(source.shape) != len(axes):
        raise InputError(f"a tensor of shape {list(source.shape)} has not {len(axes)} axes")
    shape = tuple(source.shape[axis] for axis in axes)
    return Derived((source,), shape, source.dtype, lambda array: array.transpose(axes))


def rows(source: StoredTensor, start: int, stop: int, axis: int = 0) -> Derived:
    """Returns entries `start` to `stop` along an axis.

    Raises:
      InputError: the tensor has fewer.
    """
    if len(source.shape) <= axis or not 0 <= start <= stop <= source.shape[axis]:
        raise InputError(f"a tensor of shape {list(source.shape)} has no entries {start}:{stop}")
    shape = (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])
    index = (slice(None),) * axis + (slice(start, stop),)
    return Derived((source,), shape, source.dtype, lambda array: array[index])


def added(one: StoredTensor, other: StoredTensor) -> Derived:
    """Returns the sum of two tensors of one shape.

    Raises:
      InputError: the shapes differ.
    """
    if one.shape != other.shape:
        raise InputError(f"tensors of {list(one.shape)} and {list(other.shape)} cannot be added")
    return Derived((one, other), one.shape, one.dtype, np.add)


def zeros(size: int) -> Derived:
    """Returns a float32 vector of zeros.

    Raises:
      InputError: an absurd size.
    """
    limits.check("a bias", size, _LARGEST_BIAS, "elements")
    return Derived((), (size,), np.dtype(np.float32), lambda: np.zeros(size, np.float32))
