"""Mistral 7B and its like: Llama, of which all layers may have a window."""

from typing import Any

from dpo_jax.models import hf_config
from dpo_jax.models.decoder import Compute, Config, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(norms=hf_config.PRE_NORMS)
_ARCHITECTURE = "MistralForCausalLM"
_DEFAULTS = {
  "num_key_value_heads": 8,
  "max_position_embeddings": 4096 * 32,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "sliding_window": 4096,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Mistral `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  return Config(
    **hf_config.shared_fields(hf, activation="silu"),
    **hf_config.rope_fields(hf),
    **hf_config.one_window(hf, hf["sliding_window"]),
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  written = hf_config.write(config, "mistral", _ARCHITECTURE)
  return written | {"sliding_window": config.window}
