"""The value model of PPO: a decoder of its own with a scalar head, read at
every token that predicts one of an answer."""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.batch import Batch
from dpo_jax.build import Built, model_of
from dpo_jax.score import hidden_states

_LOG = logging.getLogger("dpo_jax")
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


def start(model: Any, policy: Variables, reward: Any) -> Any:
  """The value model's `params` before any step: those of a reward model of the
  policy's shape, or else the policy's with a head of zeros, so that it expects
  nothing.

  Args:
    model: of `value_model`.
    policy: variables; copied, as are those of a reward model.
    reward: a `reward_model.Scorer`, or None.
  """
  if reward is not None and _alike(model.config, reward.model.config):
    return jax.tree.map(jnp.copy, reward.variables["params"])
  if reward is not None:
    _LOG.info(
      "the reward model has another shape than the policy: the value model"
      " starts from the policy"
    )
  shapes = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  start = {k: x for k, x in policy["params"].items() if k in shapes}
  start = jax.tree.map(jnp.copy, start)
  head = shapes["score"]
  return start | {"score": jnp.zeros(head.shape, head.dtype)}


def _alike(one: Any, other: Any) -> bool:
  """Whether weights of one are weights of the other, both with scalar heads:
  positions they were made for and ties of unembeddings do not matter."""
  free = {name: getattr(one, name) for name in ("max_length", "tied")}
  return one == dataclasses.replace(other, **free)
