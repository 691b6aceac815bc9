"""Weights to safetensors, one tensor on the host at a time.

The safetensors library wants all tensors of a file at once. Their sizes are
known beforehand, so the header is written here, and then tensor by tensor.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import numpy as np

from dpo_jax.models import layout
from dpo_jax.models.hf_files import FLOATS, INDEX, SINGLE

SHARD_BYTES = 5 * 2**30
# (our path, index of the stacked axes, part of ours) -> what is written of it
Transform = Callable[[str, tuple[int, ...], np.ndarray], np.ndarray]
_SPELLED = {dtype: spelled for spelled, dtype in FLOATS.items()}


class Tensor(NamedTuple):
  """What will be written, and how to get it."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
  path: str | os.PathLike,
  module: types.ModuleType,
  config: Any,
  variables: Any,
  *,
  max_shard_bytes: int = SHARD_BYTES,
  save_tokenizer: Callable[[str], None] | None = None,
  transform: Transform | None = None,
  dtype: Any = None,
  entries: dict[str, Any] | None = None,
) -> None:
  """Writes a folder that transformers, vLLM and this package load as it is.

  The folder appears under its name only when it is whole; one of that name
  that exists is replaced. Every process calls this; the first one writes.

  Args:
    path: folder to write.
    module: family module (`HF_NAMES`, `config_to_hf`).
    config: the family's Config.
    variables: `{"params": ...}`, sharded or not.
    max_shard_bytes: start another safetensors file beyond this size.
    save_tokenizer: called with the folder to add tokenizer files.
    transform: given each part of ours on the host, with its path and its index
      in the stacked axes; returns what to write instead, of the same shape and
      dtype. It must not change the part itself.
    dtype: of the files; None keeps that of each array.
    entries: of config.json, beside those that the family writes.
  """
  writes = jax.process_index() == 0
  tensors = list(_tensors(module, variables, transform, dtype))
  with whole_folder(path, writes) as part:
    write_tensors(part, tensors, max_shard_bytes, writes)
    if writes:
      hf = module.config_to_hf(config) | dtype_entries(tensors)
      hf |= entries or {}
      (part / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
      if save_tokenizer:
        save_tokenizer(str(part))


def dtype_entries(tensors: list[Tensor]) -> dict[str, str]:
  """The dtype of most of the weights, as transformers 4 and 5 look for it."""
  sizes: collections.Counter[str] = collections.Counter()
  for tensor in tensors:
    sizes[str(tensor.dtype)] += tensor.nbytes()
  dtype = max(sizes, key=sizes.__getitem__, default="float32")
  return {"torch_dtype": dtype, "dtype": dtype}


@contextlib.contextmanager
def whole_folder(
  path: str | os.PathLike, writes: bool = True
) -> Iterator[pathlib.Path]:
  """Yields a folder to write into, which takes the name `path` at the end; what
  had the name before is there until then, and after an error."""
  path = pathlib.Path(path)
  part, old = (path.with_name(path.name + x) for x in (".part", ".old"))
  if writes:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
  try:
    yield part
  except BaseException:
    if writes:
      shutil.rmtree(part, ignore_errors=True)
    raise
  if writes:
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
      path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_tensors(
  folder: pathlib.Path,
  tensors: list[Tensor],
  max_shard_bytes: int = SHARD_BYTES,
  writes: bool = True,
) -> None:
  """Writes one file, or several and their index.

  Args:
    folder: where to.
    tensors: each is made when its turn comes, and then forgotten.
    max_shard_bytes: start another file beyond this size.
    writes: False only makes the tensors, where that takes all processes.
  """
  shards = _split(tensors, max_shard_bytes)
  files = [
    f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    for i in range(len(shards))
  ]
  if len(shards) == 1:
    files = [SINGLE]
  for file, shard in zip(files, shards):
    _write_file(folder / file if writes else None, shard)
  if writes and len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(t.nbytes() for t in tensors)},
      "weight_map": {
        t.name: file for file, shard in zip(files, shards) for t in shard
      },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(module, variables, transform, dtype) -> Iterator[Tensor]:
  flat = traverse.flatten_dict(variables["params"], sep="/")
  for ours, leaf in flat.items():
    name = module.HF_NAMES[ours]
    shape = layout.hf_shape(ours, leaf.shape[layout.stacked_axes(name) :])
    kept = np.dtype(dtype or leaf.dtype)
    for index in layout.indices(name, leaf.shape):

      def make(ours=ours, leaf=leaf, index=index, kept=kept):
        part = _to_host(leaf[index] if index else leaf)
        if transform:
          part = part.astype(np.float32)  # to be rounded once, at the end
          part = _same(part, transform(ours, index, part), ours, index)
        return layout.to_hf(ours, part.astype(kept, copy=False))

      yield Tensor(name.format(*index), kept, shape, make)


def _same(part, changed, ours, index) -> np.ndarray:
  if (changed.dtype, changed.shape) != (part.dtype, part.shape):
    raise ValueError(
      f"transform made {changed.dtype}{list(changed.shape)} of"
      f" {part.dtype}{list(part.shape)}, {ours} {list(index)}"
    )
  return changed


def _to_host(array: jax.Array) -> np.ndarray:
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(array, tiled=True)


def _split(tensors: list[Tensor], most: int) -> list[list[Tensor]]:
  # Wide types first, so that each tensor begins at a multiple of its width.
  shards, size = [[]], 0
  for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
    if size and size + tensor.nbytes() > most:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes()
  return shards


def _write_file(file: pathlib.Path | None, tensors: list[Tensor]) -> None:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  begin = 0
  for t in tensors:
    end = begin + t.nbytes()
    header[t.name] = {
      "dtype": _SPELLED[t.dtype],
      "shape": list(t.shape),
      "data_offsets": [begin, end],
    }
    begin = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with file.open("wb") if file else contextlib.nullcontext() as out:
    if out:
      out.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
      array = t.make()
      if out:
        out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
