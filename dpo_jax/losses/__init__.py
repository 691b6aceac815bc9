"""Preference losses as pure functions of log-probs; needs jax alone.

>>> from dpo_jax import losses
>>> out = losses.dpo(pi_w, pi_l, ref_w, ref_l, beta=0.1)  # per example
>>> loss = out.loss.mean()  # `reduce(out)["loss"].mean()` for any loss

`make(name, **options)` gives the same by name, for configs and sweeps, and
mixtures and modifiers of them; `describe()` prints all there are. What learns
from answers of its own (PPO, GRPO) works token by token and is not among them:
`ppo_policy`, `ppo_value`, `grpo`, and the rewards and advantages they take.
"""

from dpo_jax.losses.alphapo import alphapo
from dpo_jax.losses.aot import aot
from dpo_jax.losses.aot_unpaired import aot_unpaired
from dpo_jax.losses.apo_down import apo_down
from dpo_jax.losses.apo_zero import apo_zero
from dpo_jax.losses.apo_zero_unpaired import apo_zero_unpaired
from dpo_jax.losses.base import (
  INPUTS,
  LossOutput,
  Sums,
  Weighted,
  binary_nll,
  pair_metrics,
  reduce,
  unpaired_metrics,
)
from dpo_jax.losses.bco import bco
from dpo_jax.losses.bco_pair import bco_pair
from dpo_jax.losses.cpo import cpo
from dpo_jax.losses.cpo_simpo import cpo_simpo
from dpo_jax.losses.describe import describe, table
from dpo_jax.losses.discopop import discopop
from dpo_jax.losses.divergences import DIVERGENCES, divergence_score
from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.dpop import dpop
from dpo_jax.losses.exo import exo
from dpo_jax.losses.gae import gae, whiten
from dpo_jax.losses.grpo import group_advantages, grpo, token_sums
from dpo_jax.losses.hinge import hinge
from dpo_jax.losses.ipo import ipo
from dpo_jax.losses.kl import adapt, kl_estimate
from dpo_jax.losses.kto import kto
from dpo_jax.losses.ld import desensitize, tail_logps
from dpo_jax.losses.loss import Loss, Term
from dpo_jax.losses.making import defaults, make, mix
from dpo_jax.losses.nca import nca
from dpo_jax.losses.orpo import log_odds, orpo
from dpo_jax.losses.plackett_luce import plackett_luce
from dpo_jax.losses.ppo import ppo_policy, ppo_value, shaped_rewards
from dpo_jax.losses.r_dpo import r_dpo
from dpo_jax.losses.registry import MODIFIERS, names, register
from dpo_jax.losses.reward import reward
from dpo_jax.losses.robust import robust
from dpo_jax.losses.sft import sft
from dpo_jax.losses.sigmoid_norm import sigmoid_norm
from dpo_jax.losses.simpo import simpo
from dpo_jax.losses.slic import slic
from dpo_jax.losses.sppo import sppo
from dpo_jax.losses.tpo import tpo
from dpo_jax.losses.tpo_l import tpo_l
from dpo_jax.losses.tr_dpo import mix_reference
from dpo_jax.losses.wpo import confidence, wpo_weights

__all__ = [
  "DIVERGENCES",
  "INPUTS",
  "MODIFIERS",
  "Loss",
  "LossOutput",
  "Sums",
  "Term",
  "Weighted",
  "adapt",
  "alphapo",
  "aot",
  "aot_unpaired",
  "apo_down",
  "apo_zero",
  "apo_zero_unpaired",
  "bco",
  "bco_pair",
  "binary_nll",
  "confidence",
  "cpo",
  "cpo_simpo",
  "defaults",
  "describe",
  "desensitize",
  "discopop",
  "divergence_score",
  "dpo",
  "dpop",
  "exo",
  "gae",
  "group_advantages",
  "grpo",
  "hinge",
  "ipo",
  "kl_estimate",
  "kto",
  "log_odds",
  "make",
  "mix",
  "mix_reference",
  "names",
  "nca",
  "orpo",
  "pair_metrics",
  "plackett_luce",
  "ppo_policy",
  "ppo_value",
  "r_dpo",
  "reduce",
  "register",
  "reward",
  "robust",
  "sft",
  "shaped_rewards",
  "sigmoid_norm",
  "simpo",
  "slic",
  "sppo",
  "table",
  "tail_logps",
  "token_sums",
  "tpo",
  "tpo_l",
  "unpaired_metrics",
  "whiten",
  "wpo_weights",
]
