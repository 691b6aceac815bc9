"""Few shapes for many batches: each is compiled, and what it pads is wasted."""

import numpy as np

# Of the work of a scored token (head) in that of a row token (layers).
HEAD = 0.5
# A further shape must save this share of all the work, and that of so many
# batches: it has to be compiled.
_LEAST_SHARE, _LEAST_BATCHES = 0.005, 4


def choose(needs: np.ndarray, most: int) -> np.ndarray:
  """Shapes (rows, row tokens, scored tokens a row) for batches that need these.

  All batches begin in one group, whose shape is the largest of each number.
  The cut that saves most, of any group at any number, is made, and the next,
  until there are `most` groups or no cut is worth a compilation.

  Args:
    needs: i[n 3], what each batch needs at least.
    most: shapes.

  Returns:
    i64[shapes 3], from the least work to the most; each batch fits the last of
    a group, see `assign`.
  """
  values, counts = np.unique(needs, axis=0, return_counts=True)
  groups = [np.arange(len(values))]
  total = (work(values) * counts).sum()
  least = max(_LEAST_SHARE * total, _LEAST_BATCHES * total / counts.sum())
  cuts = [_best_cut(values, counts, groups[0])]
  while len(groups) < most:
    best = max(range(len(groups)), key=lambda i: cuts[i][0])
    saved, left, right = cuts[best]
    if saved < least:
      break
    groups[best : best + 1] = left, right
    cuts[best : best + 1] = (
      _best_cut(values, counts, group) for group in (left, right)
    )
  shapes = np.unique([values[g].max(axis=0) for g in groups], axis=0)
  return shapes[np.argsort(work(shapes), kind="stable")].astype(np.int64)


def assign(needs: np.ndarray, shapes: np.ndarray) -> np.ndarray:
  """For each batch the shape of least work that it fits, i64[n]."""
  fits = (needs[:, None] <= shapes).all(axis=2)
  return np.where(fits, work(shapes), np.inf).argmin(axis=1)


def work(shapes: np.ndarray) -> np.ndarray:
  """What a batch of each shape costs, in row tokens."""
  rows, tokens, scored = np.moveaxis(shapes, -1, 0)
  return rows * (tokens + HEAD * scored)


def _best_cut(values, counts, group):
  """(saved, left, right) of the best cut of a group in two, by one number."""
  best = 0.0, group, group
  here, n = values[group], counts[group]
  whole = work(here.max(axis=0)) * n.sum()
  for axis in range(here.shape[1]):
    order = np.argsort(here[:, axis], kind="stable")
    sorted_here, weight = here[order], np.cumsum(n[order])
    low = np.maximum.accumulate(sorted_here)[:-1]
    high = np.maximum.accumulate(sorted_here[::-1])[::-1][1:]
    parts = work(low) * weight[:-1] + work(high) * (weight[-1] - weight[:-1])
    if len(parts) and whole - parts.min() > best[0]:
      at = int(parts.argmin()) + 1
      best = whole - parts.min(), group[order[:at]], group[order[at:]]
  return best
