"""Exact evaluation: every example once, one weight each, one division."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax import losses, metrics, sharding
from dpo_jax.batch import Scores
from dpo_jax.calibration import calibration
from dpo_jax.data.plan import Plan
from dpo_jax.score import Score
from dpo_jax.train_step import evaluate_step, loss_inputs
from dpo_jax.update import Variables


class Evaluation(NamedTuple):
  means: dict[str, float]  # of loss and metrics, over all examples
  policy: Scores  # numpy f32[N K]
  reference: Scores | None  # likewise
  calibration: dict[str, Any] | None = None  # of a reward model


Evaluator = Callable[..., Evaluation]


def make_evaluator(score: Score, loss: losses.Loss, mesh: Mesh) -> Evaluator:
  """Builds `evaluate(params, reference, plan, loss_state=None)`, compiled once
  per shape. A further `interrupted` is asked before each batch, and ends it
  with None where it is true.

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
    params: Variables,
    reference: Variables | None,
    plan: Plan,
    loss_state: Any = None,
    interrupted: Callable[[], bool] = lambda: False,
  ) -> Evaluation | None:
    sums, parts = [], []
    for s in range(len(plan)):
      if interrupted():
        return None
      batch, ids = plan[s]
      out, *scores = step(
        params, reference, sharding.put_batch(batch, mesh), loss_state
      )
      sums.append(out)
      parts.append((ids, *map(jax.device_get, scores)))
    means = metrics.means(metrics.add(sums))
    ids, *scores = zip(*parts, strict=True)
    policy, known = (_by_example(ids, x) for x in scores)
    found = None
    if loss.needs_scores:
      found = calibration(policy.logps[:, 0] - policy.logps[:, 1])
      if found["pairs"]:
        means["calibration_error"] = found["error"]
    return Evaluation(means, policy, known, found)

  return evaluate


def score_examples(
  score: Score,
  variables: Variables,
  plan: Plan,
  mesh: Mesh,
  *,
  tails: bool = False,
) -> Scores:
  """Scores of every example of an unshuffled plan, under one model: numpy
  f32[N K]."""
  step = jax.jit(
    functools.partial(score, tails=tails),
    out_shardings=sharding.replicated(mesh),
  )
  parts = []
  for s in range(len(plan)):
    batch, ids = plan[s]
    scored = step(variables, sharding.put_batch(batch, mesh))
    parts.append((ids, jax.device_get(scored)))
  return _by_example(*zip(*parts, strict=True))


def _by_example(ids: Sequence[np.ndarray], parts: Sequence[Any]) -> Any:
  """Trees of f32[B M K] of several batches -> one of f32[N K], in the order of
  the examples."""
  ids = np.concatenate([x.reshape(-1) for x in ids])
  order = np.argsort(ids, kind="stable")[(ids < 0).sum() :]

  def join(*leaves):
    flat = [x.reshape(-1, x.shape[-1]) for x in leaves]
    return np.concatenate(flat)[order]

  return jax.tree.map(join, *parts)


class _Lengths(NamedTuple):
  """What `loss_inputs` reads of a batch, for examples outside of one."""

  lengths: np.ndarray
  weights: None = None
  desirable: None = None
  margins: None = None


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
    margin is that of the log-ratios, before any beta, or "score_margin" of a
    reward model. Nothing for a loss that reports no accuracies.
  """
  policy, reference = evaluation.policy, evaluation.reference
  logratios = policy.logps - (0 if reference is None else reference.logps)
  margins = logratios[:, 0] - logratios[:, 1]
  inputs = loss_inputs(policy, reference, _Lengths(examples.lengths))
  accuracies = loss(**inputs).metrics.get("rewards/accuracies")
  if accuracies is None:
    return {}
  hits = np.asarray(accuracies)
  of = "score" if loss.needs_scores else "logratio"
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
        f"{of}_margin": float(margins[mine].mean()),
      }
  return out
