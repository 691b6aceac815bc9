"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

What would make another model of the same tensors (DoRA, adapters of embeddings,
modules that were trained beside them) is refused by name.
"""

import json
import os
import pathlib
from typing import Any

import flax.traverse_util as traverse
import numpy as np
import safetensors
import safetensors.numpy

from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf, layout
from dpo_jax.models.hf_write import whole_folder
from dpo_jax.models.lora import Lora, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = {"a": "lora_A", "b": "lora_B"}
# Read, or of no consequence for what the tensors mean. Every other entry says
# something only where it is set.
_KNOWN = (
  "peft_type", "task_type", "auto_mapping", "base_model_name_or_path",
  "revision", "inference_mode", "peft_version", "r", "lora_alpha",
  "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
  "layers_pattern", "init_lora_weights", "megatron_core", "runtime_config",
  "loftq_config", "eva_config", "corda_config", "qalora_group_size",
  "ensure_weight_tying",
)  # fmt: skip
_NOTHING = (None, False, "", "none", [], {})
# Beginnings that leave the base as it is; others change it as well, and the
# tensors go with the changed one.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_config(path: str | os.PathLike) -> Lora:
  """Reads `adapter_config.json`; its targets are left to the tensors.

  Raises:
    CheckpointError: no such file, or a kind of adapter that is not known here.
  """
  file = pathlib.Path(path).expanduser() / CONFIG
  if not file.is_file():
    nested = (file.parent / "adapter" / CONFIG).is_file()
    hint = f"; there is one in {file.parent / 'adapter'}" if nested else ""
    raise CheckpointError(
      f"{file}: no such file; expected an adapter's folder, of PEFT{hint}"
    )
  config = hf.read_object(file)
  kind = config.get("peft_type")
  if kind != "LORA":
    raise CheckpointError(f"{file}: peft_type {kind!r}; known: 'LORA'")
  for key, value in config.items():
    if key not in _KNOWN and value not in _NOTHING:
      raise CheckpointError(f"{file}: {key}={value!r} is not supported")
  start = config.get("init_lora_weights")
  if start not in _STARTS:
    raise CheckpointError(
      f"{file}: init_lora_weights={start!r} changes the weights below the"
      " adapter as well, which is not supported"
    )
  rank, alpha = config.get("r"), config.get("lora_alpha")
  dropout = config.get("lora_dropout", 0.0)
  rslora = config.get("use_rslora", False)
  if type(rank) is not int or rank < 1:
    raise CheckpointError(f"{file}: r={rank!r} should be a number from 1 on")
  for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
      raise CheckpointError(f"{file}: {key}={value!r} should be a number")
  if alpha == 0:
    raise CheckpointError(f"{file}: lora_alpha={alpha} should be above 0")
  if type(rslora) is not bool:
    raise CheckpointError(
      f"{file}: use_rslora={rslora!r} should be true or false"
    )
  if dropout >= 1:
    raise CheckpointError(f"{file}: lora_dropout={dropout} should be below 1")
  return Lora(rank, float(alpha), (), float(dropout), rslora)


def read(
  path: str | os.PathLike, names: dict[str, str], params: Tree, lora: Lora
) -> Tree:
  """Reads adapters, on the host.

  Args:
    path: folder of the adapter.
    names: our paths to theirs (`HF_NAMES` of the family).
    params: of the model they belong to, arrays or shapes.
    lora: what `read_config` said of the same folder.

  Returns:
    The collection `lora`, numpy arrays.

  Raises:
    CheckpointError: damaged, or not of this model.
  """
  file = pathlib.Path(path).expanduser() / WEIGHTS
  try:
    tensors = safetensors.numpy.load_file(file)
  except (OSError, safetensors.SafetensorError) as e:
    raise CheckpointError(f"{file}: cannot read adapters: {e}") from e
  except KeyError as e:  # a dtype that numpy has not
    raise CheckpointError(f"{file}: a tensor is of type {e}") from e
  made, used = {}, set()
  for path_, leaf in traverse.flatten_dict(params, sep="/").items():
    where = path_.removesuffix("/kernel")
    mine = [_names(names[path_], side) for side in _SIDES]
    indices = list(layout.indices(names[path_], leaf.shape))
    if where == path_ or not any(
      n.format(*i) in tensors for n in mine for i in indices
    ):
      continue
    stacked = layout.stacked_axes(names[path_])
    shapes = _shapes(path_, leaf.shape[stacked:], lora.rank)
    for side, name, shape in zip(_SIDES, mine, shapes):
      parts = []
      for index in indices:
        theirs = name.format(*index)
        used.add(theirs)
        parts.append(_part(file, tensors, theirs, f"{where}/{side}", shape))
      stack = np.stack(parts).reshape(*leaf.shape[:stacked], *shape)
      made[f"{where}/{side}"] = stack
    layers = leaf.shape[0]
    made[f"{where}/scale"] = np.full(layers, lora.scale, np.float32)
    made[f"{where}/dropout"] = np.full(layers, lora.dropout, np.float32)
  if unknown := sorted(tensors.keys() - used):
    raise CheckpointError(
      f"{file}: {unknown[0]} (of {len(unknown)}) belongs to nothing in this"
      " model that can have an adapter"
    )
  if not made:
    raise CheckpointError(f"{file}: no tensors in it")
  return traverse.unflatten_dict(made, sep="/")


def save(
  path: str | os.PathLike,
  names: dict[str, str],
  adapters: Tree,
  lora: Lora,
  base: str = "",
) -> None:
  """Writes a folder that `PeftModel.from_pretrained` and `read` load.

  Args:
    path: folder, replaced if it exists.
    names: our paths to theirs (`HF_NAMES` of the family).
    adapters: the collection `lora`, arrays that this process can read.
    lora: what they are.
    base: path of the model they belong to, for whoever loads them.
  """
  tensors, modules = {}, set()
  for ours, leaf in traverse.flatten_dict(adapters, sep="/").items():
    where, _, side = ours.rpartition("/")
    if side not in _SIDES:
      continue
    name = names[f"{where}/kernel"]
    modules.add(name.split(".")[-2])
    for index in layout.indices(name, leaf.shape):
      tensor = layout.to_hf(ours, np.asarray(leaf[index]))
      tensors[_names(name, side).format(*index)] = tensor
  # Not by safetensors' own save_file, which has no OSError for a full disk.
  weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  text = json.dumps(_config(lora, sorted(modules), base), indent=2)
  with whole_folder(path) as part:
    (part / WEIGHTS).write_bytes(weights)
    (part / CONFIG).write_text(text + "\n", encoding="utf-8")


def _config(lora: Lora, modules: list[str], base: str) -> dict[str, Any]:
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout,
    "use_rslora": lora.rslora,
    "target_modules": modules,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
  }


def _names(kernel: str, side: str) -> str:
  """Their name of an adapter's side, from that of the weight it goes with."""
  return f"{_PREFIX}{kernel.removesuffix('.weight')}.{_SIDES[side]}.weight"


def _shapes(path, kernel, rank):
  """Shapes of a and b, the stacked axes aside."""
  inputs = layout.input_axes(path)
  return (*kernel[:inputs], rank), (rank, *kernel[inputs:])


def _part(file, tensors, name, ours, shape):
  if name not in tensors:
    raise CheckpointError(f"{file}: {name} is missing, of all layers")
  expected = layout.hf_shape(ours, shape)
  tensor = tensors[name]
  if tensor.shape != expected:
    raise CheckpointError(
      f"{file}: {name} has shape {list(tensor.shape)}, expected"
      f" {list(expected)}"
    )
  return layout.from_hf(ours, tensor, shape).astype(np.float32)
