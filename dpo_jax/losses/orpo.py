"""ORPO: supervised fine-tuning with an odds-ratio penalty, no reference."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import (
  LossOutput,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


def log_odds(mean_logps: jax.Array) -> jax.Array:
  """log(p / (1 - p)) of p = exp(mean_logps), in log space; f[...] -> f[...].

  p = 1 has infinite odds. The log-prob is therefore held below minus one
  machine epsilon, where the log odds are 16 in float32, with zero gradient
  from there on; log-probs a rounding above 0 fall into the same case.
  """
  epsilon = jnp.finfo(mean_logps.dtype).eps
  m = jnp.minimum(mean_logps, -epsilon)
  # log(1 - exp(m)): expm1 is exact near 0, log1p is exact far from it. Both
  # branches get arguments inside their domain, so that no gradient is NaN.
  near = m > -0.6931472
  small = jnp.where(near, m, -1.0)
  large = jnp.where(near, -1.0, m)
  log1mexp = jnp.where(
    near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large))
  )
  return m - log1mexp


@register(paper="2403.07691", aggregation="mean")
def orpo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  chosen_lengths: jax.Array,
  rejected_lengths: jax.Array,
  *,
  lam: float = 0.1,
) -> LossOutput:
  """Odds Ratio Preference Optimization, Hong et al. 2024 (2403.07691), eq. 6-7.

      NLL(y_w|x) - lam * log sigmoid(log odds(y_w|x) - log odds(y_l|x))
      odds(y|x) = P / (1 - P),   P = exp(log pi(y|x) / |y|)

  The log-sigmoid enters with a minus, as in eq. 7: maximising the odds ratio
  lowers the loss. P is the length-normalised probability of eq. 3. The NLL is
  the mean over the chosen response's tokens (eq. 2), each example counting
  once; TRL instead takes the mean over all tokens of the batch and includes
  the prompt.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    chosen_lengths: f[...].
    rejected_lengths: f[...].
    lam: the paper's lambda, TRL's `beta`; larger weighs the preference more
      against imitation of the chosen response.
  """
  check_range("lam", lam, 0.0, float("inf"))
  chosen = mean_logps(policy_chosen_logps, chosen_lengths)
  rejected = mean_logps(policy_rejected_logps, rejected_lengths)
  log_odds_ratio = log_odds(chosen) - log_odds(rejected)
  log_ratio = jax.nn.log_sigmoid(log_odds_ratio)
  metrics = pair_metrics(
    lam * chosen, lam * rejected, policy_chosen_logps, policy_rejected_logps
  )
  metrics["nll_loss"] = -chosen
  metrics["log_odds_ratio"] = log_ratio
  metrics["log_odds_chosen"] = log_odds_ratio
  return LossOutput(-chosen - lam * log_ratio, metrics)
