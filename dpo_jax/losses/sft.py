"""Supervised fine-tuning: the stage before preferences, and a term in some."""

import jax

from dpo_jax.losses.base import LossOutput, mean_logps
from dpo_jax.losses.registry import register


@register(aggregation="mean")
def sft(
  policy_chosen_logps: jax.Array, chosen_lengths: jax.Array
) -> LossOutput:
  """Negative log-likelihood of the (chosen) response, mean over tokens.

      -sum_i log pi(y_i | x_i) / sum_i |y_i|

  Every response token of the batch counts alike, as in any language-model
  trainer: the loss of an example is its mean over tokens, and its weight in
  the batch's mean is its number of tokens. It keeps that mean as a term of a
  mixture ("dpo+sft"), as in TRL; the papers of RPO (2404.19733) and MPO
  (2411.10442) take the mean over examples of means over tokens.

  Args:
    policy_chosen_logps: f[...].
    chosen_lengths: f[...].
  """
  nll = -mean_logps(policy_chosen_logps, chosen_lengths)
  return LossOutput(
    nll, {"logps/chosen": policy_chosen_logps}, weights=chosen_lengths
  )
