"""The step: score, loss, gradient, update. Everything is sums until the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import losses
from dpo_jax.accumulate import accumulate
from dpo_jax.batch import Batch
from dpo_jax.logps import lengths_by_slot
from dpo_jax.score import Score

Variables = dict[str, Any]
Sums = dict[str, losses.Sums]


class TrainState(NamedTuple):
  """What changes while training; arrays only."""

  step: jax.Array  # i32[], also the position in the data
  params: Variables  # the trained collections, e.g. {"params": ...}
  opt_state: Any
  skipped: jax.Array  # i32[], steps whose update was not finite


def train_step(
  state: TrainState,
  reference: Variables | None,
  batch: Batch,
  *,
  score: Score,
  loss: losses.Loss,
  tx: optax.GradientTransformation,
  microbatches: int = 1,
) -> tuple[TrainState, Sums]:
  """One update of the policy on one global batch.

  Policy and reference are one function at two sets of variables; a loss that
  names no reference runs none. An update that is not finite is not applied:
  parameters and optimizer stay as they were, the step counts as skipped.

  Args:
    state: donated by the caller's jit.
    reference: variables of the reference; None if the loss needs none, or the
      batch carries its log-probs.
    batch: arrays as in `batch.Batch`.
    score: see `score.make_score`.
    loss: see `losses.make`.
    tx: optimizer.
    microbatches: parts of the batch that are run one after another; changes
      memory and no number.

  Returns:
    The new state, and sums (total and count) of loss and metrics.
  """

  def policy_logps(params, part):
    return score({**(reference or {}), **params}, part)

  def reference_logps(part):
    if part.reference_logps is not None or not loss.needs_reference:
      return part.reference_logps
    return score(reference, part)

  def objective(policy, reference, part):
    out = loss(**loss_inputs(policy, reference, part))
    sums = losses.reduce(out, part.weights)
    return sums["loss"].total, sums

  grads, sums = accumulate(
    policy_logps, reference_logps, objective, state.params, batch,
    microbatches, coupled=loss.batch_coupled,
  )  # fmt: skip
  count = jnp.maximum(sums["loss"].count, 1.0)
  # Parts add up in float32; the optimizer's state has the dtype of the weights.
  grads = jax.tree.map(
    lambda g, p: (g / count).astype(p.dtype), grads, state.params
  )
  # In float32 also where the weights are bfloat16.
  norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
  finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"].total)

  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (params, opt_state),
    (state.params, state.opt_state),
  )
  state = TrainState(state.step + 1, params, opt_state, state.skipped + ~finite)
  sums |= {
    "grad_norm": losses.Sums(norm, jnp.float32(1)),
    "skipped": losses.Sums(1.0 - finite, jnp.float32(1)),
  }
  return state, sums


def loss_inputs(
  policy: jax.Array, reference: jax.Array | None, batch: Batch
) -> dict[str, jax.Array]:
  """Everything a loss can ask for, by name; arrays of shape [B M].

  Args:
    policy: f32[B M 2], log-probs of both branches.
    reference: likewise, or None.
    batch: lengths come from its slots.
  """
  lengths = lengths_by_slot(batch.slot, batch.weights.shape[1])
  inputs = {
    "chosen_lengths": lengths[..., 0],
    "rejected_lengths": lengths[..., 1],
    "desirable": batch.desirable,
    "weights": batch.weights,
  }
  for model, logps in (("policy", policy), ("reference", reference)):
    if logps is not None:
      inputs[f"{model}_chosen_logps"] = logps[..., 0]
      inputs[f"{model}_rejected_logps"] = logps[..., 1]
      inputs[f"{model}_logps"] = logps[..., 0]
      inputs[f"{model}_kl_logps"] = logps[..., 1]
  return inputs


def evaluate_step(
  params: Variables,
  reference: Variables | None,
  batch: Batch,
  *,
  score: Score,
  loss: losses.Loss,
) -> tuple[Sums, jax.Array, jax.Array | None]:
  """Loss and metrics of a batch without an update.

  Returns:
    Sums as `train_step` gives them, and the log-probs f32[B M 2] of policy and
    reference (None without one).
  """
  policy = score({**(reference or {}), **params}, batch)
  known = batch.reference_logps
  if known is None and reference is not None:
    known = score(reference, batch)
  out = loss(**loss_inputs(policy, known, batch))
  return losses.reduce(out, batch.weights), policy, known
