"""GRPO: rewards compared within the answers to a prompt, no value model."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.batch import Batch
from dpo_jax.config import Online
from dpo_jax.online.rollout import Rollout
from dpo_jax.online.updates import Given, mean_of
from dpo_jax.score import Score
from dpo_jax.update import Sums


def prepare(
  settings: Online, rollout: Rollout, known: dict[str, np.ndarray], price: Any
) -> tuple[dict[str, np.ndarray], Sums, None]:
  """What an update is given of each token, [N G R], and metrics.

  An answer without a reward has no part in the updates, nor has one that no
  other answer to its prompt is left to be compared with.
  """
  valid = rollout.valid
  count = valid.sum(axis=1, keepdims=True)
  compared = valid & (count > 1)
  rewards = np.where(valid, rollout.scores, 0).astype(np.float32)
  advantages = np.asarray(
    losses.group_advantages(rewards, settings.scale, compared)
  )
  groups = count[:, 0] > 1
  means = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
  squares = np.where(valid, rewards - means, 0) ** 2
  deviation = np.sqrt(squares.sum(axis=1) / np.maximum(count[:, 0] - 1, 1))
  low, high = (
    f(np.where(valid, rewards, x), axis=1)
    for f, x in ((np.min, np.inf), (np.max, -np.inf))
  )
  given = {
    "old": known["old"],
    "advantages": np.broadcast_to(advantages[..., None], known["old"].shape),
    "mask": (rollout.mask & compared[..., None]).astype(np.float32),
    "lengths": np.broadcast_to(rollout.lengths[..., None], known["old"].shape),
  }
  if "reference" in known:
    given["reference"] = known["reference"]
  return given, {
    "reward_std": mean_of(deviation, groups),
    "frac_reward_zero_std": mean_of(low == high, groups),
  }, None  # fmt: skip


def objective(
  params: Any, frozen: Any, batch: Batch, given: Given, count: Any,
  *, score: Score, join: Any, settings: Online,
) -> tuple[Any, Sums]:  # fmt: skip
  """`losses.grpo` over the tokens of a part of a minibatch."""
  logps = score.tokens(join(frozen, params), batch)
  out = losses.grpo(
    logps, given["old"], given.get("reference"), given["advantages"],
    beta=settings.kl, clip_low=settings.clip,
    clip_high=settings.clip_high or settings.clip,
  )  # fmt: skip
  own = _reduced(out.loss, given, settings)
  sums = losses.reduce(out, given["mask"])
  return own.total / count, sums | {"loss": own}


def count(given: Given, *, settings: Online) -> Any:
  """What the loss of a minibatch is divided by."""
  return _reduced(jnp.zeros(given["old"].shape), given, settings).count


def _reduced(loss, given, settings):
  return losses.token_sums(
    loss, given["mask"], given["lengths"],
    reduction=settings.reduction, max_tokens=settings.max_tokens,
  )  # fmt: skip


def functions(
  score: Score, value_score: Any, join: Any, settings: Online
) -> tuple[Any, ...]:
  """`prepare`, `objective` and `count` with everything fixed; there is no value
  model."""
  del value_score
  return (
    functools.partial(prepare, settings),
    functools.partial(objective, score=score, join=join, settings=settings),
    functools.partial(count, settings=settings),
  )
