"""Supervised fine-tuning: the stage before preferences, and a term in some."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput, register


@register
def sft(
  policy_chosen_logps: jax.Array, chosen_lengths: jax.Array
) -> LossOutput:
  """Negative log-likelihood of the (chosen) response, mean over tokens.

      -sum_i log pi(y_i | x_i) / sum_i |y_i|

  Every response token of the batch counts alike, as in any language-model
  trainer: the loss of an example is its mean over tokens, and its weight in
  the batch's mean is its number of tokens.

  Args:
    policy_chosen_logps: f[...].
    chosen_lengths: f[...].
  """
  nll = -policy_chosen_logps / jnp.maximum(chosen_lengths, 1)
  return LossOutput(
    nll, {"logps/chosen": policy_chosen_logps}, weights=chosen_lengths
  )
