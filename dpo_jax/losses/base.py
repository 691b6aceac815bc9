"""What a loss takes and gives: named inputs, an unreduced output, sums."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Every input a loss may ask for, by the name of its positional parameter.
# Unless said otherwise an array f[...] with one entry an example; log-probs are
# natural logs, summed over the response's tokens.
INPUTS: Mapping[str, str] = {
  "policy_chosen_logps": "log pi(y_w | x), summed over the chosen response",
  "policy_rejected_logps": "log pi(y_l | x), summed over the rejected response",
  "reference_chosen_logps": "log ref(y_w | x)",
  "reference_rejected_logps": "log ref(y_l | x)",
  "chosen_lengths": "scored tokens of the chosen response",
  "rejected_lengths": "scored tokens of the rejected response",
  "policy_gold_logps": "log pi(y_g | x) of a response better than both",
  "gold_lengths": "scored tokens of the gold response",
  "policy_ranked_logps": "f[... K], log pi(y_k | x), the best response first",
  "reference_ranked_logps": "f[... K], log ref(y_k | x)",
  "ranked_lengths": "f[... K], scored tokens; 0 where no k-th response is",
  "policy_logps": "log pi(y | x) of an unpaired completion",
  "reference_logps": "log ref(y | x) of an unpaired completion",
  "policy_kl_logps": "log pi(y' | x), y' the completion of another example",
  "reference_kl_logps": "log ref(y' | x)",
  "desirable": "True where the unpaired completion was liked",
  "density_ratios": "weight of an undesirable example; None is 1",
  "chosen_scores": "score of the chosen response under a reward model",
  "rejected_scores": "score of the rejected response",
  "preference_margins": "by how much the chosen response is better; None is 0",
  "weights": "0 where an entry holds no example; None counts every entry",
  "state": "what the loss carries from batch to batch; None before the first",
  "training": "bool, not an array: False leaves the state as it is",
  # What the modifiers read.
  "policy_chosen_tail_logps": "the part beyond the shorter response's length",
  "policy_rejected_tail_logps": "likewise",
  "reference_chosen_tail_logps": "likewise",
  "reference_rejected_tail_logps": "likewise",
  "chosen_confidence": "mean over tokens of log(pi(y_t) / sum_v pi(v)^2)",
  "rejected_confidence": "likewise",
}


class Weighted(NamedTuple):
  """A metric that counts only some examples, each with its own weight."""

  value: jax.Array
  weight: jax.Array


class LossOutput(NamedTuple):
  """Unreduced result of a loss.

  Attributes:
    loss: f32[...], one value an example.
    metrics: arrays of the same shape, or `Weighted` pairs of them. Keys are
      those of TRL, so that curves can be laid over each other.
    weights: f32[...] or None; how much each example counts in the mean of
      `loss`. None counts every example once; sft counts its tokens.
    state: what to hand in as `state` with the next batch; None if the loss
      carries nothing.
    terms: of a mixture, its parts as (loss, weights), coefficients multiplied
      in; the mean of the mixture is the sum of their means.

  `reduce(output)["loss"].mean()` is the mean to minimise. `output.loss.mean()`
  is the same number only where `weights` is None and there are no `terms`.
  """

  loss: jax.Array
  metrics: dict[str, jax.Array | Weighted]
  weights: jax.Array | None = None
  state: Any = None
  terms: tuple[tuple[jax.Array, jax.Array | None], ...] = ()


class Sums(NamedTuple):
  """A mean that has not been divided yet; sums of these add up exactly.

  Scalars, or f[K] with one entry a term of a mixture, whose mean is the sum of
  its terms' means.
  """

  total: jax.Array
  count: jax.Array

  def mean(self) -> jax.Array:
    return (self.total / jnp.maximum(self.count, 1e-9)).sum()


def reduce(
  output: LossOutput, weights: jax.Array | None = None
) -> dict[str, Sums]:
  """Sums a loss and its metrics over examples; divide once, at the very end.

  Args:
    output: what a loss returned, entries of shape [...].
    weights: f32[...], 0 where an entry holds no example. None: all count once.

  Returns:
    `Sums` by name, "loss" among them. Entries of weight 0 change no number,
    whatever they hold; for no gradient either, what they hold must be finite.
  """
  if weights is None:
    weights = jnp.ones_like(output.loss)

  def add_up(value, own=None):
    weight = weights if own is None else weights * own
    value = jnp.where(weight > 0, value, 0.0)
    return Sums((value * weight).sum(), weight.sum())

  if output.terms:
    terms = [add_up(*term) for term in output.terms]
    sums = {"loss": Sums(*map(jnp.stack, zip(*terms, strict=True)))}
  else:
    sums = {"loss": add_up(output.loss, output.weights)}
  for name, metric in output.metrics.items():
    pair = metric if isinstance(metric, Weighted) else (metric,)
    sums[name] = add_up(*pair)
  return sums


def at_least_float32(x: Any) -> jax.Array:
  """An array in float32, or wider if it is; Python numbers take the dtype of
  what they meet."""
  x = jnp.asarray(x)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return x if x.dtype == wide else x.astype(wide)


def binary_nll(margins: jax.Array, label_smoothing: Any = 0.0) -> jax.Array:
  """Bradley-Terry's negative log-likelihood of the labels, f[...] -> f[...].

      -(1-e) log sigmoid(m) - e log sigmoid(-m)

  for labels that are wrong with probability e; finite for any finite margin.
  """
  right, wrong = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


def tame_expm1(x: jax.Array) -> jax.Array:
  """exp(x) - 1, which goes on linearly beyond 30 (float64: 300).

  So large a number and its gradient stay finite, and so do their squares.
  """
  near, far = _near_and_far(x)
  return jnp.expm1(near) + far


def tame_exp(x: jax.Array) -> jax.Array:
  """exp(x) likewise, as exact where it is small."""
  near, far = _near_and_far(x)
  return jnp.exp(near) + far


def _near_and_far(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  largest = 300.0 if x.dtype == jnp.float64 else 30.0
  return jnp.minimum(x, largest), math.exp(largest) * jax.nn.relu(x - largest)


def mean_logps(logps: jax.Array, lengths: jax.Array) -> jax.Array:
  """Log-prob a token; a response without tokens has 0."""
  return logps / jnp.maximum(lengths, 1)


def pair_metrics(
  chosen_rewards: jax.Array,
  rejected_rewards: jax.Array,
  policy_chosen_logps: jax.Array,
  policy_rejected_logps: jax.Array,
) -> dict[str, jax.Array]:
  """The metrics every paired loss reports, under TRL's names.

  A tie counts as half a success: where policy equals reference the accuracy is
  0.5, as for a coin, and not 0.
  """
  margins = chosen_rewards - rejected_rewards
  return {
    "rewards/chosen": chosen_rewards,
    "rewards/rejected": rejected_rewards,
    "rewards/margins": margins,
    "rewards/accuracies": 0.5 * (1.0 + jnp.sign(margins)),
    "logps/chosen": policy_chosen_logps,
    "logps/rejected": policy_rejected_logps,
  }


def unpaired_metrics(
  rewards: jax.Array, policy_logps: jax.Array, desirable: jax.Array
) -> dict[str, Weighted]:
  """Likewise for labelled completions: each class by itself."""
  return {
    "rewards/chosen": Weighted(rewards, desirable),
    "rewards/rejected": Weighted(rewards, 1 - desirable),
    "logps/chosen": Weighted(policy_logps, desirable),
    "logps/rejected": Weighted(policy_logps, 1 - desirable),
  }


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """Raises ValueError unless value is finite and in [low, high]; traced values
  pass."""
  if isinstance(value, jax.core.Tracer):
    return
  number = float(value)
  if not (math.isfinite(number) and low <= number <= high):
    limits = f"[{low}, {high}]" if math.isfinite(high) else f"[{low}, inf)"
    raise ValueError(f"{name}={value} should lie in {limits}")


def check_choice(name: str, value: str, *choices: str) -> None:
  """Raises ValueError unless value is one of the choices."""
  if value not in choices:
    known = " or ".join(map(repr, choices))
    raise ValueError(f"{name}={value!r} should be {known}")
