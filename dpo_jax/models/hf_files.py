"""The safetensors files of a folder: what is in them, and where.

The safetensors library checks every header; tensors are then views of the
mapped files, so that a part can be copied out and nothing else is read.
Pickled weights are never read.
"""

import json
import mmap
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from dpo_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Others are quantised: read as they stand, they would be another model.
FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}


class Stored(NamedTuple):
  """One tensor of a file."""

  dtype: str  # as safetensors spells it
  shape: tuple[int, ...]
  begin: int  # byte of the file
  end: int
  data: mmap.mmap


class Folder:
  """Tensors by name; nothing but headers is read before it is asked for."""

  def __init__(self, path: str | os.PathLike):
    """Opens the single file, or every shard of the index.

    Raises:
      CheckpointError: files missing or damaged, or an index that does not fit.
    """
    self.path = pathlib.Path(path)
    index = self.path / INDEX
    placed = _read_index(index) if index.exists() else None
    shards = [SINGLE] if placed is None else sorted({*placed.values()})
    opened = {shard: open_file(self.path / shard) for shard in shards}
    self.tensors: dict[str, Stored] = {}
    for stored in opened.values():
      self.tensors |= stored
    for name, shard in (placed or {}).items():
      if name not in opened[shard]:
        raise CheckpointError(f"{index}: {_short(name)} is not in {shard!r}")
      self.tensors[name] = opened[shard][name]

  def dtype(self, name: str) -> np.dtype:
    """
    Raises:
      CheckpointError: not of floats.
    """
    kind = self.tensors[name].dtype
    if kind not in FLOATS:
      raise CheckpointError(
        f"{self.path}: {name} is of type {kind}, expected one of"
        f" {', '.join(FLOATS)}"
      )
    return FLOATS[kind]

  def view(self, name: str) -> np.ndarray:
    """The tensor, as the file has it. Copy out what is to be kept."""
    stored, dtype = self.tensors[name], self.dtype(name)
    count = (stored.end - stored.begin) // dtype.itemsize
    flat = np.frombuffer(stored.data, dtype, count, stored.begin)
    return flat.reshape(stored.shape)

  def forget(self, name: str) -> None:
    """Gives the memory of a tensor that was read back to the system."""
    stored = self.tensors[name]
    begin = stored.begin - stored.begin % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and stored.end > begin:
      stored.data.madvise(mmap.MADV_DONTNEED, begin, stored.end - begin)


def read_object(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that holds an object.

  Raises:
    CheckpointError: it is missing, or holds something else.
  """
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except OSError as e:
    raise CheckpointError(
      f"{file}: {e.strerror or e}; expected a Hugging Face checkpoint folder"
    ) from e
  except (ValueError, RecursionError) as e:
    raise CheckpointError(f"{file}: not JSON ({e})") from e
  if not isinstance(value, dict):
    found = type(value).__name__
    raise CheckpointError(f"{file}: expected an object, found {found}")
  return value


def _read_index(index: pathlib.Path) -> dict[str, str]:
  """Name of each tensor -> the file that should hold it."""
  placed = read_object(index).get("weight_map")
  if not isinstance(placed, dict) or not placed:
    raise CheckpointError(
      f"{index}: expected 'weight_map', an object of names and files"
    )
  for name, shard in placed.items():
    if not isinstance(shard, str):
      raise CheckpointError(
        f"{index}: {_short(name)} should be mapped to a file name, found"
        f" {_short(shard)}"
      )
    if os.path.basename(shard) != shard or shard in ("", ".", ".."):
      raise CheckpointError(f"{index}: {_short(shard)} leaves the folder")
    if not shard.endswith(".safetensors") or len(shard) > 255:
      raise CheckpointError(f"{index}: {_short(shard)} is no safetensors file")
  return placed


def open_file(file: pathlib.Path) -> dict[str, Stored]:
  """Tensors of one file by name.

  Raises:
    CheckpointError: damaged.
  """
  try:
    # Of the library's views only whole copies come out; it is here to refuse
    # headers that lie about what follows them.
    with safetensors.safe_open(file, framework="numpy"):
      pass
    with file.open("rb") as f:
      data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=_once)
  except (OSError, ValueError, safetensors.SafetensorError) as e:
    reason = " ".join(str(e).split())[:300]
    lacking = isinstance(e, FileNotFoundError)
    hint = _what_else(file.parent) if lacking else ""
    raise CheckpointError(f"{file}: cannot read weights: {reason}{hint}") from e
  header.pop("__metadata__", None)
  return {
    name: Stored(
      about["dtype"],
      tuple(about["shape"]),
      *(8 + size + offset for offset in about["data_offsets"]),
      data,
    )
    for name, about in header.items()
  }


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 100 else text[:100] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name stands twice in the header")
  return found


def _what_else(folder: pathlib.Path) -> str:
  """Names pickled weights, which many older folders have instead."""
  if not folder.is_dir():
    return ""
  pickled = sorted(
    p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
  )
  return (
    f"; {pickled[0]} is pickled, which can run code and is not read: convert"
    " it to safetensors first"
    if pickled
    else ""
  )
