"""PPO: rewards less the price of a nat, a value model, clipped steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.batch import Batch
from dpo_jax.config import Online
from dpo_jax.online.rollout import Rollout
from dpo_jax.online.updates import Given, mean_of
from dpo_jax.score import Score
from dpo_jax.trainable import VALUE
from dpo_jax.update import Sums


def prepare(
  settings: Online, rollout: Rollout, known: dict[str, np.ndarray], price: Any
) -> tuple[dict[str, np.ndarray], Sums, Any]:
  """What an update is given of each token, [N G R], metrics, and the next
  price where it is adapted (None where it is not).

  An answer without a reward has no part in the updates.
  """
  valid = rollout.valid
  adapts, price = (
    price is not None,
    float(settings.kl if price is None else price),
  )
  mask = rollout.mask & valid[..., None]
  flat = lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:])
  found = _advantages(
    flat(np.where(valid, rollout.scores, 0).astype(np.float32)),
    flat(rollout.lengths), flat(mask), jnp.float32(price),
    *(flat(known[name]) for name in ("old", "reference", "values")),
    settings=settings,
  )  # fmt: skip
  advantages, returns, cost = (np.asarray(x).reshape(mask.shape) for x in found)
  by_answer = lambda x: np.where(mask, x, 0).sum(axis=-1)
  kl = by_answer(known["old"] - known["reference"])
  non_score = by_answer(cost)
  given = {
    "old": known["old"],
    "values": known["values"],
    "advantages": advantages,
    "returns": returns,
    "mask": mask.astype(np.float32),
  }
  sums = {
    "objective/non_score_reward": mean_of(non_score, valid),
    "objective/rlhf_reward": mean_of(non_score + rollout.scores, valid),
    "objective/kl_coef": mean_of(np.array(price)),
  }
  if adapts:
    mean = mean_of(kl, valid).mean()
    # What is not finite moves nothing, as in `train_step.update`.
    if np.isfinite(mean):
      price = losses.adapt(
        price, mean, settings.kl_target, settings.kl_horizon, int(valid.sum())
      )
  return given, sums, np.float32(price) if adapts else None


@functools.partial(jax.jit, static_argnames="settings")
def _advantages(
  scores, lengths, mask, price, old, reference, values, *, settings
):
  """Advantages, returns and the price of each token, f32[N R]."""
  nothing = jnp.zeros_like(scores)
  shape = functools.partial(
    losses.shaped_rewards,
    logps=old, reference_logps=reference, lengths=lengths, coefficient=price,
    kind=settings.kl_estimator,
  )  # fmt: skip
  rewards = jnp.where(mask, shape(scores), 0.0)
  if settings.whiten_rewards:
    rewards = losses.whiten(rewards, mask, shift_mean=False)
  advantages, returns = losses.gae(
    rewards, values, mask, gamma=settings.gamma, lam=settings.lam
  )
  if settings.whiten:
    advantages = losses.whiten(advantages, mask)
  return advantages, returns, shape(nothing)


def objective(
  params: Any, frozen: Any, batch: Batch, given: Given, count: Any,
  *, score: Score, value_score: Any, join: Any, settings: Online,
) -> tuple[Any, Sums]:  # fmt: skip
  """`losses.ppo_policy` and `losses.ppo_value` over the tokens of a part of a
  minibatch."""
  policy = {name: x for name, x in params.items() if name != VALUE}
  logps = score.tokens(join(frozen, policy), batch)
  values = value_score({"params": params[VALUE]}, batch)
  of_policy = losses.ppo_policy(
    logps, given["old"], given["advantages"], clip=settings.clip
  )
  of_value = losses.ppo_value(
    values, given["values"], given["returns"], clip=settings.value_clip
  )
  moved, valued = (
    losses.reduce(out, given["mask"]) for out in (of_policy, of_value)
  )
  first, second = moved.pop("loss"), valued.pop("loss")
  total = first.total + settings.value_weight * second.total
  sums = {
    "loss": losses.Sums(total, first.count),
    "loss/policy_avg": first,
    "loss/value_avg": second,
  }
  return total / count, sums | moved | valued


def count(given: Given) -> Any:
  """What the loss of a minibatch is divided by: its tokens."""
  return given["mask"].sum()


def functions(
  score: Score, value_score: Any, join: Any, settings: Online
) -> tuple[Any, ...]:
  """`prepare`, `objective` and `count` with everything fixed."""
  fixed = functools.partial(
    objective,
    score=score, value_score=value_score, join=join, settings=settings,
  )  # fmt: skip
  return functools.partial(prepare, settings), fixed, count
