"""Qwen 3, dense: heads of their own size, normalised queries and keys."""

import dataclasses
from typing import Any

from dpo_jax.models import decoder, hf_config, qwen2
from dpo_jax.models.decoder import Compute, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(
  norms=hf_config.PRE_NORMS | hf_config.QK_NORMS, biases="qkvo"
)
_ARCHITECTURE = "Qwen3ForCausalLM"
_DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False}


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
  """Shape of a Qwen 3 model."""

  rope_theta: float = 1_000_000.0
  norm_epsilon: float = 1e-6
  qk_norm: bool = True


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Qwen 3 `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  return Config(
    **hf_config.shared_fields(hf, activation="silu"),
    **hf_config.rope_fields(hf),
    **qwen2.window_fields(hf),
    attention_bias=hf["attention_bias"],
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  written = hf_config.write(config, "qwen3", _ARCHITECTURE)
  return (
    written
    | qwen2.write_window(config)
    | {"attention_bias": config.attention_bias}
  )
