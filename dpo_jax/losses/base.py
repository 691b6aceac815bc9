"""What a loss is: per-example values out, needs read from its signature.

A loss is a pure function. Its positional parameters, by name, say what it needs
(`INPUTS` is the closed set); its keyword-only parameters are hyper-parameters,
whose defaults stand there and nowhere else. `@register` makes it available to
`make` under its own name, from this package or from anybody's.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Every array a loss may ask for. All have one shape [...], one entry an
# example; log-probs are natural logs summed over the response's tokens.
INPUTS: Mapping[str, str] = {
  "policy_chosen_logps": "log pi(y_w | x), summed over the chosen response",
  "policy_rejected_logps": "log pi(y_l | x), summed over the rejected response",
  "reference_chosen_logps": "log ref(y_w | x)",
  "reference_rejected_logps": "log ref(y_l | x)",
  "chosen_lengths": "scored tokens of the chosen response",
  "rejected_lengths": "scored tokens of the rejected response",
  "policy_logps": "log pi(y | x) of an unpaired completion",
  "reference_logps": "log ref(y | x) of an unpaired completion",
  "policy_kl_logps": "log pi(y' | x), y' the completion of another example",
  "reference_kl_logps": "log ref(y' | x)",
  "desirable": "True where the unpaired completion was liked",
  "weights": "0 where an entry holds no example; None counts every entry",
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
  """

  loss: jax.Array
  metrics: dict[str, jax.Array | Weighted]
  weights: jax.Array | None = None


class Sums(NamedTuple):
  """A mean that has not been divided yet; sums of these add up exactly."""

  total: jax.Array
  count: jax.Array

  def mean(self) -> jax.Array:
    return self.total / jnp.maximum(self.count, 1e-9)


def reduce(
  output: LossOutput, weights: jax.Array | None = None
) -> dict[str, Sums]:
  """Sums a loss and its metrics over examples; divide once, at the very end.

  Args:
    output: what a loss returned, entries of shape [...].
    weights: f32[...], 0 where an entry holds no example. None: all count once.

  Returns:
    `Sums` by name, "loss" among them. Entries of weight 0 change no number,
    whatever they hold.
  """
  if weights is None:
    weights = jnp.ones_like(output.loss)

  def add_up(value, weight):
    value = jnp.where(weight > 0, value, 0.0)
    return Sums((value * weight).sum(), weight.sum())

  own = weights if output.weights is None else weights * output.weights
  sums = {"loss": add_up(output.loss, own)}
  for name, metric in output.metrics.items():
    if isinstance(metric, Weighted):
      sums[name] = add_up(metric.value, weights * metric.weight)
    else:
      sums[name] = add_up(metric, weights)
  return sums


@dataclasses.dataclass(frozen=True)
class Loss:
  """A registered loss with its hyper-parameters fixed; hashable, comparable.

  Call it with arrays by name, of which it takes those it needs and ignores the
  rest, or by position in the order of `needs`.
  """

  name: str
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def function(self) -> Callable[..., LossOutput]:
    return _REGISTRY[self.name]

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of the arrays the loss reads, in the order of its signature."""
    return tuple(_positional(self.function))

  @property
  def needs_reference(self) -> bool:
    return any(name.startswith("reference_") for name in self.needs)

  @property
  def kind(self) -> str:
    """The data it trains on: "paired", "unpaired" or "sft"."""
    if "desirable" in self.needs:
      return "unpaired"
    return "paired" if "policy_rejected_logps" in self.needs else "sft"

  @property
  def batch_coupled(self) -> bool:
    """True where one example's loss depends on the others of the batch."""
    return "weights" in self.needs

  def __call__(self, *arrays: jax.Array, **inputs: jax.Array) -> LossOutput:
    parameters = _positional(self.function)
    inputs |= dict(zip(parameters, arrays, strict=False))
    missing = [
      name
      for name, parameter in parameters.items()
      if name not in inputs and parameter.default is inspect.Parameter.empty
    ]
    if missing:
      raise TypeError(
        f"loss {self.name!r} needs {', '.join(missing)}; given:"
        f" {', '.join(inputs)}"
      )
    taken = {name: inputs[name] for name in parameters if name in inputs}
    return self.function(**taken, **dict(self.options))


_REGISTRY: dict[str, Callable[..., LossOutput]] = {}


def register(function: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
  """Adds a loss to the registry under its function name.

  The registered function computes in float32 whatever comes in (float64 stays
  float64): sums of log-probs lose whole nats in bfloat16.

  Args:
    function: pure, of arrays named as in `INPUTS` and keyword-only
      hyper-parameters, returning a `LossOutput`.

  Raises:
    TypeError: a positional parameter is not one of `INPUTS`, or a keyword-only
      parameter has no default.
    ValueError: another function holds that name.
  """
  name = function.__name__
  for parameter in inspect.signature(function).parameters.values():
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
      if parameter.default is inspect.Parameter.empty:
        raise TypeError(
          f"loss {name!r}: hyper-parameter {parameter.name!r} needs a default"
        )
    elif parameter.name not in INPUTS:
      raise TypeError(
        f"loss {name!r} asks for {parameter.name!r}, which nothing provides;"
        f" known inputs: {', '.join(INPUTS)}"
      )

  @functools.wraps(function)
  def promoted(*args, **kwargs):
    args = [_promote(x) for x in args]
    kwargs = {k: _promote(x) if k in INPUTS else x for k, x in kwargs.items()}
    return function(*args, **kwargs)

  known = _REGISTRY.get(name)
  if known and known.__module__ != function.__module__:
    raise ValueError(
      f"loss {name!r} is already registered by {known.__module__}"
    )
  _REGISTRY[name] = promoted
  return promoted


def make(name: str, **options: Any) -> Loss:
  """Fixes a loss and its hyper-parameters.

  >>> loss = make("dpo", beta=0.2)

  Raises:
    ValueError: unknown name or hyper-parameter, or a value of the wrong type
      or out of range; the message names the known ones.
  """
  known = defaults(name)
  for key, value in options.items():
    if key not in known:
      raise ValueError(
        f"loss {name!r} has no hyper-parameter {key!r}"
        f"{_suggest(key, known)}; it has: {', '.join(known) or 'none'}"
      )
    default = known[key]
    number = isinstance(default, float) and isinstance(value, numbers.Real)
    if isinstance(value, bool) != isinstance(default, bool) or not (
      number or isinstance(value, type(default))
    ):
      raise ValueError(
        f"loss {name!r}: {key}={value!r} should be of type"
        f" {type(default).__name__}"
      )
    if number:
      options[key] = float(value)
  loss = Loss(name, tuple(sorted({**known, **options}.items())))
  # Ranges are checked by the functions themselves, while being traced.
  example = jax.ShapeDtypeStruct((1,), jnp.float32)
  inputs = dict.fromkeys(INPUTS, example)
  out = jax.eval_shape(lambda inputs: loss(**inputs), inputs)
  if not isinstance(out, LossOutput):
    raise ValueError(
      f"loss {name!r} should return losses.LossOutput(loss, metrics), not the"
      " loss alone"
    )
  return loss


def names() -> tuple[str, ...]:
  """Names of all registered losses, sorted."""
  return tuple(sorted(_REGISTRY))


def defaults(name: str) -> dict[str, Any]:
  """Hyper-parameters of a loss and their defaults.

  Raises:
    ValueError: no loss of that name; the message names the known ones.
  """
  if name not in _REGISTRY:
    raise ValueError(
      f"unknown loss {name!r}{_suggest(name, _REGISTRY)}; known losses:"
      f" {', '.join(names())}"
    )
  parameters = inspect.signature(_REGISTRY[name]).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.kind is inspect.Parameter.KEYWORD_ONLY
  }


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """Raises ValueError unless value is finite and in [low, high]; traced values
  pass."""
  if not isinstance(value, numbers.Real):
    return
  if not (math.isfinite(value) and low <= value <= high):
    raise ValueError(f"{name}={value} should lie in [{low}, {high}]")


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


def _positional(function) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(function).parameters
  return {
    name: p
    for name, p in parameters.items()
    if p.kind is not inspect.Parameter.KEYWORD_ONLY
  }


def _promote(x):
  if x is None:
    return None
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _suggest(key: str, known) -> str:
  close = difflib.get_close_matches(key, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""
