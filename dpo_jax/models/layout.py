"""How one weight of ours lies in a Hugging Face checkpoint.

Weights of all layers are one leaf here, stacked along leading axes; there each
layer (and each expert of it) has a tensor of its own, whose name counts. A
kernel [in..., out...] here is a matrix [out, in] there; so are an adapter's `a`
[in..., R] and `b` [R, out...].
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

_ROWS = 32  # of 2 bytes: a cache line


def input_axes(path: str) -> int:
  """How many axes of a matrix, the stacked ones aside, are its input."""
  return 2 if path.endswith(("attention/o/kernel", "attention/o/a")) else 1


def is_matrix(path: str) -> bool:
  """Whether a weight is a matrix [out, in] there, whatever its axes here."""
  return path.endswith(("/kernel", "/a", "/b"))


def stacked_axes(name: str) -> int:
  """How many leading axes of ours a name of theirs counts with its `{}`."""
  return name.count("{}")


def indices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  """Every index of the stacked axes: `name.format(*index)` is a tensor of
  theirs, `leaf[index]` the part of ours."""
  return itertools.product(*map(range, shape[: stacked_axes(name)]))


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of their tensor for a part of ours."""
  if path.endswith("bias"):
    return (math.prod(shape),)
  if not is_matrix(path):
    return shape
  inputs = input_axes(path)
  return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def to_hf(path: str, part: np.ndarray) -> np.ndarray:
  """A part of ours as their tensor."""
  shape = hf_shape(path, part.shape)
  if not is_matrix(path):
    return np.ascontiguousarray(part.reshape(shape))
  out = np.empty(shape, part.dtype)
  turn(part.reshape(shape[::-1]).T, out, 1)
  return out


def from_hf(
  path: str, tensor: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Their tensor as a part of ours, of that shape; a view, so that a slice of
  it touches nothing else."""
  if not is_matrix(path):
    return tensor.reshape(shape)
  inputs = input_axes(path)
  outputs = len(shape) - inputs
  tensor = tensor.reshape(shape[inputs:] + shape[:inputs])
  return tensor.transpose(*range(outputs, len(shape)), *range(outputs))


def turn(source: np.ndarray, out: np.ndarray, axis: int) -> None:
  """Copies a view into an array whose axes lie in another order, some rows of
  the view's memory at a time: a copy that reads in one order and writes in the
  other misses every cache.

  Args:
    source: a view, perhaps of another dtype.
    out: of its shape.
    axis: the axis along which the source's memory is slowest.
  """
  before = (slice(None),) * axis
  step = max(1, _ROWS // max(1, math.prod(out.shape[axis + 1 :])))
  for i in range(0, out.shape[axis], step):
    rows = (*before, slice(i, i + step))
    out[rows] = source[rows]
