"""BCO: a binary classifier of thumbs up and down, with a reward shift."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from dpo_jax.losses.base import (
  LossOutput,
  Sums,
  check_choice,
  check_range,
  unpaired_metrics,
)
from dpo_jax.losses.registry import register


class RewardMeans(NamedTuple):
  """Running means of the rewards seen so far; carried as `state`."""

  desirable: Sums
  undesirable: Sums


def no_rewards(dtype: Any = jnp.float32) -> RewardMeans:
  """The state before the first batch."""
  zero = jnp.zeros((), dtype)
  return RewardMeans(Sums(zero, zero), Sums(zero, zero))


@register(paper="2404.04656", state=no_rewards)
def bco(
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  desirable: jax.Array,
  weights: jax.Array | None = None,
  state: RewardMeans | None = None,
  density_ratios: jax.Array | None = None,
  training: bool = True,
  *,
  beta: float = 0.1,
  shift: str = "classes",
) -> LossOutput:
  """Binary Classifier Optimization, Jung et al. 2024 (2404.04656), eq. 7-8.

      desirable:    -log sigmoid(r - delta)
      undesirable:  -u log sigmoid(-(r - delta))
      r = beta * (log pi(y|x) - log ref(y|x))

  delta is a running mean of rewards over all batches so far, this one
  included, without gradient; evaluation (`training=False`) uses it and leaves
  it as it is. It is explicit state: hand `output.state` in with the next batch.
  The batch is the global one, under accumulation as well. The mean is over all
  batches alike, as in TRL; the paper takes an exponentially decaying one.

  Args:
    policy_logps: f[...].
    reference_logps: f[...].
    desirable: bool[...].
    weights: f[...], 0 where an entry holds no example and must not enter delta.
    state: the rewards seen so far; None before the first batch.
    density_ratios: f[...], the paper's weight u = p_D(x) / p_U(x) of an
      undesirable example whose prompts are distributed otherwise than those of
      the desirable ones, as `p / (1 - p)` of a classifier of prompts. None: 1.
    training: False leaves the state as it is.
    beta: larger keeps nearer to the reference.
    shift: "classes", the middle between the means of the two classes (the
      paper's, right for any share of either); "pooled", one mean over all
      examples (TRL's).
  """
  check_range("beta", beta, 0.0, float("inf"))
  check_choice("shift", shift, "classes", "pooled")
  desirable = desirable.astype(policy_logps.dtype)
  if weights is None:
    weights = jnp.ones_like(policy_logps)
  rewards = beta * (policy_logps - reference_logps)
  state = no_rewards(rewards.dtype) if state is None else state
  seen = jax.lax.stop_gradient(jnp.where(weights > 0, rewards, 0.0))

  def with_batch(sums, mine):
    mine = jnp.where(training, mine * weights, 0.0)
    dtype = sums.total.dtype
    total = sums.total + (seen * mine).sum().astype(dtype)
    return Sums(total, sums.count + mine.sum().astype(dtype))

  state = RewardMeans(
    with_batch(state.desirable, desirable),
    with_batch(state.undesirable, 1 - desirable),
  )
  delta = _middle(state) if shift == "classes" else _pooled(state)
  ratios = 1.0 if density_ratios is None else density_ratios
  liked = -log_sigmoid(rewards - delta)
  disliked = -ratios * log_sigmoid(delta - rewards)
  metrics = unpaired_metrics(rewards, policy_logps, desirable)
  return LossOutput(
    desirable * liked + (1 - desirable) * disliked,
    metrics | {"delta": jnp.broadcast_to(delta, rewards.shape)},
    state=state,
  )


def _middle(state):
  """Mean of the class means, over the classes seen so far."""
  classes = sum((s.count > 0).astype(s.total.dtype) for s in state)
  return sum(s.mean() for s in state) / jnp.maximum(classes, 1)


def _pooled(state):
  both = Sums(*(sum(x) for x in zip(*state, strict=True)))
  return both.mean()
