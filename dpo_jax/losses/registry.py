"""Losses by name: registered by their signature, made from options.

A loss is a pure function. Its positional parameters, by name, say what it needs
(`base.INPUTS` is the closed set); its keyword-only parameters are
hyper-parameters, whose defaults stand there and nowhere else. `@register` makes
it available to `make` under its own name, from this package or from anybody's.
"""

import difflib
import functools
import inspect
import itertools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import INPUTS, LossOutput, at_least_float32

Function = Callable[..., LossOutput]


class Entry(NamedTuple):
  """What the registry knows of a loss beyond its signature."""

  function: Function
  paper: str = ""  # arXiv id
  aggregation: str = "sum"  # of token log-probs: sum, mean, or "scores"
  divergences: bool = False  # a function of h_w - h_l, so f-DPO applies
  state: Callable[[], Any] | None = None  # the state before the first batch


# Options of `make` that are no hyper-parameter of one method. At these values
# they change nothing.
MODIFIERS: Mapping[str, Any] = {
  "divergence": "reverse_kl",
  "divergence_alpha": 0.5,
  "ld_alpha": 1.0,
  "wpo": False,
}

_REGISTRY: dict[str, Entry] = {}


def register(
  function: Function | None = None,
  *,
  paper: str = "",
  aggregation: str = "sum",
  divergences: bool = False,
  state: Callable[[], Any] | None = None,
) -> Any:
  """Adds a loss to the registry under its function name; a decorator.

  The registered function computes in float32 whatever comes in (float64 stays
  float64): sums of log-probs lose whole nats in bfloat16.

  Args:
    function: pure, of inputs named as in `INPUTS` and keyword-only
      hyper-parameters, returning a `LossOutput` with one entry an example. One
      whose examples see each other must name `weights`: it is then given the
      whole global batch, and its empty places.
    paper: arXiv id, for `describe`.
    aggregation: how token log-probs enter, for `describe`.
    divergences: True if the log-ratios enter by their difference alone, so that
      `divergence=` may replace them.
    state: of a loss that names `state`: makes the one before the first batch.

  Raises:
    TypeError: a positional parameter is not one of `INPUTS`, a keyword-only
      parameter has no default or the name of an input or a modifier, both
      scores and log-probs are asked for, or of `state` the parameter and the
      argument only one is there.
    ValueError: another function holds that name.
  """
  if function is None:
    return functools.partial(
      register,
      paper=paper,
      aggregation=aggregation,
      divergences=divergences,
      state=state,
    )
  name = function.__name__
  for parameter in inspect.signature(function).parameters.values():
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
      if parameter.default is inspect.Parameter.empty:
        raise TypeError(
          f"loss {name!r}: hyper-parameter {parameter.name!r} needs a default"
        )
      if parameter.name in MODIFIERS or parameter.name in INPUTS:
        what = "a modifier" if parameter.name in MODIFIERS else "an input"
        raise TypeError(
          f"loss {name!r}: the name {parameter.name!r} is that of {what}"
        )
    elif parameter.name not in INPUTS:
      raise TypeError(
        f"loss {name!r} asks for {parameter.name!r}, which nothing provides;"
        f" known inputs: {', '.join(INPUTS)}"
      )
  reads = {n.rpartition("_")[2] for n in positional(function)}
  if {"scores", "logps"} <= reads:
    raise TypeError(
      f"loss {name!r} asks for scores and log-probs; a model is a reward model"
      " or a policy"
    )
  if ("state" in positional(function)) != (state is not None):
    raise TypeError(
      f"loss {name!r}: a loss that carries state has a parameter 'state' and is"
      " registered with `state=`, which makes the first one"
    )

  @functools.wraps(function)
  def promoted(*args, **kwargs):
    # Too many arguments stay too many, for the function to refuse.
    names = itertools.chain(positional(function), itertools.repeat(""))
    args = [promote(n, x) for n, x in zip(names, args, strict=False)]
    kwargs = {k: promote(k, x) for k, x in kwargs.items()}
    return function(*args, **kwargs)

  known = _REGISTRY.get(name)
  if known and known.function.__module__ != function.__module__:
    raise ValueError(
      f"loss {name!r} is already registered by {known.function.__module__}"
    )
  _REGISTRY[name] = Entry(promoted, paper, aggregation, divergences, state)
  return promoted


def names() -> tuple[str, ...]:
  """Names of all registered losses, sorted."""
  return tuple(sorted(_REGISTRY))


def entry(name: str) -> Entry:
  """What is registered under a name.

  Raises:
    ValueError: no loss of that name; the message names the known ones.
  """
  if name not in _REGISTRY:
    raise ValueError(
      f"unknown loss {name!r}{suggest(name, _REGISTRY)}; known losses:"
      f" {', '.join(names())}"
    )
  return _REGISTRY[name]


def options_of(name: str) -> dict[str, Any]:
  """Hyper-parameters of one registered loss and their defaults."""
  parameters = inspect.signature(entry(name).function).parameters.values()
  return {
    p.name: p.default
    for p in parameters
    if p.kind is inspect.Parameter.KEYWORD_ONLY
  }


def positional(function: Function) -> dict[str, inspect.Parameter]:
  """The parameters that name what a loss needs, in order."""
  parameters = inspect.signature(function).parameters
  return {
    name: p
    for name, p in parameters.items()
    if p.kind is not inspect.Parameter.KEYWORD_ONLY
  }


def checked(where: str, key: str, value: Any, default: Any) -> Any:
  """A value of its default's type; numbers become plain floats.

  Raises:
    ValueError: it has another type.
  """
  number = isinstance(default, float) and isinstance(value, numbers.Real)
  if isinstance(value, bool) != isinstance(default, bool) or not (
    number or isinstance(value, type(default))
  ):
    raise ValueError(
      f"{where}: {key}={value!r} should be of type {type(default).__name__}"
    )
  return float(value) if number else value


def suggest(key: str, known: Any) -> str:
  """ " (did you mean ...?)", or nothing where no known name is close."""
  close = difflib.get_close_matches(key, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def promote(name: str, x: Any) -> Any:
  """An input in float32 at least, a hyper-parameter as a plain number; state
  stays as it is."""
  if x is None or name in ("state", "training"):
    return x
  if name in INPUTS:
    return at_least_float32(x)
  plain = isinstance(x, numbers.Real) and not isinstance(x, bool)
  return float(x) if plain else x


def abstract_inputs() -> dict[str, Any]:
  """One abstract example of every input, to trace a loss with."""
  one = jax.ShapeDtypeStruct((1,), jnp.float32)
  three = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  inputs: dict[str, Any] = {
    name: three if "ranked" in name else one for name in INPUTS
  }
  del inputs["training"]  # a constant, not an array
  return inputs | {"state": None}
