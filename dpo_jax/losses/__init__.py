"""Preference losses as pure functions of log-probs; needs jax alone.

>>> from dpo_jax import losses
>>> out = losses.dpo(pi_w, pi_l, ref_w, ref_l, beta=0.1)  # per example
>>> loss = out.loss.mean()

`make(name, **options)` gives the same by name, for configs and sweeps.
"""

from dpo_jax.losses.base import (
  INPUTS,
  Loss,
  LossOutput,
  Sums,
  Weighted,
  defaults,
  make,
  names,
  pair_metrics,
  reduce,
  register,
)
from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.ipo import ipo
from dpo_jax.losses.kto import kto
from dpo_jax.losses.orpo import log_odds, orpo
from dpo_jax.losses.sft import sft

__all__ = [
  "INPUTS",
  "Loss",
  "LossOutput",
  "Sums",
  "Weighted",
  "defaults",
  "dpo",
  "ipo",
  "kto",
  "log_odds",
  "make",
  "names",
  "orpo",
  "pair_metrics",
  "reduce",
  "register",
  "sft",
]
