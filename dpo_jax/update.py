"""What changes while training, and how one gradient changes it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpo_jax import losses
from dpo_jax.offload import fetched

Variables = dict[str, Any]
Sums = dict[str, losses.Sums]


class TrainState(NamedTuple):
  """What changes while training; arrays only."""

  step: jax.Array  # i32[], also the position in the data
  params: Variables  # the trained collections, e.g. {"params": ...}
  opt_state: Any
  skipped: jax.Array  # i32[], steps whose update was not finite
  loss_state: Any = None  # what the loss carries from batch to batch
  reference: Variables | None = None  # where it follows the policy (TR-DPO)


def update(
  state: TrainState,
  grads: Variables,
  loss: jax.Array,
  loss_state: Any,
  tx: optax.GradientTransformation,
) -> tuple[TrainState, Sums]:
  """Moves parameters, optimizer and what the loss carries; the step stays.

  Args:
    state: where they are.
    grads: like its params, in any float dtype.
    loss: f32[...], which must be finite, as the gradients must be, or all stays
      as it is and counts as skipped.
    loss_state: what the loss carries on.
    tx: optimizer.

  Returns:
    The new state, and sums of the gradient's norm and of what was skipped.
  """
  # Parts add up in float32; the optimizer's state has the dtype of the weights.
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
  # In float32 also where the weights are bfloat16.
  norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
  finite = jnp.isfinite(norm) & jnp.isfinite(loss).all()

  opt_state = fetched(state.opt_state)

  def moved():
    updates, moments = tx.update(grads, opt_state, state.params)
    return optax.apply_updates(state.params, updates), moments, loss_state

  params, opt_state, loss_state = _in_place_if(
    finite, moved, (state.params, opt_state, state.loss_state)
  )
  state = state._replace(
    params=params,
    opt_state=opt_state,
    skipped=state.skipped + ~finite,
    loss_state=loss_state,
  )
  return state, {
    "grad_norm": losses.Sums(norm, jnp.float32(1)),
    "skipped": losses.Sums(1.0 - finite, jnp.float32(1)),
  }


def _in_place_if(yes, moved, old):
  """`moved()`, or `old` where not `yes`, in the arrays that `old` lies in."""

  def by_selection():
    return jax.tree.map(lambda a, b: jnp.where(yes, a, b), moved(), old)

  # What compilers write over the old arrays without copies of them, which are
  # as large as two to three times the weights: on CPUs a branch and no
  # selection, on GPUs a selection and no branch, on TPUs both.
  return jax.lax.platform_dependent(
    cpu=lambda: jax.lax.cond(yes, moved, lambda: old), default=by_selection
  )
