"""The order: which examples make up which step, without looking at tokens.

Training walks through one permutation per epoch, without a break in between.
Balanced, the examples of every few batches are dealt out anew among these, so
that all take about as much room: each batch gets one of the longest, one of the
next, and so on, as stratified sampling does. An epoch still shows each example
once, and each of its batches is as likely as any other to hold an example.
"""

import functools

import numpy as np
from scipy.optimize import linear_sum_assignment

_ROUNDS = 64  # more are slow, and even batches of so many


class Order:
  """A pure function of the number of examples, the seed and its settings."""

  def __init__(
    self,
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    sizes: np.ndarray | None = None,
    balance: int = 0,
  ):
    """Args:
    n: examples there are.
    batch_size: examples a step.
    seed: of the permutations.
    shuffle: False keeps the order of the examples and ends after one epoch.
    sizes: i64[n d], what is to be balanced, see `deal`; needed where
        `balance` is above 0.
    balance: batches among which examples are dealt out; 0 or 1: none are.
    """
    self.n, self.batch_size, self.seed = n, batch_size, seed
    self.shuffle = shuffle
    self.sizes = sizes
    self.window = balance if shuffle and balance > 1 else 1
    self._windows = functools.lru_cache(maxsize=8)(self._deal_window)

  def members(self, first: int, stop: int) -> np.ndarray:
    """Of the steps [first, stop) the examples, i64[steps batch_size]; -1 behind
    the last of an unshuffled order. Costs what a window costs, at any step."""
    if self.window == 1:
      return self._as_shuffled(first, stop)
    w = self.window
    numbers = range(first // w, -(-stop // w))
    found = np.concatenate([self._windows(k) for k in numbers])
    return found[first - numbers[0] * w :][: stop - first]

  def _as_shuffled(self, first: int, stop: int) -> np.ndarray:
    places = np.arange(first * self.batch_size, stop * self.batch_size)
    if not self.shuffle:
      found = np.where(places < self.n, places, -1)
    else:
      epochs, at = np.divmod(places, self.n)
      found = np.empty_like(places)
      for e in np.unique(epochs):
        mine = epochs == e
        found[mine] = _permutation(self.seed, int(e), self.n)[at[mine]]
    return found.reshape(-1, self.batch_size)

  def _deal_window(self, k: int) -> np.ndarray:
    """The batches of window k. What of it belongs to one epoch is dealt out
    within that epoch, so that each remains a permutation."""
    w, b = self.window, self.batch_size
    start = k * w * b
    found = self._as_shuffled(k * w, k * w + w).reshape(-1)
    places = np.arange(start, start + w * b)
    batches, epochs = (places - start) // b, places // self.n
    for e in np.unique(epochs):
      mine = np.flatnonzero(epochs == e)
      rng = np.random.default_rng([self.seed, int(e), k])
      room = np.bincount(batches[mine], minlength=w)
      to = deal(self.sizes[found[mine]], room, rng)
      # Within a batch the order stays that of the permutation.
      found[mine] = found[mine][np.argsort(to, kind="stable")]
    return found.reshape(w, b)


def deal(
  sizes: np.ndarray, room: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Deals things out so that every hand's sums, for its room, are about equal.

  Largest first, a round at a time: each hand takes one, so that the squares of
  the sums so far become least (an assignment problem: of what a hand adds to
  its square only `sums @ size` depends on who takes what). A hand of less room
  sits out of rounds. In more than `_ROUNDS` rounds each takes several, a large
  one with a small one.

  Args:
    sizes: i64[n d], of each thing by d measures that count alike. Integers, so
      that nothing rounds and every machine deals the same.
    room: i[hands], how many each is to get; they add up to n.
    rng: says who is first where it makes no difference.

  Returns:
    i64[n], the hand of each thing.
  """
  largest = np.argsort(-sizes.sum(axis=1), kind="stable")
  to = np.empty(len(sizes), np.int64)
  sums = np.zeros((len(room), sizes.shape[1]), np.int64)
  at, rounds = 0, int(room.max())
  if (room == rounds).all():
    rounds = min(rounds, _ROUNDS)
  for r in range(rounds):
    # Rounds that a hand takes part in, evenly over all.
    takes = (r + 1) * room // rounds - r * room // rounds
    hands = rng.permutation(np.flatnonzero(takes))
    each = int(takes.max())
    taken = largest[at : at + each * len(hands)].reshape(each, -1).copy()
    at += taken.size
    taken[1::2] = taken[1::2, ::-1]
    parts = sizes[taken].sum(axis=0)
    i, j = linear_sum_assignment(sums[hands] @ parts.T)
    to[taken[:, j]] = hands[i]
    sums[hands[i]] += parts[j]
    sums[takes == 0] += parts.sum(axis=0) // len(hands)
  return to


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(n)
