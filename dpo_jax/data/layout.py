"""Which examples of a step lie in which row; decided by lengths alone."""

from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.order import Order
from dpo_jax.data.pack import spread, token_cost
from dpo_jax.errors import ConfigError

MAX_EXAMPLES = 64  # a row
ROW_LIMIT = 2**14  # tokens of a row where its length is free, about


class Layout(NamedTuple):
  """Of n steps of b examples each; -1 and lengths of 0 where there is none."""

  members: np.ndarray  # i64[n b], index into the examples
  prompts: np.ndarray  # i32[n b], lengths
  lengths: np.ndarray  # i32[n b K], of responses, mismatched ones included
  rows: np.ndarray  # i64[n b]
  needs: (
    np.ndarray
  )  # i64[n 3]: rows, and the most tokens and scored ones of one
  most: int  # examples in a row

  def tokens(self) -> np.ndarray:
    """i64[n], row tokens that are not padding."""
    return _cost(self.prompts, self.lengths).sum(axis=1)

  def scored(self) -> np.ndarray:
    """i64[n], scored tokens."""
    return self.lengths.sum(axis=(1, 2))


class Layouts:
  """Packs the steps of an order into rows.

  Where the length of a row is free, all steps have as few rows as the multiple
  and `ROW_LIMIT` allow, each as long as it must be: one row always fits what
  two would split unevenly. Where it is given, a step has as many as it needs.
  """

  def __init__(
    self,
    examples: Any,
    *,
    batch_size: int,
    row_length: int,
    rows_multiple: int,
    mismatched: bool,
    **order: Any,
  ):
    """Args:
    examples: see `store.Examples`.
    batch_size: examples a step.
    row_length: tokens a row; 0 leaves it free.
    rows_multiple: rows of a step are a multiple of this.
    mismatched: the second response of each example is the first of the one
      before it in the batch.
    **order: settings of `order.Order`.

    Raises:
      ConfigError: a row too short for the longest example.
    """
    self.examples = examples
    self.mismatched = mismatched
    self._row_length = row_length
    self._multiple = rows_multiple
    tokens, scored = self._sizes()
    if row_length:
      self._check(row_length, tokens)
    self._least_rows = self._free_rows(batch_size, tokens)
    # Row tokens and scored ones, for both are to be filled.
    sizes = np.stack([_relative(tokens), _relative(scored)], axis=1)
    self.order = Order(len(examples), batch_size, sizes=sizes, **order)

  def of(self, start: int, stop: int) -> Layout:
    """The layout of the steps [start, stop)."""
    members, x = self.order.members(start, stop), self.examples
    prompts, lengths = x.prompt_lengths[members], x.lengths[members]
    if self.mismatched:
      lengths[..., 1] = x.chosen_lengths[self.others(members)]
    prompts[members < 0] = 0
    lengths[members < 0] = 0
    packed = self._pack(_cost(prompts, lengths), lengths.sum(axis=2))
    return Layout(members, prompts, lengths, *packed)

  def others(self, members: np.ndarray) -> np.ndarray:
    """Whose completion each member i64[n b] is mismatched with: that of the
    nearest other example before it in the batch, around its end; of the data,
    where a batch repeats one example only."""
    others = np.roll(members, 1, axis=1)
    odd = ((others == members) | (members < 0)).any(axis=1)
    for step in np.flatnonzero(odd):
      here = members[step][members[step] >= 0]
      others[step, : len(here)] = self._others(here)
    return others

  def _others(self, members: np.ndarray) -> np.ndarray:
    others = np.roll(members, 1)
    for i in np.flatnonzero(others == members):
      back = np.roll(members[::-1], i)  # i - 1, i - 2, ... around the end
      different = back[back != members[i]]
      before = (members[i] - 1) % len(self.examples)
      others[i] = different[0] if len(different) else before
    return others

  def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
    """Row tokens and scored tokens of each example, i64[N]; a mismatched
    completion counts as its own, for each is another's once."""
    x = self.examples
    lengths = x.lengths.astype(np.int64)
    if self.mismatched:
      lengths[:, 1] = lengths[:, 0]
    return _cost(x.prompt_lengths, lengths), lengths.sum(axis=1)

  def _check(self, row_length: int, tokens: np.ndarray) -> None:
    x = self.examples
    if self.mismatched:
      tokens = tokens + x.chosen_lengths.max(initial=0) - x.chosen_lengths
    longest = int(tokens.max(initial=0))
    if row_length < longest:
      worst = int(x.rows[int(tokens.argmax())])
      raise ConfigError(
        f"row_length={row_length} is too short: the example of data row"
        f" {worst} takes {longest} tokens; lower max_length or raise row_length"
      )

  def _free_rows(self, batch_size: int, tokens: np.ndarray) -> int:
    """Rows of every step, if their length is free; else the fewest."""
    least = -(-batch_size // MAX_EXAMPLES)
    if not self._row_length and len(tokens):
      limit = max(ROW_LIMIT, int(tokens.max()))
      least = max(least, -(-int(tokens.mean() * batch_size) // limit))
    return -(-least // self._multiple) * self._multiple

  def _pack(
    self, tokens: np.ndarray, scored: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, int]:
    """`rows`, `needs` and `most` for examples of i[n b] tokens."""
    multiple, limit = self._multiple, self._row_length
    count = np.full(len(tokens), self._least_rows)
    if limit:
      least = -(-tokens.sum(axis=1) // (limit * multiple)) * multiple
      count = np.maximum(count, least)
    rows = np.zeros(tokens.shape, np.int64)
    loads = np.zeros((len(tokens), 3), np.int64)
    sizes = tokens, scored, (tokens > 0).astype(np.int64)
    pending = np.arange(len(tokens))
    while len(pending):
      for n in np.unique(count[pending]):
        some = pending[count[pending] == n]
        rows[some] = spread(tokens[some], scored[some], int(n), MAX_EXAMPLES)
        for k, x in enumerate(sizes):
          loads[some, k] = _row_sums(rows[some], x[some], n).max(axis=1)
      # With a row for each example, the longest fits.
      pending = np.flatnonzero(loads[:, 0] > limit) if limit else pending[:0]
      count[pending] += multiple
    return rows, np.column_stack([count, loads[:, :2]]), int(loads[:, 2].max())


def _cost(prompts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """i64, row tokens of examples; 0 of none, which has no prompt."""
  wide = lengths.astype(np.int64)
  cost = token_cost(prompts, *np.moveaxis(wide, -1, 0))
  return np.where(prompts > 0, cost, 0)


def _relative(sizes: np.ndarray) -> np.ndarray:
  """i64, in 1024ths of the mean, rounded."""
  return sizes * 1024 * len(sizes) // max(int(sizes.sum()), 1)


def _row_sums(rows: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
  """Sums of x i[steps b] over the examples of each of n rows, i64[steps n]."""
  at = rows + n * np.arange(len(rows))[:, None]
  sums = np.bincount(at.reshape(-1), x.reshape(-1), minlength=n * len(rows))
  return sums.reshape(len(rows), n).astype(np.int64)
