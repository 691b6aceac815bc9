"""Answers to mirrored rows and back: what is known of each token travels as
[N K R] (prompt, answer, place) and lies as [B S] where it is computed with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.batch import Batch
from dpo_jax.data.layout import MAX_EXAMPLES, ROW_LIMIT
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  spread,
  token_cost,
)
from dpo_jax.data.plan import BatchShape


class Packed(NamedTuple):
  """A batch (numpy), and whose its scored tokens are."""

  batch: Batch
  example: np.ndarray  # i64[B S], index into the prompts; -1 for padding
  branch: np.ndarray  # i64[B S], which answer to it
  place: np.ndarray  # i64[B S], which token of that
  ids: np.ndarray  # i64[B M], index into the prompts; -1 for an empty place

  def by_token(self, values: np.ndarray) -> np.ndarray:
    """[N K R] -> [B S], 0 in padding."""
    found = values[np.maximum(self.example, 0), self.branch, self.place]
    return np.where(self.example >= 0, found, 0).astype(values.dtype)

  def by_response(self, values: np.ndarray) -> np.ndarray:
    """[N K] -> [B M K], 0 in empty places."""
    found = values[np.maximum(self.ids, 0)]
    return np.where(self.ids[..., None] >= 0, found, 0).astype(values.dtype)

  def scatter(self, tokens: np.ndarray, out: np.ndarray) -> None:
    """Writes [B S] to its places in [N K R]."""
    there = self.example >= 0
    at = self.example[there], self.branch[there], self.place[there]
    out[at] = tokens[there]


class Packer:
  """Packs answers to a fixed number of prompts into one of few shapes.

  The largest holds whatever may come: prompts of the greatest length, and
  answers that were all cut off. The others are equal parts of it, and the first
  that fits is taken; each that occurs is compiled.
  """

  def __init__(
    self,
    prompts: int,
    answers: int,
    *,
    longest_prompt: int,
    max_tokens: int,
    rows_multiple: int = 1,
    scored_multiple: int = 8,
    shapes: int = 4,
  ):
    """Args:
    prompts: most in a batch.
    answers: to each of them.
    longest_prompt: tokens.
    max_tokens: of an answer.
    rows_multiple: rows of a batch are a multiple of this.
    scored_multiple: likewise for scored tokens a row.
    shapes: how many there are.
    """
    k = max(2, answers)
    longest = [max_tokens] * answers + [0] * (k - answers)
    cost = int(token_cost(longest_prompt, *longest))
    least = max(
      -(-prompts // MAX_EXAMPLES), -(-prompts * cost // max(ROW_LIMIT, cost))
    )
    rows = -(-least // rows_multiple) * rows_multiple
    self.most = -(-prompts // rows)  # prompts a row
    tokens, scored = self.most * cost, self.most * sum(longest)
    self.shapes = tuple(
      BatchShape(
        rows,
        RowShape(
          _part(tokens, i, shapes, 16),
          _part(scored, i, shapes, scored_multiple),
          self.most,
          k,
        ),
      )
      for i in range(1, shapes + 1)
    )

  def __call__(
    self,
    prompts: Sequence[np.ndarray],
    responses: Sequence[Sequence[np.ndarray]],
    ids: Sequence[int],
  ) -> Packed:
    """Packs the answers to some prompts.

    Args:
      prompts: i32[p] each, of N.
      responses: for each of them its answers, i32[r] each.
      ids: which of the N.
    """
    rows, k = self.shapes[0].rows, self.shapes[0].row.branches
    lengths = np.zeros((len(ids), k), np.int64)
    for i, n in enumerate(ids):
      own = [len(x) for x in responses[n]]
      lengths[i, : len(own)] = own
    asked = np.array([len(prompts[n]) for n in ids])
    tokens, scored = token_cost(asked, *lengths.T), lengths.sum(axis=1)
    to = spread(tokens[None], scored[None], rows, self.most)[0]
    needs = [np.bincount(to, x, rows).max() for x in (tokens, scored)]
    shape = next(
      s
      for s in self.shapes
      if needs[0] <= s.row.tokens and needs[1] <= s.row.scored
    )
    batch = empty_batch(rows, shape.row)
    members = np.full(batch.weights.shape, -1, np.int64)
    for row in range(rows):
      here = [ids[i] for i in np.flatnonzero(to == row)]
      members[row, : len(here)] = here
      fill_row(batch, row, (_example(prompts[n], responses[n]) for n in here))
    return Packed(batch, *_owners(batch, members), members)


def _part(size: int, i: int, n: int, multiple: int) -> int:
  return -(-size * i // (n * multiple)) * multiple


def _example(prompt: np.ndarray, answers: Sequence[np.ndarray]) -> Example:
  first, second, *rest = (*answers, prompt[:0])[: max(2, len(answers))]
  return Example(prompt, first, second, True, tuple(rest))


def _owners(batch: Batch, ids: np.ndarray) -> tuple[np.ndarray, ...]:
  """(example, branch, place) of the scored tokens; those of a response lie
  side by side, in order."""
  rows, k = batch.lengths.shape[0], batch.lengths.shape[2]
  slots, (row, index) = batch.slot, np.indices(batch.slot.shape)
  first = np.full((rows, batch.lengths[0].size + 1), slots.shape[1])
  np.minimum.at(first, (row, slots), index)
  ids = np.concatenate([ids, np.full((rows, 1), -1)], axis=1)
  place = np.where(slots < first.shape[1] - 1, index - first[row, slots], 0)
  return ids[row, slots // k], slots % k, place
