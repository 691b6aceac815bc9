"""Lists of overrides, and what can be made of them.

An override is a dict of settings, {"loss.beta": 0.1, "optim.warmup": 0.0}; a
list of them is one run each. Lists are joined by `+`.
"""

import itertools
from collections.abc import Iterable
from typing import Any

from dpo_jax.errors import ConfigError

Override = dict[str, Any]


def listed(key: str, *values: Any) -> list[Override]:
  """One setting at each of its values.

  >>> listed("loss.beta", 0.1, 0.3)
  [{'loss.beta': 0.1}, {'loss.beta': 0.3}]
  """
  return [{key: value} for value in values]


def product(*lists: Iterable[Override]) -> list[Override]:
  """Each of the first with each of the others; the last changes fastest.

  Raises:
    ConfigError: two lists set the same key.
  """
  return [_merged(parts) for parts in itertools.product(*lists)]


def zipped(*lists: Iterable[Override]) -> list[Override]:
  """The first of each list together, the second of each, and so on.

  Raises:
    ConfigError: the lists are not equally long, or two set the same key.
  """
  lists = [list(x) for x in lists]
  if len({len(x) for x in lists}) > 1:
    lengths = " and ".join(str(len(x)) for x in lists)
    raise ConfigError(f"zipped lists should be equally long, not {lengths}")
  return [_merged(parts) for parts in zip(*lists, strict=True)]


def _merged(parts: Iterable[Override]) -> Override:
  merged: Override = {}
  for part in parts:
    if both := merged.keys() & part.keys():
      raise ConfigError(
        f"{min(both)!r} is set by two of the lists of a sweep; one should be"
        " enough"
      )
    merged |= part
  return merged
