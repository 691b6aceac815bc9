"""Weights from safetensors into arrays that are sharded as they are made.

Each process copies the slices that its devices hold, once, however many of
them hold the same. On accelerators one layer at a time is on the host. On CPU
the host is the device: there a leaf is filled in place and jax takes the
memory over, so that no weight is there twice.
"""

import concurrent.futures
import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from dpo_jax import offload
from dpo_jax.models import layout
from dpo_jax.models.hf_files import Folder
from dpo_jax.models.hf_fit import Index, Leaf, bytes_of, check, leaves_of
from dpo_jax.progress import byte_bar

_ALIGNED = 64  # bytes; what jax takes over without a copy


def load_variables(
  path: str | os.PathLike,
  names: dict[str, str],
  abstract: Any,
  *,
  on_read: Callable[[int], None] | None = None,
) -> Any:
  """Reads weights into arrays of the given shapes, dtypes and shardings.

  Args:
    path: folder with `model.safetensors` or shards and their index.
    names: our paths to theirs (`HF_NAMES` of the family).
    abstract: `{"params": ...}` of ShapeDtypeStructs, with shardings or
      without (then on the first device).
    on_read: called with the bytes of every part that was read; None shows a
      bar on a terminal.

  Returns:
    `{"params": ...}` of jax arrays. Each process reads only what its devices
    hold.

  Raises:
    CheckpointError: files missing or damaged, or tensors that do not fit; the
      message names both sides. Nothing is read then.
  """
  path = pathlib.Path(path)
  folder = Folder(path)
  leaves = leaves_of(names, abstract)
  check(folder, leaves, names)
  with contextlib.ExitStack() as stack:
    if on_read is None:
      total = sum(bytes_of(folder, leaf) for leaf in leaves)
      on_read = stack.enter_context(byte_bar(total, f"loading {path.name}"))
    workers = min(8, os.cpu_count() or 1)
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
    loaded = {
      leaf.path: _load(_Reader(folder, leaf, pool, on_read)) for leaf in leaves
    }
  return {"params": traverse.unflatten_dict(loaded, sep="/")}


class _Reader(NamedTuple):
  """Copies parts of one leaf out of the files."""

  folder: Folder
  leaf: Leaf
  pool: concurrent.futures.Executor
  on_read: Callable[[int], None]

  def fill(self, parts: Iterable[Index]) -> list[np.ndarray]:
    """The parts of the leaf at these indices, as ours lie."""
    parts = list(parts)
    out = [_aligned([s.stop - s.start for s in p], self.leaf.dtype)
           for p in parts]  # fmt: skip
    stacked = self.leaf.stacked()
    jobs = [
      (
        self.leaf.name.format(*at),
        part[stacked:],
        array[tuple(i - s.start for i, s in zip(at, part))],
      )
      for at in layout.indices(self.leaf.name, self.leaf.shape)
      for part, array in zip(parts, out)
      if all(s.start <= i < s.stop for i, s in zip(at, part))
    ]
    for size in self.pool.map(lambda job: self._copy(*job), jobs):
      self.on_read(size)
    return out

  def _copy(self, name: str, index: Index, out: np.ndarray) -> int:
    one = self.leaf.shape[self.leaf.stacked() :]
    theirs = layout.from_hf(self.leaf.path, self.folder.view(name), one)[index]
    if layout.is_matrix(self.leaf.path):
      # The first of their axes is our first output axis.
      layout.turn(theirs, out, layout.input_axes(self.leaf.path))
    else:
      out[...] = theirs
    self.folder.forget(name)  # another part of it maps it again
    return theirs.nbytes


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNED, np.uint8)
  begin = -memory.ctypes.data % _ALIGNED
  return memory[begin : begin + size].view(dtype).reshape(shape)


def _load(reader: _Reader) -> jax.Array:
  leaf = reader.leaf
  if leaf.stacked() and _by_layer(leaf.sharding):
    return _load_layers(reader)
  return _put(leaf.shape, leaf.sharding, reader, leaf.parts().values())


def _put(shape, sharding, reader, parts) -> jax.Array:
  indices, holders = zip(*parts)
  kind = sharding.memory_kind
  arrays = [
    jax.device_put(array, SingleDeviceSharding(device, memory_kind=kind))
    for array, devices in zip(reader.fill(indices), holders)
    for device in devices
  ]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _by_layer(sharding: jax.sharding.Sharding) -> bool:
  """Whether a leaf is put together on its devices, layer by layer; the layers
  themselves must not be split over them."""
  platform = next(iter(sharding.device_set)).platform
  if platform == "cpu" or sharding.memory_kind == offload.KIND:
    return False
  named = isinstance(sharding, NamedSharding) and not any(sharding.spec[:1])
  return named or isinstance(sharding, SingleDeviceSharding)


def _load_layers(reader: _Reader) -> jax.Array:
  leaf = reader.leaf
  start = lambda: jnp.zeros(leaf.shape, leaf.dtype)
  loaded = jax.jit(start, out_shardings=leaf.sharding)()
  place = jax.jit(
    lambda whole, one, i: jax.lax.dynamic_update_slice_in_dim(whole, one, i, 0),
    donate_argnums=0,
    out_shardings=leaf.sharding,
  )
  for i in range(leaf.shape[0]):
    parts = [
      ((slice(i, i + 1), *index[1:]), devices)
      for index, devices in leaf.parts().values()
    ]
    one = _put((1, *leaf.shape[1:]), leaf.sharding, reader, parts)
    # At most the layer before is still on its way when the next is read.
    jax.block_until_ready(loaded)
    loaded = place(loaded, one, jnp.int32(i))
  return loaded
