"""NCA: noise contrastive alignment, which holds the chosen response up."""

import jax
from jax.nn import log_sigmoid

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2402.05369")
def nca(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.01,
) -> LossOutput:
  """Noise Contrastive Alignment, Chen et al. 2024 (2402.05369), K = 2.

      -log sigmoid(r_w) - 1/2 (log sigmoid(-r_w) + log sigmoid(-r_l)),
      r = beta * (log pi(y|x) - log ref(y|x))

  It sees each reward by itself and not only their difference, which keeps the
  chosen response from losing probability. TRL's name is `nca_pair`; its default
  beta is 0.1.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: larger keeps nearer to the reference.
  """
  check_range("beta", beta, 0.0, float("inf"))
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  noise = 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))
  return LossOutput(
    -log_sigmoid(chosen) - noise,
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
