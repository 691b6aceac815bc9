"""The optimizer from a config section: clip, optimizer, schedule."""

import re
from typing import Any

import jax
import optax

from dpo_jax.errors import ConfigError

_OPTIMIZERS = ("adamw", "sgd", "lion", "rmsprop", "adafactor")
_SCHEDULES = ("constant", "linear", "cosine")
# Decay pulls matrices towards zero; scales and biases are left alone.
_NO_DECAY = re.compile(r"(scale|bias)$")


def make_schedule(
  learning_rate: float,
  total_steps: int,
  *,
  schedule: str = "constant",
  warmup: float = 0.0,
  final: float = 0.0,
) -> optax.Schedule:
  """Linear warm-up, then constant, linear or cosine decay.

  Args:
    learning_rate: peak.
    total_steps: of the run.
    schedule: "constant", "linear" or "cosine".
    warmup: share of the steps, in [0, 1).
    final: learning rate at the end, as a share of the peak.

  Raises:
    ConfigError: unknown schedule, or warm-up outside [0, 1).
  """
  if schedule not in _SCHEDULES:
    raise ConfigError(
      f"optim.schedule={schedule!r} should be one of {', '.join(_SCHEDULES)}"
    )
  if not 0 <= warmup < 1:
    raise ConfigError(f"optim.warmup={warmup} should be in [0, 1)")
  rising = round(warmup * total_steps)
  rest = max(total_steps - rising, 1)
  if schedule == "constant":
    after = optax.constant_schedule(learning_rate)
  elif schedule == "linear":
    after = optax.linear_schedule(learning_rate, final * learning_rate, rest)
  else:
    after = optax.cosine_decay_schedule(learning_rate, rest, final)
  if not rising:
    return after
  # The first step already moves: 1/rising of the peak, not 0.
  up = optax.linear_schedule(
    learning_rate / rising, learning_rate, max(rising - 1, 1)
  )
  return optax.join_schedules([up, after], [rising])


def make(
  learning_rate: optax.Schedule,
  *,
  name: str = "adamw",
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  momentum: float = 0.0,
  clip_norm: float = 1.0,
  factors: Any = None,
) -> optax.GradientTransformation:
  """An optax optimizer by name; hyper-parameters it lacks are not read.

  Args:
    learning_rate: see `make_schedule`.
    name: adamw (the default, as in the Hugging Face trainer), sgd, lion,
      rmsprop (the original DPO code's, there with b2 0.99) or adafactor.
    b1: first-moment decay of adamw and lion.
    b2: second-moment decay of adamw, lion and rmsprop.
    epsilon: of adamw and rmsprop.
    weight_decay: decoupled; matrices only.
    momentum: of sgd.
    clip_norm: bound on the global gradient norm; 0 does not clip.
    factors: on the learning rate of each array, a tree like the parameters of
      arrays that broadcast to them (`trainable.Trainable.factors`); None: 1.

  Raises:
    ConfigError: unknown optimizer.
  """
  if name == "adamw":
    tx = optax.adamw(
      learning_rate, b1, b2, epsilon, weight_decay=weight_decay, mask=_decayed
    )
  elif name == "sgd":
    tx = optax.sgd(learning_rate, momentum or None)
  elif name == "lion":
    tx = optax.lion(
      learning_rate, b1, b2, weight_decay=weight_decay, mask=_decayed
    )
  elif name == "rmsprop":
    # Inside the root, as by default, an epsilon of 1e-8 would bound the
    # divisor by 1e-4, which is more than most gradients of a large model.
    tx = optax.rmsprop(learning_rate, b2, epsilon, eps_in_sqrt=False)
  elif name == "adafactor":
    tx = optax.adafactor(learning_rate)
  else:
    raise ConfigError(
      f"optim.name={name!r} should be one of {', '.join(_OPTIMIZERS)}"
    )
  if factors is not None:
    scale = lambda updates, _: jax.tree.map(
      lambda u, factor: u * factor.astype(u.dtype), updates, factors
    )
    tx = optax.chain(tx, optax.stateless(scale))
  if clip_norm > 0:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx


def _decayed(params: Any) -> Any:
  def one(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return not _NO_DECAY.search(name)

  return jax.tree_util.tree_map_with_path(one, params)
