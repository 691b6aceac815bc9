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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from dpo_jax.errors import CheckpointError
from dpo_jax.models import layout
from dpo_jax.models.hf_files import Folder
from dpo_jax.models.hf_names import differences
from dpo_jax.progress import byte_bar

Index = tuple[slice, ...]
_ALIGNED = 64  # bytes; what jax takes over without a copy


class _Leaf(NamedTuple):
  """An array of ours, and where it comes from."""

  path: str
  name: str  # theirs, with a `{}` for each stacked axis
  shape: tuple[int, ...]
  dtype: np.dtype
  sharding: jax.sharding.Sharding

  def stacked(self) -> int:
    return layout.stacked_axes(self.name)

  def parts(self) -> dict[tuple, tuple[Index, list[jax.Device]]]:
    """Each different part of the array that this process's devices hold."""
    found: dict[tuple, tuple[Index, list[jax.Device]]] = {}
    held = self.sharding.addressable_devices_indices_map(self.shape)
    for device, index in held.items():
      index = tuple(slice(*s.indices(n)) for s, n in zip(index, self.shape))
      key = tuple((s.start, s.stop) for s in index)
      found.setdefault(key, (index, []))[1].append(device)
    return found


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
  leaves = _leaves(names, abstract)
  _check(folder, leaves, names)
  with contextlib.ExitStack() as stack:
    if on_read is None:
      total = sum(_bytes(folder, leaf) for leaf in leaves)
      on_read = stack.enter_context(byte_bar(total, f"loading {path.name}"))
    workers = min(8, os.cpu_count() or 1)
    pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
    loaded = {
      leaf.path: _load(_Reader(folder, leaf, pool, on_read)) for leaf in leaves
    }
  return {"params": traverse.unflatten_dict(loaded, sep="/")}


def as_stored(
  path: str | os.PathLike, names: dict[str, str], abstract: Any
) -> Any:
  """`abstract` with the dtypes that the files have; where the layers of one
  array differ, the dtype that holds all of them.

  Raises:
    CheckpointError: as `load_variables`.
  """
  folder = Folder(path)
  leaves = _leaves(names, abstract)
  _check(folder, leaves, names)
  out = {}
  for leaf in leaves:
    found = {folder.dtype(name) for name in _tensors(leaf)}
    dtype = jnp.result_type(*sorted(found, key=str))
    out[leaf.path] = jax.ShapeDtypeStruct(
      leaf.shape, dtype, sharding=leaf.sharding
    )
  return {"params": traverse.unflatten_dict(out, sep="/")}


def _leaves(names, abstract) -> list[_Leaf]:
  first = SingleDeviceSharding(jax.local_devices()[0])
  return [
    _Leaf(path, names[path], x.shape, np.dtype(x.dtype), x.sharding or first)
    for path, x in traverse.flatten_dict(abstract["params"], sep="/").items()
  ]


def _tensors(leaf: _Leaf) -> Iterator[str]:
  for index in layout.indices(leaf.name, leaf.shape):
    yield leaf.name.format(*index)


def _check(folder: Folder, leaves: list[_Leaf], names: dict[str, str]) -> None:
  wanted = {name: leaf for leaf in leaves for name in _tensors(leaf)}
  # Some writers store buffers, or the tied output embedding, once more.
  extra = {
    name
    for name in folder.tensors.keys() - wanted.keys() - {names["unembed"]}
    if "rotary_emb" not in name
  }
  missing = wanted.keys() - folder.tensors.keys()
  if missing or extra:
    raise CheckpointError(
      f"{folder.path}: weights do not fit the config; "
      + differences(missing, extra)
    )
  for name, leaf in wanted.items():
    folder.dtype(name)
    shape = folder.tensors[name].shape
    expected = layout.hf_shape(leaf.path, leaf.shape[leaf.stacked() :])
    if shape != expected:
      raise CheckpointError(
        f"{folder.path}: {name} has shape {list(shape)}, the config asks for"
        f" {list(expected)}"
      )


def _bytes(folder: Folder, leaf: _Leaf) -> int:
  """Bytes of the files that this process needs for a leaf."""
  one = math.prod(leaf.shape[leaf.stacked() :])
  stored = sum(one * folder.dtype(name).itemsize for name in _tensors(leaf))
  share = sum(
    math.prod(s.stop - s.start for s in index)
    for index, _ in leaf.parts().values()
  )
  return stored * share // max(1, math.prod(leaf.shape))


class _Reader(NamedTuple):
  """Copies parts of one leaf out of the files."""

  folder: Folder
  leaf: _Leaf
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
  arrays = [
    jax.device_put(array, device)
    for array, devices in zip(reader.fill(indices), holders)
    for device in devices
  ]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _by_layer(sharding: jax.sharding.Sharding) -> bool:
  """Whether a leaf is put together on its devices, layer by layer; the layers
  themselves must not be split over them."""
  platform = next(iter(sharding.device_set)).platform
  if platform == "cpu":
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
