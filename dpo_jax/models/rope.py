"""Rotary position embedding, its scaling, and how config files spell it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of low frequencies (`rope_type: llama3`), or a plain
  division of all positions by `factor` (`rope_type: linear`)."""

  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling
) -> np.ndarray:
  """Inverse wavelengths of the rotary embedding: f32[h / 2].

  Raises:
    ValueError: unknown kind of scaling.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  freqs = (1.0 / theta**exponents).astype(np.float32)
  if scaling.kind == "default":
    return freqs
  if scaling.kind == "linear":
    return (freqs / scaling.factor).astype(np.float32)
  if scaling.kind == "llama3":
    wavelengths = 2 * np.pi / freqs
    # 1 where a wavelength is short against the original context (kept as it
    # is), 0 where it is long (divided by the factor), linear in between.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_length / wavelengths - low) / (high - low)
    kept = np.clip(kept, 0.0, 1.0)
    return (freqs * (kept + (1 - kept) / scaling.factor)).astype(np.float32)
  raise ValueError(
    f"rope scaling {scaling.kind!r} is not supported; known: default, linear,"
    " llama3"
  )


def apply_rope(
  x: jax.Array, positions: jax.Array, freqs: jax.Array
) -> jax.Array:
  """Rotates halves of each head (the convention of Hugging Face weights).

  Args:
    x: f[B T H h].
    positions: i32[B T].
    freqs: f32[h / 2].
  """
  angles = positions[..., None, None].astype(jnp.float32) * freqs
  sin, cos = jnp.sin(angles), jnp.cos(angles)  # f32[B T 1 h/2]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def rope_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling]:
  """Base and scaling from a `config.json` of transformers 4 or 5.

  Version 5 nests all in `rope_parameters`; version 4 has `rope_theta` beside
  `rope_scaling`, whose kind is under `rope_type` or, older, `type`. Where both
  are, both versions read the older one.

  Raises:
    ValueError: a kind of scaling that is not known here; a guess would give a
      model that runs and is wrong.
  """
  found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  for name, value in found.items():
    if isinstance(value, dict):
      raise ValueError(
        f"rope parameters of {name!r} layers, in a family whose layers all"
        " have the same"
      )
  part = found.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
  if part not in (None, 1):
    raise ValueError(f"partial_rotary_factor={part}; only 1 is supported")
  theta = float(found.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
  kind = found.get("rope_type") or found.get("type") or "default"
  if kind not in ("default", "linear", "llama3"):
    raise ValueError(
      f"rope type {kind!r} is not supported; known: default, linear, llama3"
    )
  if kind == "default":
    return theta, RopeScaling()
  if kind == "linear":
    return theta, RopeScaling("linear", float(found["factor"]))
  return theta, RopeScaling(
    "llama3",
    float(found["factor"]),
    float(found["low_freq_factor"]),
    float(found["high_freq_factor"]),
    int(found["original_max_position_embeddings"]),
  )


def rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
  """The `rope_scaling` entry that `rope_from_hf` reads back."""
  if scaling.kind == "default":
    return None
  entry = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    entry["low_freq_factor"] = scaling.low_freq_factor
    entry["high_freq_factor"] = scaling.high_freq_factor
    entry["original_max_position_embeddings"] = scaling.original_length
  return entry
