"""Reward modelling: Bradley-Terry on scores."""

import jax

from dpo_jax.losses.base import LossOutput, binary_nll, check_range
from dpo_jax.losses.registry import register


@register(paper="2203.02155", aggregation="scores")
def reward(
  chosen_scores: jax.Array,
  rejected_scores: jax.Array,
  preference_margins: jax.Array | None = None,
  *,
  centering: float = 0.0,
) -> LossOutput:
  """Reward model by Bradley-Terry maximum likelihood, as in Ouyang et al. 2022
  (2203.02155), eq. 1.

      -log sigmoid(s_w - s_l - m) + centering * (s_w + s_l)^2

  The margin m per pair is that of Llama 2 (2307.09288), larger for clearer
  preferences. Scores are known up to a constant a prompt only; centering
  (2312.09244) pulls their sum to 0. DPO is this loss with
  s = beta * log(pi / ref).

  Args:
    chosen_scores: f[...].
    rejected_scores: f[...].
    preference_margins: f[...]; None is 0.
    centering: 0.01 is usual; larger holds scores nearer to 0.
  """
  check_range("centering", centering, 0.0, float("inf"))
  difference = chosen_scores - rejected_scores
  margins = 0.0 if preference_margins is None else preference_margins
  centre = centering * (chosen_scores + rejected_scores) ** 2
  return LossOutput(
    binary_nll(difference - margins) + centre,
    {
      "rewards/chosen": chosen_scores,
      "rewards/rejected": rejected_scores,
      "rewards/margins": difference,
      "rewards/accuracies": 0.5 * (1.0 + jax.numpy.sign(difference)),
    },
  )
