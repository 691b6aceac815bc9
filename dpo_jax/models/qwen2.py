"""Qwen 2 and 2.5: biases on queries, keys and values; a window if switched on.

Qwen 3 reads and writes the same window settings.
"""

import dataclasses
from typing import Any

from dpo_jax.models import decoder, hf_config
from dpo_jax.models.decoder import Compute, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(norms=hf_config.PRE_NORMS, biases="qkv")
_ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS = {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
  """Shape of a Qwen 2 model."""

  rope_theta: float = 1_000_000.0
  norm_epsilon: float = 1e-6
  qkv_bias: bool = True


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Qwen 2 `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, DEFAULTS)
  return Config(
    **hf_config.shared_fields(hf, activation="silu"),
    **hf_config.rope_fields(hf),
    **window_fields(hf),
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  written = hf_config.write(config, "qwen2", _ARCHITECTURE)
  return written | write_window(config)


def window_fields(hf: dict[str, Any]) -> dict[str, Any]:
  """`window` and `local` of Config; a window that is not in use is none."""
  window = hf["sliding_window"] if hf["use_sliding_window"] else None
  first = hf["max_window_layers"]
  local = hf_config.local_layers(
    hf,
    [window is not None and i >= first for i in range(hf["num_hidden_layers"])],
  )
  return {"window": window if any(local) else None, "local": local}


def write_window(config: decoder.Config) -> dict[str, Any]:
  """The entries that `window_fields` reads back. `max_window_layers` is for
  versions of transformers that know no `layer_types`."""
  local = config.local
  return {
    "use_sliding_window": config.window is not None,
    "sliding_window": config.window,
    "max_window_layers": local.index(True) if any(local) else len(local),
    "layer_types": hf_config.write_layer_types(config),
  }
