"""IPO: a squared loss on the log-ratio gap, which stays bounded."""

import jax

from dpo_jax.losses.base import (
  LossOutput,
  check_choice,
  check_range,
  mean_logps,
  pair_metrics,
)
from dpo_jax.losses.registry import register


@register(paper="2310.12036", aggregation="sum or mean", divergences=True)
def ipo(
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
  reference_chosen_logps: jax.Array,
  reference_rejected_logps: jax.Array,
  chosen_lengths: jax.Array | None = None,
  rejected_lengths: jax.Array | None = None,
  *,
  beta: float = 0.1,
  average: str = "sum",
) -> LossOutput:
  """Identity Preference Optimization, Azar et al. 2023 (2310.12036), eq. 17.

      (h_w - h_l - 1/(2 beta))^2,   h = log pi(y|x) - log ref(y|x)

  The paper's log-probs are those of whole responses: `average="sum"`. TRL and
  HALOs divide each h by its response's length: `average="tokens"`, where the
  target gap 1/(2 beta) is one per token and needs a beta of its own.

  Args:
    policy_chosen_logps: f[...].
    policy_rejected_logps: f[...].
    reference_chosen_logps: f[...].
    reference_rejected_logps: f[...].
    chosen_lengths: f[...], read only by `average="tokens"`.
    rejected_lengths: f[...], likewise.
    beta: the paper's tau. A larger beta asks for a smaller gap.
    average: "sum" or "tokens".
  """
  check_range("beta", beta, 1e-9, float("inf"))
  check_choice("average", average, "sum", "tokens")
  chosen = policy_chosen_logps - reference_chosen_logps
  rejected = policy_rejected_logps - reference_rejected_logps
  metrics = pair_metrics(
    beta * chosen, beta * rejected, policy_chosen_logps, policy_rejected_logps
  )
  if average == "tokens":
    if chosen_lengths is None or rejected_lengths is None:
      raise ValueError(
        "average='tokens' needs chosen_lengths and rejected_lengths"
      )
    chosen = mean_logps(chosen, chosen_lengths)
    rejected = mean_logps(rejected, rejected_lengths)
  return LossOutput((chosen - rejected - 1 / (2 * beta)) ** 2, metrics)
