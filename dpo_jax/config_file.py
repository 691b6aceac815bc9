"""For files in `configs/`: the defaults as a ConfigDict, and arg strings."""

import collections
import inspect
from typing import Any

import ml_collections

from dpo_jax import losses
from dpo_jax.config import Config


def defaults(loss: str) -> ml_collections.ConfigDict:
  """Every setting at its default (`dpo_jax/config.py` says what each means).

  `config.loss` has a place for the hyper-parameters of all losses and for the
  modifiers, so that `--config.loss.name` can be switched, also to a mixture as
  "dpo+0.2*sft"; what is left at None is the loss's own default, and setting one
  that the loss does not have is an error.
  """
  config = ml_collections.ConfigDict(Config().to_dict())
  config.loss = ml_collections.ConfigDict({"name": loss})
  options = [losses.defaults(name) for name in losses.names()]
  for option, default in collections.ChainMap(
    losses.MODIFIERS, *options
  ).items():
    config.loss[option] = ml_collections.config_dict.placeholder(type(default))
  return config


def parse_arg(arg: str | None, **spec: Any) -> ml_collections.ConfigDict:
  """Parses the part of `--config=file.py:quick,model=x` behind the colon.

  Args:
    arg: comma-separated `key=value`, or `key` alone for True.
    **spec: known keys and their defaults, which fix the types.

  Raises:
    ValueError: an unknown key or a value of the wrong type.
  """
  caller = inspect.stack()[1].filename
  values = dict(spec)
  for part in filter(None, (arg or "").split(",")):
    key, _, text = part.partition("=")
    if key not in spec:
      raise ValueError(
        f"{caller}: unknown switch {key!r}; known: {', '.join(spec)}"
      )
    kind = type(spec[key])
    if kind is bool:
      if text not in ("", "True", "False", "1", "0"):
        raise ValueError(f"{caller}: {key}={text!r} should be True or False")
      values[key] = text in ("", "True", "1")
    else:
      try:
        values[key] = kind(text)
      except ValueError as e:
        raise ValueError(
          f"{caller}: {key}={text!r} should be of type {kind.__name__}"
        ) from e
  return ml_collections.ConfigDict(values)
