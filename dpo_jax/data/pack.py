"""Packs examples into mirrored rows; numpy only. See `dpo_jax/batch.py`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.batch import Batch


class Example(NamedTuple):
  """Token ids of one example; an empty `second` leaves branch 1 empty."""

  prompt: np.ndarray  # i32[p], p >= 1
  first: np.ndarray  # i32[r], r >= 1
  second: np.ndarray  # i32[q], q >= 0
  desirable: bool = True


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Capacity of a row: what is static for the compiler."""

  tokens: int
  scored: int
  examples: int


def token_cost(prompt, first, second):
  """Row tokens an example takes: its branches, and the prompt but its last
  token, of which each branch has a copy. Works on ints and on arrays."""
  return prompt - 1 + first + second


def first_fit_decreasing(
  tokens: Sequence[int], scored: Sequence[int], shape: RowShape
) -> list[list[int]]:
  """Assigns examples to rows: largest first, each to the first row it fits.

  Args:
    tokens: row tokens of each example.
    scored: scored tokens of each example.
    shape: capacity of a row; every example must fit an empty one.

  Returns:
    For each row the indices of its examples. Ties keep their order, so the
    result is a pure function of the arguments.
  """
  rows: list[list[int]] = []
  free: list[list[int]] = []
  for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
    t, s = tokens[i], scored[i]
    n = next(
      (
        n
        for n, (left_t, left_s, places) in enumerate(free)
        if t <= left_t and s <= left_s and places
      ),
      len(rows),
    )
    if n == len(rows):
      rows.append([])
      free.append([shape.tokens, shape.scored, shape.examples])
    rows[n].append(i)
    free[n][0] -= t
    free[n][1] -= s
    free[n][2] -= 1
  return rows


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
    slot=np.full((rows, s), 2 * m, np.int32),
    weights=zeros(m, np.float32),
    desirable=zeros(m, bool),
  )


def fill_row(batch: Batch, row: int, examples: Iterable[Example]) -> None:
  """Writes examples side by side into one row of a numpy batch.

  Raises:
    ValueError: an example without prompt or response tokens, or more than the
      row holds.
  """
  at = scored = 0
  for place, example in enumerate(examples):
    p, r, q = len(example.prompt), len(example.first), len(example.second)
    if p < 1 or r < 1:
      raise ValueError(
        f"an example needs a prompt and a response token, got {p} and {r}"
      )
    start, end = at + q, at + q + p - 1  # of the prompt, without its last token
    stop = end + r
    if (
      stop > batch.tokens.shape[1]
      or scored + r + q > batch.source.shape[1]
      or place >= batch.weights.shape[1]
    ):
      raise ValueError("these examples do not fit in one row")
    here = slice(at, stop)
    index = np.arange(at, stop)
    last = example.prompt[-1:]
    batch.tokens[row, here] = np.concatenate(
      [
        np.concatenate([last, example.second[:-1]])[::-1] if q else [],
        example.prompt[:-1],
        last,
        example.first[:-1],
      ]
    )
    # Before the prompt, positions count away from it.
    batch.positions[row, here] = np.where(
      index < start, p - 1 + (start - 1 - index), index - start
    )
    batch.key_start[row, here] = np.where(index < start, index, start)
    batch.key_end[row, here] = np.where(index < start, end, index + 1)
    for branch, source, target in (
      (0, end + np.arange(r), example.first),
      (1, start - 1 - np.arange(q), example.second),
    ):
      to = slice(scored, scored + len(target))
      batch.source[row, to] = source
      batch.target[row, to] = target
      batch.slot[row, to] = 2 * place + branch
      scored += len(target)
    batch.weights[row, place] = 1.0
    batch.desirable[row, place] = example.desirable
    at = stop
