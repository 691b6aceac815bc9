"""The value model of PPO: a decoder of its own with a scalar head, read at
every token that predicts one of an answer."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import Batch
from dpo_jax.build import Built, model_of
from dpo_jax.errors import ConfigError
from dpo_jax.score import hidden_states

Variables = dict[str, Any]


class ValueScore:
  """(variables, batch) -> what is expected before each scored token, f32[B S];
  what padding holds means nothing."""

  def __init__(self, model: Any):
    """Wraps a model as `reward_score.RewardScore` does."""
    self._model = model

  def __call__(self, variables: Variables, batch: Batch) -> jax.Array:
    variables = self._model.spread(variables)
    scored = batch.slot < math.prod(batch.lengths.shape[1:])
    at = jnp.where(scored, batch.source, batch.tokens.shape[1])
    hidden, _ = hidden_states(self._model, variables, batch, at)
    # By hand, for products of matrices round on accelerators.
    head = self._model.score_head(variables)
    return (hidden.astype(jnp.float32) * head).sum(axis=-1)


def value_model(built: Built) -> Any:
  """A model as the policy's, with a scalar head."""
  shape = dataclasses.replace(built.model.config, scalar_head=True)
  return model_of(built.family, shape, built.model.compute, built.mesh)


def start(model: Any, policy: Variables, reward: Any, path: str) -> Any:
  """The value model's `params` before any step: a reward model's, or else the
  policy's with a head of zeros, so that it expects nothing.

  Args:
    model: of `value_model`.
    policy: variables; copied, as are those of a reward model.
    reward: a `reward_model.Scorer`, or None.
    path: of that, for the message.

  Raises:
    ConfigError: a reward model of another shape.
  """
  shapes = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  if reward is None:
    start = {k: x for k, x in policy["params"].items() if k in shapes}
    head = shapes["score"]
    start["score"] = jnp.zeros(head.shape, head.dtype)
  else:
    start = reward.variables["params"]
  same = jax.tree.structure(start) == jax.tree.structure(shapes) and all(
    x.shape == y.shape
    for x, y in zip(*map(jax.tree.leaves, (start, shapes)), strict=True)
  )
  if not same:
    raise ConfigError(
      f"config.online.reward_model={path!r} is a model of another shape than"
      " the policy, and the value model of ppo starts from it"
    )
  return jax.tree.map(jnp.copy, start)
