"""Updates of PPO and GRPO: log-probs of tokens, a loss of tokens, a step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import losses
from dpo_jax.accumulate import accumulate
from dpo_jax.batch import Batch
from dpo_jax.score import Score
from dpo_jax.update import Sums, TrainState, Variables, update

Given = dict[str, jax.Array]  # f[B S] each, constants of an update
# (params, frozen, batch, given, its counts) -> the loss, and sums
Objective = Callable[..., tuple[jax.Array, Sums]]


def update_step(
  state: TrainState,
  batch: Batch,
  given: Given,
  frozen: Variables | None = None,
  *,
  objective: Objective,
  count: Callable[[Given], jax.Array],
  tx: optax.GradientTransformation,
  microbatches: int = 1,
) -> tuple[TrainState, Sums]:
  """One update on one minibatch; `state.step` stays as it is.

  Args:
    state: donated by the caller's jit.
    batch: answers in rows.
    given: what is known of their tokens.
    frozen: variables of the policy that are not trained.
    objective: a sum over tokens, divided by the whole minibatch's count.
    count: that count, from `given`.
    tx: optimizer.
    microbatches: parts that are run one after another.
  """
  whole = jnp.maximum(count(given), 1e-9)

  def of_part(params, part, number):
    return objective(params, frozen or {}, *part, whole)

  grads, sums = accumulate(
    None, None, None, state.params, (batch, given), microbatches,
    coupled=False, whole=of_part,
  )  # fmt: skip
  state, more = update(state, grads, sums["loss"].total, state.loss_state, tx)
  return state, sums | more


def score_tokens(
  policy: Variables | None,
  reference: Variables | None,
  value: Variables | None,
  batch: Batch,
  *,
  score: Score,
  value_score: Callable[[Variables, Batch], jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """f32[B S] of each model there is: log-probs "old" and "reference", and
  "values"."""
  found = {}
  if policy is not None:
    found["old"] = score.tokens(policy, batch)
  if reference is not None:
    found["reference"] = score.tokens(reference, batch)
  if value is not None:
    found["values"] = value_score({"params": value}, batch)
  return found


def minibatches(n: int, count: int, *number: int) -> list[np.ndarray]:
  """Splits n prompts into as many parts of one size, by a permutation that the
  numbers decide; as they are for a single part."""
  if count == 1:
    return [np.arange(n)]
  order = np.random.default_rng(number).permutation(n)
  return np.split(order, count)


def mean_of(
  values: np.ndarray, weights: np.ndarray | None = None
) -> losses.Sums:
  """Of numbers on the host; what has no weight may be anything."""
  weights = np.ones(values.shape) if weights is None else weights
  values = np.where(weights > 0, values, 0)
  return losses.Sums(
    np.float64((values * weights).sum()), np.float64(weights.sum())
  )
