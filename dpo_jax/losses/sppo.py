"""SPPO: self-play, each log-ratio pulled to its own target."""

import jax

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2405.00675")
def sppo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 1e-3,
) -> LossOutput:
  """Self-Play Preference Optimization, Wu et al. 2024 (2405.00675), eq. 4.7.

      (h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2,
      h = log pi(y|x) - log ref(y|x)

  With win probabilities 1 and 0 ("hard"); the paper's soft ones need a
  preference model outside. TRL's name is `sppo_hard`; the authors' code has
  half of it. The reference is meant to be the policy of the round before.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: one over the paper's eta (1000). Larger asks for smaller log-ratios.
  """
  check_range("beta", beta, 1e-9, float("inf"))
  chosen = policy_chosen_logps - reference_chosen_logps
  rejected = policy_rejected_logps - reference_rejected_logps
  target = 1 / (2 * beta)
  return LossOutput(
    (chosen - target) ** 2 + (rejected + target) ** 2,
    pair_metrics(
      beta * chosen, beta * rejected, policy_chosen_logps, policy_rejected_logps
    ),
  )
