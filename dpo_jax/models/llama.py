"""The Llama family: Llama 2 and 3, and what is shaped like them."""

from typing import Any

from dpo_jax.models import hf_config
from dpo_jax.models.decoder import Compute, Config, Decoder

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder  # the name that every family module has
HF_NAMES = hf_config.names(norms=hf_config.PRE_NORMS, biases="qkvogud")
_ARCHITECTURE = "LlamaForCausalLM"
_DEFAULTS = {
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Llama `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  return Config(
    **hf_config.shared_fields(hf, activation="silu"),
    **hf_config.rope_fields(hf),
    attention_bias=hf["attention_bias"],
    mlp_bias=hf["mlp_bias"],
  )


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read."""
  return hf_config.write(config, "llama", _ARCHITECTURE) | {
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
  }
