"""Packs examples into mirrored rows; numpy only. See `dpo_jax/batch.py`."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dpo_jax.batch import Batch


class Example(NamedTuple):
  """Token ids of one example; an empty `second` leaves branch 1 empty."""

  prompt: np.ndarray  # i32[p], p >= 1
  first: np.ndarray  # i32[r], r >= 1
  second: np.ndarray  # i32[q], q >= 0
  desirable: bool = True
  rest: tuple[np.ndarray, ...] = ()  # further responses of a ranking
  margin: float = 0.0

  @property
  def responses(self) -> tuple[np.ndarray, ...]:
    return self.first, self.second, *self.rest


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Capacity of a row: what is static for the compiler."""

  tokens: int
  scored: int
  examples: int
  branches: int = 2  # responses an example has at most


def token_cost(prompt, first, second, *rest):
  """Row tokens an example takes: its branches, and the prompt but its last
  token, of which each branch has a copy. The prompt is there once for every two
  responses. Works on ints and on arrays."""
  cost = prompt - 1 + first + second
  for i in range(0, len(rest), 2):
    pair = sum(rest[i : i + 2])
    cost = cost + pair + (prompt - 1) * (pair > 0)
  return cost


def spread(
  tokens: np.ndarray, scored: np.ndarray, rows: int, most: int
) -> np.ndarray:
  """Spreads the examples of batches over rows, as evenly as can be.

  Largest first, each to the row that it leaves least full, where full is the
  more so of row tokens and of scored ones (longest-processing-time-first;
  Graham 1969, SIAM J. Appl. Math. 17). Many batches are done at a time.

  Args:
    tokens: i[n m], row tokens of the m examples of n batches; 0 for none.
    scored: i[n m], scored ones.
    rows: of each batch.
    most: examples a row may hold; `rows * most >= m`.

  Returns:
    i64[n m], the row of each example: a pure function of the arguments.
  """
  n, m = tokens.shape
  if rows == 1:
    return np.zeros((n, m), np.int64)
  shares = [x / np.maximum(x.sum(axis=1), 1)[:, None] for x in (tokens, scored)]
  order = np.argsort(-sum(shares), axis=1, kind="stable")
  # Axes in the order of use: one example of each batch at a time.
  t, s = (np.take_along_axis(x, order, 1).T.copy() for x in shares)
  full_t, full_s, taken = np.zeros((3, n, rows))
  chosen = np.empty((m, n), np.int64)
  batches = np.arange(n)
  for i in range(m):
    after = np.maximum(full_t + t[i, :, None], full_s + s[i, :, None])
    after[taken >= most] = np.inf
    row = chosen[i] = after.argmin(axis=1)
    at = batches, row
    full_t[at] += t[i]
    full_s[at] += s[i]
    taken[at] += 1
  to = np.empty((n, m), np.int64)
  np.put_along_axis(to, order, chosen.T, axis=1)
  return to


def empty_batch(rows: int, shape: RowShape) -> Batch:
  """A batch of padding only, as numpy arrays to be filled."""

  def zeros(n, dtype=np.int32):
    return np.zeros((rows, n), dtype)

  t, s, m = shape.tokens, shape.scored, shape.examples
  return Batch(
    tokens=zeros(t),
    positions=zeros(t),
    key_start=zeros(t),
    key_end=zeros(t),
    source=zeros(s),
    target=zeros(s),
    slot=np.full((rows, s), shape.branches * m, np.int32),
    lengths=np.zeros((rows, m, shape.branches), np.int32),
    weights=zeros(m, np.float32),
    desirable=zeros(m, bool),
    margins=zeros(m, np.float32),
  )


def fill_row(batch: Batch, row: int, examples: Iterable[Example]) -> None:
  """Writes examples side by side into one row of a numpy batch.

  Raises:
    ValueError: an example without prompt or response tokens, or more than the
      row holds.
  """
  at = scored = 0
  for place, example in enumerate(examples):
    lengths = [len(response) for response in example.responses]
    p, r = len(example.prompt), lengths[0]
    if p < 1 or r < 1:
      raise ValueError(
        f"an example needs a prompt and a response token, got {p} and {r}"
      )
    if (
      at + token_cost(p, *lengths) > batch.tokens.shape[1]
      or scored + sum(lengths) > batch.source.shape[1]
      or place >= batch.weights.shape[1]
      or len(lengths) > batch.lengths.shape[2]
    ):
      raise ValueError("these examples do not fit in one row")
    for branch in range(0, len(lengths), 2):
      two = (*example.responses[branch : branch + 2], example.prompt[:0])[:2]
      if not sum(map(len, two)):
        continue
      slot = place * batch.lengths.shape[2] + branch
      at, scored = _fill_pair(batch, row, at, scored, slot, example.prompt, two)
    batch.lengths[row, place, : len(lengths)] = lengths
    batch.weights[row, place] = 1.0
    batch.desirable[row, place] = example.desirable
    batch.margins[row, place] = example.margin


def _fill_pair(batch, row, at, scored, slot, prompt, two) -> tuple[int, int]:
  """Writes a prompt between two of its responses; returns where it ends, in
  row tokens and in scored ones."""
  first, second = two
  p, r, q = len(prompt), len(first), len(second)
  start, end = at + q, at + q + p - 1  # of the prompt, without its last token
  stop = end + r
  here = slice(at, stop)
  index = np.arange(at, stop)
  last = prompt[-1:]
  batch.tokens[row, here] = np.concatenate(
    [
      np.concatenate([last, second[:-1]])[::-1] if q else [],
      prompt[:-1],
      np.concatenate([last, first[:-1]]) if r else [],
    ]
  )
  # Before the prompt, positions count away from it.
  batch.positions[row, here] = np.where(
    index < start, p - 1 + (start - 1 - index), index - start
  )
  batch.key_start[row, here] = np.where(index < start, index, start)
  batch.key_end[row, here] = np.where(index < start, end, index + 1)
  for branch, source, target in (
    (0, end + np.arange(r), first),
    (1, start - 1 - np.arange(q), second),
  ):
    to = slice(scored, scored + len(target))
    batch.source[row, to] = source
    batch.target[row, to] = target
    batch.slot[row, to] = slot + branch
    scored += len(target)
  return stop, scored
