"""Evaluation of an online run: one answer to each held-out prompt, always with
the same random numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dpo_jax import metrics
from dpo_jax.online.methods import Scorer, told
from dpo_jax.online.packing import Packer
from dpo_jax.online.prompts import PromptPlan
from dpo_jax.online.rollout import Roller
from dpo_jax.update import Variables

# Behind the seed of a run: to answer while training, and to evaluate.
TRAINING, EVALUATION = 0, 1


class Evaluation(NamedTuple):
  means: dict[str, float]


class HeldOut:
  """Called as `evaluate.make_evaluator` says."""

  def __init__(self, roller: Roller, scorer: Scorer, packer: Packer):
    """Args:
    roller: answers and has them scored.
    scorer: for the KL to the reference.
    packer: of a batch of held-out prompts, one answer each.
    """
    self._roller, self._scorer, self._pack = roller, scorer, packer

  def __call__(
    self,
    policy: Variables,
    reference: Variables | None,
    plan: PromptPlan,
    loss_state: Any = None,
    interrupted: Callable[[], bool] = lambda: False,
  ) -> Evaluation | None:
    """Means over all held-out prompts; None where it was interrupted."""
    parts = []
    for s in range(len(plan)):
      if interrupted():
        return None
      members = plan.members(s)
      rollout = self._roller(
        policy, plan.examples, members, 1, EVALUATION, s, strict=False
      )
      packed = self._pack(
        rollout.prompts, rollout.responses, range(len(members))
      )
      known = self._scorer(
        [packed], rollout.tokens.shape, policy=policy, reference=reference
      )
      parts.append(told(rollout, known["old"], known.get("reference")))
    return Evaluation(metrics.means(metrics.add(parts)))
