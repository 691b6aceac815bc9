"""Gemma 3, the text model: five local layers to a global one, each kind with
its own rotary base; normalised queries and keys."""

import dataclasses
from typing import Any

from dpo_jax.models import decoder, gemma2, hf_config
from dpo_jax.models.decoder import Compute, Decoder
from dpo_jax.models.rope import RopeScaling, rope_from_hf, rope_scaling_to_hf

__all__ = ["HF_NAMES", "Compute", "Config", "Model", "config_from_hf"]

Model = Decoder
HF_NAMES = hf_config.names(
  norms=gemma2.NORMS | hf_config.QK_NORMS, biases="qkvo"
)
_ARCHITECTURE = "Gemma3ForCausalLM"
_DEFAULTS = gemma2.DEFAULTS | {
  "max_position_embeddings": 131_072,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "sliding_window_pattern": 6,
}
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
  """Shape of a Gemma 3 model."""

  rope_theta: float = _THETA
  norm_epsilon: float = 1e-6
  tied: bool = True
  activation: str = gemma2.ACTIVATION
  qk_norm: bool = True
  window: int | None = 512
  local: tuple[bool, ...] = (True,) * 5 + (False,)
  local_rope_theta: float | None = _LOCAL_THETA
  norm_plus_one: bool = True
  post_norms: bool = True
  scaled_embed: bool = True


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a Gemma 3 `config.json` in the style of transformers 4 or 5.

  Raises:
    KeyError: a size is missing.
    ValueError: something that this family does not have.
  """
  hf = hf_config.read(hf, _ARCHITECTURE, _DEFAULTS)
  if hf["attn_logit_softcapping"] is not None:
    # transformers reads it and does not use it.
    raise ValueError("attn_logit_softcapping is not supported")
  every = hf["sliding_window_pattern"]
  if type(every) is not int or every < 1:
    raise ValueError(f"sliding_window_pattern={every!r} should be above 0")
  pattern = [(i + 1) % every != 0 for i in range(hf["num_hidden_layers"])]
  return Config(
    **gemma2.shared_fields(hf),
    **_rope_fields(hf),
    local=hf_config.local_layers(hf, pattern),
  )


def _rope_fields(hf):
  """Version 5 nests the settings of each kind of layer; version 4 has
  `rope_scaling` for global layers, and local ones are never scaled."""
  nested = hf.get("rope_parameters") or {}
  odd = set(nested) - {hf_config.GLOBAL, hf_config.LOCAL}
  if odd:
    raise ValueError(
      f"rope_parameters of {min(odd)!r}; expected those of"
      f" {hf_config.GLOBAL!r} and {hf_config.LOCAL!r}"
    )
  far = dict(nested.get(hf_config.GLOBAL) or {})
  far |= hf.get("rope_scaling") or {}
  far.setdefault("rope_theta", hf.get("rope_theta", _THETA))
  near = dict(nested.get(hf_config.LOCAL) or {})
  near.setdefault("rope_theta", hf.get("rope_local_base_freq", _LOCAL_THETA))
  theta, scaling = rope_from_hf({"rope_parameters": far})
  local_theta, local_scaling = rope_from_hf({"rope_parameters": near})
  return {
    "rope_theta": theta,
    "rope_scaling": scaling,
    "local_rope_theta": local_theta,
    "local_rope_scaling": local_scaling,
  }


def config_to_hf(config: Config) -> dict[str, Any]:
  """The `config.json` that transformers 4 and 5 both read; scaled local layers
  are for version 5 alone."""
  written = gemma2.write(config, "gemma3_text", _ARCHITECTURE) | {
    "attn_logit_softcapping": None,
    "rope_local_base_freq": config.local_rope_theta,
  }
  every = (*config.local, False).index(False) + 1
  if config.local == tuple((i + 1) % every != 0 for i in range(config.layers)):
    # For versions of transformers that know no `layer_types`.
    written["sliding_window_pattern"] = every
  if config.local_rope_scaling != RopeScaling():
    near = rope_scaling_to_hf(config.local_rope_scaling)
    near["rope_theta"] = config.local_rope_theta
    far = rope_scaling_to_hf(config.rope_scaling) or {"rope_type": "default"}
    far["rope_theta"] = config.rope_theta
    written["rope_parameters"] = {hf_config.LOCAL: near, hf_config.GLOBAL: far}
  return written
