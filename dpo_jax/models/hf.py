"""Model families, and their checkpoints in Hugging Face layout: no torch.

What a folder's `config.json` says, and the two functions that move weights.
"""

import dataclasses
import hashlib
import importlib
import math
import os
import pathlib
import types
from typing import Any

from dpo_jax.errors import CheckpointError
from dpo_jax.models.hf_files import open_file, read_object
from dpo_jax.models.hf_fit import as_stored
from dpo_jax.models.hf_read import load_variables
from dpo_jax.models.hf_write import save_checkpoint

__all__ = [
  "FAMILIES",
  "as_stored",
  "family",
  "fingerprint",
  "load_variables",
  "read_config",
  "read_object",
  "save_checkpoint",
]

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
    _check_depth(hf.get("num_hidden_layers"))
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


_MOST_LAYERS = 10_000
_SEEN = 4096  # bytes at each end of a tensor that tell it from another


def fingerprint(path: str | os.PathLike) -> str:
  """Tells weights apart without reading all of them: names, shapes, and the
  first and the last kilobytes of every tensor; of adapters their config too.

  Raises:
    CheckpointError: a file is damaged.
  """
  folder = pathlib.Path(path).expanduser()
  digest = hashlib.sha256()
  for file in sorted(folder.glob("*.safetensors")):
    for name, stored in sorted(open_file(file).items()):
      digest.update(f"{name} {stored.dtype} {stored.shape} ".encode())
      digest.update(
        stored.data[stored.begin : min(stored.end, stored.begin + _SEEN)]
      )
      digest.update(
        stored.data[max(stored.begin, stored.end - _SEEN) : stored.end]
      )
  adapter = folder / "adapter_config.json"
  if adapter.exists():
    digest.update(adapter.read_bytes())
  return f"{path} {digest.hexdigest()[:16]}"


def _check_depth(layers: Any) -> None:
  """Families list what is special of each layer, which costs memory."""
  if isinstance(layers, int) and layers > _MOST_LAYERS:
    raise ValueError(f"num_hidden_layers={layers} is beyond {_MOST_LAYERS}")


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
