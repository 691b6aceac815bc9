"""Hugging Face checkpoints in and out: safetensors and config.json, no torch.

Reading goes tensor by tensor straight into sharded arrays; writing gathers one
tensor at a time. Pickled weights are never read.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import flax.traverse_util as traverse
import jax
import numpy as np
import safetensors
import safetensors.numpy

from dpo_jax.errors import CheckpointError
from dpo_jax.models import layout

# model_type of config.json -> module with HF_NAMES, config_from_hf, ...
FAMILIES = {
  name: f"dpo_jax.models.{name}"
  for name in (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
  )
}
Transform = Callable[[str, tuple[int, ...], np.ndarray], np.ndarray]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Others are quantised: read as they stand, they would be another model.
_FLOATS = ("F64", "F32", "F16", "BF16")


def family(model_type: str) -> types.ModuleType:
  """The module of a model family.

  Raises:
    CheckpointError: an architecture that is not known here.
  """
  if model_type not in FAMILIES:
    raise CheckpointError(
      f"model_type {model_type!r} is not supported; known:"
      f" {', '.join(FAMILIES)}"
    )
  return importlib.import_module(FAMILIES[model_type])


def read_config(path: str | os.PathLike) -> tuple[types.ModuleType, Any]:
  """Reads `config.json` of a checkpoint folder: (family module, Config).

  Raises:
    CheckpointError: no folder, no config, or one that does not fit the family.
  """
  file = pathlib.Path(path) / "config.json"
  hf = read_object(file)
  try:
    module = family(hf.get("model_type", "?"))
    config = module.config_from_hf(hf)
    _check_types(config)
    return module, config
  except (
    ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
  ) as e:  # fmt: skip
    what = f"missing {e}" if isinstance(e, KeyError) else e
    raise CheckpointError(f"{file}: {what}") from e
  except CheckpointError as e:
    raise CheckpointError(f"{file}: {e}") from e


def fingerprint(path: str | os.PathLike) -> str:
  """Tells weights apart without reading all of them: names and sizes of the
  safetensors files, with the beginning of each."""
  digest = hashlib.sha256()
  for file in sorted(pathlib.Path(path).expanduser().glob("*.safetensors")):
    with file.open("rb") as opened:
      digest.update(f"{file.name} {file.stat().st_size} ".encode())
      digest.update(opened.read(2**24))
  return f"{path} {digest.hexdigest()[:16]}"


def load_variables(
  path: str | os.PathLike,
  names: dict[str, str],
  abstract: Any,
) -> Any:
  """Reads weights into arrays of the given shapes, dtypes and shardings.

  Args:
    path: folder with `model.safetensors` or shards and their index.
    names: our paths to theirs (`HF_NAMES` of the family).
    abstract: `{"params": ...}` of ShapeDtypeStructs, with shardings or
      without (then on the first device).

  Returns:
    `{"params": ...}` of jax arrays. Each process reads only the layers and
    tensors its devices hold part of.

  Raises:
    CheckpointError: files missing or damaged, or tensors that do not fit; the
      message names both sides.
  """
  path = pathlib.Path(path)
  leaves = traverse.flatten_dict(abstract["params"], sep="/")
  with contextlib.ExitStack() as stack:
    files = _open_files(path, stack)
    _compare(path, leaves, names, files)
    loaded = {}
    for ours, leaf in leaves.items():
      read = _reader(path, ours, names[ours], leaf, files)
      sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
      )
      loaded[ours] = jax.make_array_from_callback(leaf.shape, sharding, read)
  return {"params": traverse.unflatten_dict(loaded, sep="/")}


def save_checkpoint(
  path: str | os.PathLike,
  module: types.ModuleType,
  config: Any,
  variables: Any,
  *,
  max_shard_bytes: int = 5 * 2**30,
  save_tokenizer: Callable[[str], None] | None = None,
  transform: Transform = lambda path, index, part: part,
) -> None:
  """Writes a folder that transformers, vLLM and this package load as it is.

  The folder appears under its name only when it is whole; one of that name
  that exists is replaced.

  Args:
    path: folder to write.
    module: family module (`HF_NAMES`, `config_to_hf`).
    config: the family's Config.
    variables: `{"params": ...}`, sharded or not.
    max_shard_bytes: start another safetensors file beyond this size.
    save_tokenizer: called with the folder to add tokenizer files.
    transform: what to write of (our path, index of the stacked axes, part of
      ours on the host).
  """
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  writes = jax.process_index() == 0
  if writes:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
  try:
    tensors = _hf_tensors(module, variables, transform)
    _write_folder(part, module, config, tensors, max_shard_bytes, writes)
    if writes and save_tokenizer:
      save_tokenizer(str(part))
  except BaseException:
    if writes:
      shutil.rmtree(part, ignore_errors=True)
    raise
  if writes:
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def _write_folder(part, module, config, tensors, max_shard_bytes, writes):
  shards, shard, size, dtype = [], {}, 0, "float32"
  for name, tensor in tensors:
    dtype = str(tensor.dtype)
    if size and size + tensor.nbytes > max_shard_bytes:
      shards.append(_write_shard(part, len(shards), shard) if writes else {})
      shard, size = {}, 0
    size += tensor.nbytes
    if writes:
      shard[name] = tensor
  if not writes:
    return
  shards.append(_write_shard(part, len(shards), shard))
  _name_shards(part, shards)
  hf = module.config_to_hf(config) | {"torch_dtype": dtype}
  (part / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def read_object(file: pathlib.Path) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    CheckpointError: there is none.
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


def _check_types(config: Any) -> None:
  """JSON holds what it likes; the model needs sizes, factors and switches."""
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), field.type
    if isinstance(kind, types.UnionType):  # or None
      if value is None:
        continue
      kind = kind.__args__[0]
    if kind is float:
      fits = type(value) in (int, float) and 0 < value < math.inf
    else:
      fits = type(value) is kind and (kind is not int or value > 0)
    if kind in _EXPECTED and not fits:
      raise ValueError(f"{field.name}={value!r} should be {_EXPECTED[kind]}")


_EXPECTED = {bool: "true or false", int: "a size", float: "above 0"}


def _open_files(path, stack) -> dict[str, Any]:
  """Opens all shards: tensor name -> the file that holds it."""
  index = path / _INDEX
  shards = [_SINGLE]
  if index.exists():
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
      raise CheckpointError(f"{index}: expected an object 'weight_map'")
    shards = sorted({*map(str, weight_map.values())})
    for shard in shards:
      if os.path.basename(shard) != shard:
        raise CheckpointError(f"{index}: {shard!r} leaves the folder")
  files = {}
  try:
    for shard in shards:
      opened = stack.enter_context(
        safetensors.safe_open(path / shard, framework="numpy")
      )
      files |= dict.fromkeys(opened.keys(), opened)
    return files
  except (OSError, ValueError, safetensors.SafetensorError) as e:
    raise CheckpointError(f"{path}: cannot read weights: {e}") from e


def _compare(path, leaves, names, files) -> None:
  wanted = {
    names[p].format(*index)
    for p, leaf in leaves.items()
    for index in layout.indices(names[p], leaf.shape)
  }
  # Some writers store buffers, or the tied output embedding, once more.
  harmless = {names["unembed"]}
  extra = {n for n in set(files) - wanted - harmless if "rotary_emb" not in n}
  missing = wanted - set(files)
  if missing or extra:
    raise CheckpointError(
      f"{path}: weights do not fit the config; missing: {_some(missing)};"
      f" unexpected: {_some(extra)}"
    )


def _some(names: set[str]) -> str:
  shown = sorted(names)[:4]
  more = len(names) - len(shown)
  return (", ".join(shown) or "none") + (f" and {more} more" if more else "")


def _reader(path, ours, name, leaf, files):
  stacked = layout.stacked_axes(name)
  one = leaf.shape[stacked:]

  def tensor(name):
    kind = files[name].get_slice(name).get_dtype()
    if kind not in _FLOATS:
      raise CheckpointError(
        f"{path}: {name} is of type {kind}, expected one of {_FLOATS}"
      )
    array = files[name].get_tensor(name)
    expected = layout.hf_shape(ours, one)
    if array.shape != expected:
      raise CheckpointError(
        f"{path}: {name} has shape {list(array.shape)}, the config asks for"
        f" {list(expected)}"
      )
    return layout.from_hf(ours, array, one).astype(leaf.dtype)

  def read(index):
    if not stacked:
      return tensor(name)[index]
    chosen = [
      range(n)[i] for n, i in zip(leaf.shape[:stacked], index[:stacked])
    ]
    parts = [
      tensor(name.format(*i))[index[stacked:]]
      for i in itertools.product(*chosen)
    ]
    return np.stack(parts).reshape(*map(len, chosen), *parts[0].shape)

  return read


def _hf_tensors(module, variables, transform):
  """Yields (their name, their tensor), one tensor on the host at a time."""
  for ours, leaf in traverse.flatten_dict(variables["params"], sep="/").items():
    name = module.HF_NAMES[ours]
    for index in layout.indices(name, leaf.shape):
      part = _to_host(leaf[index] if index else leaf)
      part = transform(ours, index, part)
      yield name.format(*index), layout.to_hf(ours, part)


def _to_host(array: jax.Array) -> np.ndarray:
  if array.is_fully_addressable:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(array, tiled=True)


def _write_shard(part, number, shard):
  file = part / f"shard-{number}"
  safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
  return {name: tensor.nbytes for name, tensor in shard.items()}


def _name_shards(part, shards) -> None:
  if len(shards) == 1:
    (part / "shard-0").rename(part / _SINGLE)
    return
  weight_map = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (part / f"shard-{i}").rename(part / file)
    weight_map |= dict.fromkeys(shard, file)
  total = sum(sum(shard.values()) for shard in shards)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (part / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
