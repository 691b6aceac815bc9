"""KTO: from thumbs up and thumbs down alone, no pairs."""

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput, check_range, unpaired_metrics
from dpo_jax.losses.registry import register


@register(paper="2402.01306")
def kto(
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  policy_kl_logps: jax.Array,
  reference_kl_logps: jax.Array,
  desirable: jax.Array,
  weights: jax.Array | None = None,
  *,
  beta: float = 0.1,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> LossOutput:
  """Kahneman-Tversky Optimization, Ethayarajh et al. 2024 (2402.01306), eq. 8.

      desirable:    lambda_D * (1 - sigmoid(beta * (h - z0)))
      undesirable:  lambda_U * (1 - sigmoid(beta * (z0 - h)))
      h  = log pi(y|x) - log ref(y|x)
      z0 = max(0, mean over the batch of log pi(y'|x) - log ref(y'|x))

  z0 estimates KL(pi || ref) from mismatched completions y', carries no
  gradient, and is shared by the whole batch: it sees the global batch, also
  under gradient accumulation, where other libraries take that of one device and
  microbatch. beta multiplies z0 as it does h.

  Args:
    policy_logps: f[N...].
    reference_logps: f[N...].
    policy_kl_logps: f[N...], of the mismatched completions.
    reference_kl_logps: f[N...].
    desirable: bool[N...].
    weights: f[N...], 0 where an entry holds no example and must not enter z0.
    beta: how sharply a reward saturates; larger keeps nearer to the reference.
    desirable_weight: lambda_D. The paper wants
      `lambda_D * n_D / (lambda_U * n_U)` in [1, 4/3] for n_D and n_U examples.
    undesirable_weight: lambda_U; larger counts disliked examples more.
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_range("desirable_weight", desirable_weight, 0.0, float("inf"))
  check_range("undesirable_weight", undesirable_weight, 0.0, float("inf"))
  desirable = desirable.astype(policy_logps.dtype)
  if weights is None:
    weights = jnp.ones_like(policy_logps)
  logratios = policy_logps - reference_logps
  kl = policy_kl_logps - reference_kl_logps
  kl = jnp.where(weights > 0, kl, 0.0) * weights
  count = weights.sum()
  z0 = jnp.maximum(0.0, kl.sum() / jnp.where(count > 0, count, 1.0))
  z0 = jax.lax.stop_gradient(z0)
  liked = desirable_weight * jax.nn.sigmoid(-beta * (logratios - z0))
  disliked = undesirable_weight * jax.nn.sigmoid(beta * (logratios - z0))
  rewards = beta * logratios
  metrics = unpaired_metrics(rewards, policy_logps, desirable)
  return LossOutput(
    desirable * liked + (1 - desirable) * disliked,
    metrics | {"kl": jnp.broadcast_to(z0, rewards.shape)},
  )
