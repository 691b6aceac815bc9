"""The step: score, loss, gradient, update. Everything is sums until the end."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax import losses
from dpo_jax.accumulate import accumulate
from dpo_jax.batch import Batch, Scores
from dpo_jax.models import moe
from dpo_jax.one_sweep import Given
from dpo_jax.score import Score
from dpo_jax.trainable import join
from dpo_jax.update import Sums, TrainState, Variables, update


def train_step(
  state: TrainState,
  reference: Variables | None,
  batch: Batch,
  frozen: Variables | None = None,
  *,
  score: Score,
  loss: losses.Loss,
  tx: optax.GradientTransformation,
  join: Callable[[Variables, Variables], Variables] = join,
  dropout_seed: int | None = None,
  router_balance: float = 0.0,
  microbatches: int = 1,
  sync_every: int = 0,
  sync_mixup: float = 0.0,
) -> tuple[TrainState, Sums]:
  """One update of the policy on one global batch.

  Policy and reference are one function at two sets of variables; a loss that
  names no reference runs none. An update that is not finite is not applied:
  parameters and optimizer stay as they were, the step counts as skipped.

  Args:
    state: donated by the caller's jit.
    reference: variables of the reference, but for those it shares with
      `frozen`: a compiler counts an array for each time it is handed in. None
      if the loss needs none, the batch carries its scores, or it is part of the
      state.
    batch: arrays as in `batch.Batch`.
    frozen: variables of the policy that are not trained.
    score: see `score.Score`.
    loss: see `losses.make`.
    tx: optimizer.
    join: (frozen, trained) -> the policy's variables, see `trainable.py`.
    dropout_seed: of adapters with dropout; None drops nothing.
    router_balance: weight of `models.moe.balance`, for a model with experts.
    microbatches: parts of the batch that are run one after another; changes
      memory and, without dropout, no number.
    sync_every: steps after which the state's reference is mixed with the
      policy, see `losses.mix_reference`.
    sync_mixup: the policy's share in that.

  Returns:
    The new state, and sums (total and count) of loss and metrics.
  """
  reference = reference if state.reference is None else state.reference
  key = None
  if dropout_seed is not None:
    key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)

  def options(number):
    return {} if key is None else {"dropout": jax.random.fold_in(key, number)}

  def policy_scores(params, part, number):
    variables, router = join(frozen or {}, params), bool(router_balance)
    return _policy_scores(
      score, loss, variables, part, router=router, **options(number)
    )

  reference_scores = functools.partial(
    _reference_scores, score, loss, reference, frozen or {}
  )
  counts = _counts(loss, batch)

  def objective(policy, reference, part, counts=counts):
    inputs = loss_inputs(
      policy, reference, part,
      state=state.loss_state, gold=loss.responses > 2,
    )  # fmt: skip
    out = loss(**inputs)
    sums = losses.reduce(out, part.weights)
    total = (sums["loss"].total / counts).sum()
    if router_balance:
      unbalance = moe.balance(*policy.router)
      total += router_balance * unbalance
      sums["aux_loss"] = losses.Sums(unbalance, jnp.float32(1))
    return total, (sums, out.state)

  def in_one_sweep(params, part, number):
    given = Given(part, reference_scores(part), counts)
    return score.objective(
      join(frozen or {}, params), given, objective,
      **_read_by(loss), **options(number),
    )  # fmt: skip

  coupled = loss.batch_coupled or router_balance > 0
  grads, (sums, loss_state) = accumulate(
    policy_scores, reference_scores, objective, state.params, batch,
    microbatches, coupled=coupled,
    whole=None if coupled or not score.sweeps(batch) else in_one_sweep,
  )  # fmt: skip
  state, more = update(state, grads, sums["loss"].total, loss_state, tx)
  step, moving = state.step + 1, state.reference
  if moving is not None:
    moving = jax.lax.cond(
      step % sync_every == 0,
      lambda: losses.mix_reference(
        moving, join(frozen or {}, state.params), sync_mixup
      ),
      lambda: moving,
    )
  return state._replace(step=step, reference=moving), sums | more


def _read_by(loss):
  """What a loss has scored beside log-probs."""
  return {"tails": loss.reads_tails, "confidence": loss.reads_confidence}


def _policy_scores(score, loss, variables, batch, **options):
  return score(variables, batch, **_read_by(loss), **options)


def _reference_scores(score, loss, reference, frozen, batch):
  if batch.reference is not None or not loss.needs_reference:
    return batch.reference
  return score(join(frozen, reference), batch, tails=loss.reads_tails)


def _counts(loss: losses.Loss, batch: Batch) -> jax.Array:
  """What the mean of the loss (of each of its terms) is divided by: that of the
  whole batch, known before any part of it is scored. Scores do not enter; what
  else is computed here the compiler drops."""
  zeros = jnp.zeros(batch.lengths.shape, jnp.float32)
  nothing = Scores(zeros, zeros, zeros)
  inputs = loss_inputs(
    nothing, nothing, batch,
    state=loss.initial_state(), gold=loss.responses > 2,
  )  # fmt: skip
  out = loss(**inputs)
  return jnp.maximum(losses.reduce(out, batch.weights)["loss"].count, 1.0)


def loss_inputs(
  policy: Scores,
  reference: Scores | None,
  batch: Batch,
  *,
  state: Any = None,
  training: bool = True,
  gold: bool = False,
) -> dict[str, Any]:
  """Everything a loss can ask for, by name; arrays of shape [B M].

  Args:
    policy: f32[B M K] each; of a reward model its scores.
    reference: likewise, or None.
    batch: lengths, labels, margins and weights; anything with these four will
      do.
    state: what the loss carries.
    training: False leaves that as it is.
    gold: of three ranked responses the pair is the second and the third.
  """
  sides = ("gold", "chosen", "rejected")[0 if gold else 1 :]
  lengths = batch.lengths.astype(jnp.float32)
  inputs = {
    "desirable": batch.desirable,
    "preference_margins": batch.margins,
    "weights": batch.weights,
    "ranked_lengths": lengths,
    "state": state,
    "training": training,
  }
  for i, side in enumerate(sides):
    inputs[f"{side}_lengths"] = lengths[..., i]
    if policy.confidence is not None:
      inputs[f"{side}_confidence"] = policy.confidence[..., i]
  for model, scores in (("policy", policy), ("reference", reference)):
    if scores is None:
      continue
    inputs[f"{model}_ranked_logps"] = scores.logps
    inputs[f"{model}_logps"] = scores.logps[..., 0]
    inputs[f"{model}_kl_logps"] = scores.logps[..., 1]
    for i, side in enumerate(sides):
      inputs[f"{model}_{side}_logps"] = scores.logps[..., i]
      if model == "policy":  # a reward model, to a loss that reads its scores
        inputs[f"{side}_scores"] = scores.logps[..., i]
      if scores.tails is not None:
        inputs[f"{model}_{side}_tail_logps"] = scores.tails[..., i]
  return {k: x for k, x in inputs.items() if k in losses.INPUTS}


def evaluate_step(
  policy: Variables,
  reference: Variables | None,
  batch: Batch,
  loss_state: Any = None,
  *,
  score: Score,
  loss: losses.Loss,
) -> tuple[Sums, Scores, Scores | None]:
  """Loss and metrics of a batch without an update.

  A loss that carries state reads `loss_state`, or its first one for None, and
  leaves it as it is.

  Returns:
    Sums as `train_step` gives them, and the scores f32[B M K] of policy and
    reference (None without one).
  """
  policy = _policy_scores(score, loss, policy, batch)
  known = batch.reference
  if known is None and reference is not None:
    known = score(reference, batch, tails=loss.reads_tails)
  if loss_state is None:
    loss_state = loss.initial_state()
  inputs = loss_inputs(
    policy, known, batch,
    state=loss_state, training=False, gold=loss.responses > 2,
  )  # fmt: skip
  out = loss(**inputs)
  return losses.reduce(out, batch.weights), policy, known
