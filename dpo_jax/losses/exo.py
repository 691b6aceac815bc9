"""EXO: the reverse KL to the preference distribution of a pair."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput, check_range, pair_metrics
from dpo_jax.losses.registry import register


@register(paper="2402.00856", divergences=True)
def exo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  *,
  beta: float = 0.1,
  label_smoothing: float = 1e-3,
) -> LossOutput:
  """Efficient Exact Optimization, Ji et al. 2024 (2402.00856), eq. 16, K = 2.

      KL(q || p) = q (log q - log(1-e)) + (1-q) (log(1-q) - log e),
      q = sigmoid(beta * (h_w - h_l)),   h = log pi(y|x) - log ref(y|x)

  DPO takes the KL in the other direction, `KL(p || q)`; this one seeks a mode.
  p is never 0 or 1, so e must be positive: at e = 0 TRL before 0.29 silently
  took 1e-3 and later raises.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    beta: the paper's beta_pi; larger keeps nearer to the reference.
    label_smoothing: e in (0, 0.5], probability that the label is wrong; the
      larger, the smaller the margin log((1-e)/e) at the optimum.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("label_smoothing", label_smoothing, 1e-12, 0.5)
  chosen = beta * (policy_chosen_logps - reference_chosen_logps)
  rejected = beta * (policy_rejected_logps - reference_rejected_logps)
  margins = chosen - rejected
  log_p, log_not_p = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)
  loss = jax.nn.sigmoid(margins) * (jax.nn.log_sigmoid(margins) - log_p)
  loss += jax.nn.sigmoid(-margins) * (jax.nn.log_sigmoid(-margins) - log_not_p)
  return LossOutput(
    loss,
    pair_metrics(chosen, rejected, policy_chosen_logps, policy_rejected_logps),
  )
