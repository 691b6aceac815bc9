"""Exact evaluation: every example once, one weight each, one division."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax import losses, metrics, sharding
from dpo_jax.data.plan import Plan
from dpo_jax.score import Score
from dpo_jax.train_step import Variables, evaluate_step


class Evaluation(NamedTuple):
  means: dict[str, float]  # of loss and metrics, over all examples
  policy: np.ndarray  # f32[N 2], log-probs of both branches
  reference: np.ndarray | None  # likewise


Evaluator = Callable[[Variables, Variables | None, Plan], Evaluation]


def make_evaluator(score: Score, loss: losses.Loss, mesh: Mesh) -> Evaluator:
  """Builds `evaluate(params, reference, plan)`, compiled once per shape.

  The means do not depend on the batch size: sums are added in float64 and
  divided by the number of examples (except for what a loss itself couples,
  as KTO's z0).
  """
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    functools.partial(evaluate_step, score=score, loss=loss),
    out_shardings=everywhere,
  )

  def evaluate(
    params: Variables, reference: Variables | None, plan: Plan
  ) -> Evaluation:
    sums = []
    n = len(plan.examples)
    policy_logps = np.zeros((n, 2), np.float32)
    reference_logps = None
    for s in range(len(plan)):
      batch, ids = plan[s]
      out, policy, known = step(
        params, reference, sharding.put_batch(batch, mesh)
      )
      sums.append(out)
      there = ids >= 0
      policy_logps[ids[there]] = np.asarray(policy)[there]
      if known is not None:
        if reference_logps is None:
          reference_logps = np.zeros((n, 2), np.float32)
        reference_logps[ids[there]] = np.asarray(known)[there]
    means = metrics.means(metrics.add(sums))
    return Evaluation(means, policy_logps, reference_logps)

  return evaluate


def score_examples(
  score: Score, variables: Variables, plan: Plan, mesh: Mesh
) -> np.ndarray:
  """Log-probs of both branches of every example of an unshuffled plan, under
  one model: f32[N 2]."""
  step = jax.jit(score, out_shardings=sharding.replicated(mesh))
  logps = np.zeros((len(plan.examples), 2), np.float32)
  for s in range(len(plan)):
    batch, ids = plan[s]
    scored = np.asarray(step(variables, sharding.put_batch(batch, mesh)))
    logps[ids[ids >= 0]] = scored[ids >= 0]
  return logps


def by_subset(
  evaluation: Evaluation, examples: Any, loss: losses.Loss
) -> dict[str, Any]:
  """Reward accuracy per subset with a 95 % interval, ties counted one half.

  Args:
    evaluation: of paired data.
    examples: the data it was made from (`store.Examples`).
    loss: says what a reward is; ORPO's, say, is a mean over tokens.

  Returns:
    By subset: {"examples", "accuracy", "interval", "logratio_margin"}; the
    margin is that of the log-ratios, before any beta.
  """
  logratios = evaluation.policy - (
    0 if evaluation.reference is None else evaluation.reference
  )
  margins = logratios[:, 0] - logratios[:, 1]
  inputs = {
    "chosen_lengths": examples.chosen_lengths,
    "rejected_lengths": examples.rejected_lengths,
  }
  for model in ("policy", "reference"):
    logps = getattr(evaluation, model)
    if logps is not None:
      inputs[f"{model}_chosen_logps"] = logps[:, 0]
      inputs[f"{model}_rejected_logps"] = logps[:, 1]
  hits = np.asarray(loss(**inputs).metrics["rewards/accuracies"])
  out = {}
  for i, name in enumerate(examples.subset_names):
    mine = examples.subsets == i
    n = int(mine.sum())
    if n:
      accuracy = float(hits[mine].mean())
      out[name or "all"] = {
        "examples": n,
        "accuracy": accuracy,
        "interval": metrics.accuracy_interval(accuracy, n),
        "logratio_margin": float(margins[mine].mean()),
      }
  return out
