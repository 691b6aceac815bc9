"""Arrays of ours beside the tensors of a folder: what goes where, what fits."""

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dpo_jax.errors import CheckpointError
from dpo_jax.models import layout
from dpo_jax.models.hf_files import Folder
from dpo_jax.models.hf_names import differences

Index = tuple[slice, ...]


class Leaf(NamedTuple):
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


def as_stored(
  path: str | os.PathLike, names: dict[str, str], abstract: Any
) -> Any:
  """`abstract` with the dtypes that the files have; where the layers of one
  array differ, the dtype that holds all of them.

  Raises:
    CheckpointError: as `load_variables`.
  """
  folder = Folder(path)
  leaves = leaves_of(names, abstract)
  check(folder, leaves, names)
  out = {}
  for leaf in leaves:
    found = {folder.dtype(name) for name in tensors_of(leaf)}
    dtype = jnp.result_type(*sorted(found, key=str))
    out[leaf.path] = jax.ShapeDtypeStruct(
      leaf.shape, dtype, sharding=leaf.sharding
    )
  return {"params": traverse.unflatten_dict(out, sep="/")}


def leaves_of(names: dict[str, str], abstract: Any) -> list[Leaf]:
  """The arrays of `{"params": ...}`, on the first device unless they say."""
  first = SingleDeviceSharding(jax.local_devices()[0])
  return [
    Leaf(path, names[path], x.shape, np.dtype(x.dtype), x.sharding or first)
    for path, x in traverse.flatten_dict(abstract["params"], sep="/").items()
  ]


def tensors_of(leaf: Leaf) -> Iterator[str]:
  """Names of theirs that make up an array."""
  for index in layout.indices(leaf.name, leaf.shape):
    yield leaf.name.format(*index)


def check(folder: Folder, leaves: list[Leaf], names: dict[str, str]) -> None:
  """
  Raises:
    CheckpointError: tensors are missing, too many, or of another shape or kind.
  """
  wanted = {name: leaf for leaf in leaves for name in tensors_of(leaf)}
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


def bytes_of(folder: Folder, leaf: Leaf) -> int:
  """Bytes of the files that this process needs for a leaf."""
  one = math.prod(leaf.shape[leaf.stacked() :])
  stored = sum(one * folder.dtype(name).itemsize for name in tensors_of(leaf))
  share = sum(
    math.prod(s.stop - s.start for s in index)
    for index, _ in leaf.parts().values()
  )
  return stored * share // max(1, math.prod(leaf.shape))
