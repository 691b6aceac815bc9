"""From sums to numbers: the one place where means are divided."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax.losses import Sums

# Columns of train rows that depend on the clock and the machine. All others
# are functions of config and data: a resumed run repeats them.
CLOCKED = frozenset(
  {
    "pairs_per_second",  # since the row before, compiling and pauses left out
    "tokens_per_second",  # real ones, no padding; likewise
    "mfu",  # `Run.ideal_flops` a second, as a share of the devices' peak
    "data_wait",  # share of the time in steps until a batch was there
    "goodput",  # seconds of steps that were applied, over all since the start
    "rollout_seconds",  # of a step: answers and their rewards
    "update_seconds",  # of a step: what is learned from them
    "peak_memory_bytes",  # of this host's fullest device, since its start
  }
)


def means(sums: Mapping[str, Sums]) -> dict[str, float]:
  """Divides sums of any number of batches; a metric that counted nothing (a
  batch of one class) is left out.

  Where the reward classes were averaged apart (KTO), their difference is the
  margin.
  """
  host = jax.device_get(dict(sums))
  values = {
    name: float(np.sum(s.total / np.float64(s.count)))
    for name, s in host.items()
    if np.all(np.asarray(s.count) > 0)
  }
  if "rewards/margins" not in values and {
    "rewards/chosen",
    "rewards/rejected",
  } <= set(values):
    values["rewards/margins"] = (
      values["rewards/chosen"] - values["rewards/rejected"]
    )
  return values


def add(parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
  """Adds sums of batches in float64 on the host."""
  total: dict[str, Sums] = {}
  for part in parts:
    for name, s in jax.device_get(dict(part)).items():
      old = total.get(name, Sums(np.float64(0), np.float64(0)))
      total[name] = Sums(
        old.total + np.float64(s.total), old.count + np.float64(s.count)
      )
  return total


def speed(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
  """Medians of the speeds of train rows, their last goodput and their highest
  memory; None where none has any."""
  columns: dict[str, list[float]] = {}
  for row in rows:
    for name in CLOCKED & row.keys():
      columns.setdefault(name, []).append(row[name])
  of = {"goodput": lambda x: x[-1], "peak_memory_bytes": max}
  found = {
    name: float(of.get(name, np.median)(columns[name]))
    for name in sorted(columns)
  }
  return found or None


def accuracy_interval(accuracy: float, n: int) -> tuple[float, float]:
  """95 % Wilson score interval of a share seen in n independent examples."""
  if n == 0:
    return 0.0, 1.0
  z = 1.959964
  centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
  half = (
    z
    / (1 + z * z / n)
    * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
  )
  return centre - half, centre + half
