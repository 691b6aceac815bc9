"""Whether balanced batches learn as shuffled ones do, on many small problems.

  python scripts/benchmarks/balanced_order.py [--problems=400]

A problem is a logistic regression of 1000 examples of 24 features, of which six
depend on an example's log-normal length, trained for 126 steps of 16 examples
by Adam, in the plain order and in the balanced one of the same seed. Prints the
means of the held-out losses, and of their difference with its standard error.
docs/data.md has the result.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from dpo_jax.data.order import Order

TRAIN, HELD_OUT, FEATURES, STEPS = 1000, 2000, 24, 126


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Lengths, features and labels of +-1, the training examples first."""
  rng = np.random.default_rng(1000 + seed)
  weights, n = rng.normal(size=FEATURES), TRAIN + HELD_OUT
  lengths = rng.lognormal(4, 0.6, n).astype(int)
  x = rng.normal(size=(n, FEATURES))
  x[:, 0] = (np.log(lengths) - 4) / 0.6
  x[:, 1] = (lengths - lengths.mean()) / lengths.std()
  x[:, 2:6] *= np.sqrt(lengths / lengths.mean())[:, None]
  likes = rng.random(n) < 1 / (1 + np.exp(-x @ weights * 0.5))
  return lengths, x, likes * 2.0 - 1


def held_out_loss(seed: int, balance: int) -> float:
  """The loss after training on one problem in one order."""
  lengths, x, y = problem(seed)
  sizes = 10 * lengths[:TRAIN, None]
  order = Order(TRAIN, 16, seed=seed, sizes=sizes, balance=balance)
  weights, mean, square = np.zeros((3, FEATURES))
  for step, some in enumerate(order.members(0, STEPS), 1):
    margins = x[some] @ weights * y[some]
    grad = -((y[some] / (1 + np.exp(margins)))[:, None] * x[some]).mean(axis=0)
    mean = 0.9 * mean + 0.1 * grad
    square = 0.999 * square + 0.001 * grad**2
    scale = np.sqrt(square / (1 - 0.999**step)) + 1e-8
    weights -= 0.1 * mean / (1 - 0.9**step) / scale
  margins = x[TRAIN:] @ weights * y[TRAIN:]
  return float(np.logaddexp(0, -margins).mean())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--problems", type=int, default=400)
  n = parser.parse_args().problems
  plain, balanced = (
    np.array([held_out_loss(seed, b) for seed in range(n)]) for b in (0, 16)
  )
  gap = balanced - plain
  print(
    f"plain {plain.mean():.4f}, balanced {balanced.mean():.4f}, of one run"
    f" +- {plain.std():.4f}; difference {gap.mean():.5f}"
    f" +- {gap.std() / np.sqrt(n):.5f}"
  )


if __name__ == "__main__":
  main()
