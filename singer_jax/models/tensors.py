"""Tensors that are read from files on demand, and tensors that are computed from those."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from singer_jax.errors import InputError
from singer_jax.io import limits

_LARGEST_BIAS = 2**24  # elements, the largest number of classes of a head


class StoredTensor(Protocol):
    """A tensor in a file, which `read` loads."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values or a part of them in PyTorch's layout."""


@dataclasses.dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is computed from stored tensors when it is read.

    Attributes:
      sources: the stored tensors.
      shape: shape of the result.
      dtype: dtype of the result.
      compute: function from the complete source tensors to the result.
    """

    sources: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[..., np.ndarray]

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values or a part of them; the sources are read completely."""
        whole = self.compute(*(source.read() for source in self.sources))
        return np.ascontiguousarray(whole[part])


def joined(*sources: StoredTensor) -> DerivedTensor:
    """Returns the concatenation along the first axis.

    Raises:
      InputError: the shapes do not match.
    """
    first = sources[0]
    if not first.shape or any(each.shape[1:] != first.shape[1:] for each in sources):
        shapes = ", ".join(str(list(each.shape)) for each in sources)
        raise InputError(f"tensors of shapes {shapes[:100]} cannot be joined")
    shape = (sum(each.shape[0] for each in sources), *first.shape[1:])
    return DerivedTensor(sources, shape, first.dtype, lambda *arrays: np.concatenate(arrays))


def reshaped(source: StoredTensor, shape: tuple[int, ...]) -> DerivedTensor:
    """Returns the same elements in another shape.

    Raises:
      InputError: the number of elements differs.
    """
    if math.prod(source.shape) != math.prod(shape):
        raise InputError(f"a tensor of shape {list(source.shape)} is not one of {list(shape)}")
    return DerivedTensor((source,), shape, source.dtype, lambda array: array.reshape(shape))


def transposed(source: StoredTensor, axes: tuple[int, ...]) -> DerivedTensor:
    """Returns the tensor with its axes in another order.

    Raises:
      InputError: the tensor has another number of axes.
    """
    if len(source.shape) != len(axes):
        raise InputError(f"a tensor of shape {list(source.shape)} does not have {len(axes)} axes")
    shape = tuple(source.shape[axis] for axis in axes)
    return DerivedTensor((source,), shape, source.dtype, lambda array: array.transpose(axes))


def rows(source: StoredTensor, start: int, stop: int, axis: int = 0) -> DerivedTensor:
    """Returns entries `start` to `stop` along an axis.

    Raises:
      InputError: the tensor has fewer entries.
    """
    if len(source.shape) <= axis or not 0 <= start <= stop <= source.shape[axis]:
        raise InputError(f"a tensor of shape {list(source.shape)} has no entries {start}:{stop}")
    shape = (*source.shape[:axis], stop - start, *source.shape[axis + 1 :])
    index = (slice(None),) * axis + (slice(start, stop),)
    return DerivedTensor((source,), shape, source.dtype, lambda array: array[index])


def added(one: StoredTensor, other: StoredTensor) -> DerivedTensor:
    """Returns the sum of two tensors of one shape.

    Raises:
      InputError: the shapes differ.
    """
    if one.shape != other.shape:
        raise InputError(f"tensors of {list(one.shape)} and {list(other.shape)} cannot be added")
    return DerivedTensor((one, other), one.shape, one.dtype, np.add)


def zeros(size: int) -> DerivedTensor:
    """Returns a float32 vector of zeros.

    Raises:
      InputError: the vector is too large.
    """
    limits.check("a bias", size, _LARGEST_BIAS, "elements")
    return DerivedTensor((), (size,), np.dtype(np.float32), lambda: np.zeros(size, np.float32))
