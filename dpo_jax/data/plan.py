"""The plan: which examples make up step s, and in which rows they lie.

A plan is a pure function of the lengths, the seed and its settings. The batch
at a step needs nothing but the step: a resumed run continues with one integer,
and any number of hosts computes the same plan.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.batch import Batch, Scores
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  first_fit_decreasing,
  rows_needed,
  token_cost,
)
from dpo_jax.errors import ConfigError

_LOG = logging.getLogger("dpo_jax")
_MAX_EXAMPLES = 64  # a row
_SAMPLE = 32  # steps looked at to choose the shape of a row
_AT_ONCE = 2**18  # examples whose rows are counted side by side


class Planned(NamedTuple):
  batch: Batch  # numpy arrays; of many processes' rows, this one's
  ids: np.ndarray  # i64[B M], index into the examples, -1 for an empty place


class Plan:
  """Batches of exactly `batch_size` examples, packed, by step number.

  `plan[s]` is the batch of step s; `len(plan)` the number of steps. Training
  walks through one permutation per epoch, without a break in between;
  evaluation (`shuffle=False`) sees each example once and fills up the last
  batch with places of weight 0.
  """

  def __init__(
    self,
    examples: Any,
    *,
    batch_size: int,
    steps: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    row_length: int = 0,
    rows_multiple: int = 1,
    scored_multiple: int = 8,
    row_counts: int = 4,
    reference: Scores | None = None,
    mismatch: bool = True,
    local_rows: Callable[[int], np.ndarray] | None = None,
  ):
    """Plans all steps; cost is that of packing lengths, no token is read.

    Args:
      examples: see `store.Examples`.
      batch_size: examples a step.
      steps: number of steps; None: once through the examples.
      seed: of the order.
      shuffle: False keeps the order and stops after one epoch.
      row_length: tokens a row; 0 chooses it from the lengths.
      rows_multiple: rows of a batch are a multiple of this (devices that share
        the batch, times microbatches).
      scored_multiple: likewise for scored tokens a row.
      row_counts: most different numbers of rows that batches may have; each is
        a shape to compile.
      reference: f32[N K] each, to hand out with the batches.
      mismatch: join each example of kind "unpaired" by the completion of the
        example before it in the batch, for a loss that reads that.
      local_rows: of the number of rows of a batch, bool[B], those that this
        process is to fill; the others stay empty. None fills all.

    Raises:
      ConfigError: a row too short for the longest example, or fewer than two
        examples a batch to mismatch.
    """
    self.examples = examples
    self.batch_size = batch_size
    self.seed = seed
    self.shuffle = shuffle
    self.reference = reference
    self._local_rows = local_rows
    self._mismatched = mismatch and examples.kind == "unpaired"
    if self._mismatched and min(batch_size, len(examples)) < 2:
      raise ConfigError(
        "this loss needs batch_size >= 2 (and as many examples): each"
        " completion is also matched with another one's prompt"
      )
    self._steps = -(-len(examples) // batch_size) if steps is None else steps
    self.shape = self._choose_shape(row_length, scored_multiple)
    needed = self._rows_needed(range(self._steps), self.shape)
    needed = -(-needed // rows_multiple) * rows_multiple
    self.row_counts = _few_levels(needed, row_counts)
    self._row_count = self.row_counts[np.searchsorted(self.row_counts, needed)]

  def __len__(self) -> int:
    return self._steps

  def __getitem__(self, step: int) -> Planned:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} of a plan of {len(self)}")
    members = self.members(step)
    shape = self.shape
    batch = empty_batch(int(self._row_count[step]), shape)
    ids = np.full(batch.weights.shape, -1, np.int64)
    others = self._others(members) if self._mismatched else members
    local = self._local_rows and self._local_rows(len(ids))
    for row, places in enumerate(self._rows(step)):
      ids[row, : len(places)] = members[places]
      if local is None or local[row]:
        examples = (self._example(members[i], others[i]) for i in places)
        fill_row(batch, row, examples)
    if self.reference is not None:
      batch = batch._replace(reference=self._known(ids))
    return Planned(batch, ids)

  def members(self, step: int) -> np.ndarray:
    """Indices of the examples of a step, i64[batch_size] (fewer at the end of
    an unshuffled plan)."""
    n, start = len(self.examples), step * self.batch_size
    places = np.arange(start, start + self.batch_size)
    if not self.shuffle:
      return places[places < n]
    epochs, places = np.divmod(places, n)
    for epoch in range(epochs[0], epochs[-1] + 1):
      here = epochs == epoch
      places[here] = _permutation(self.seed, epoch, n)[places[here]]
    return places

  def rows(self, step: int) -> int:
    """Rows of a step's batch, its shape but for what all batches share; for all
    hosts together."""
    return int(self._row_count[step])

  def lengths(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a step's prompts, i32[n], and of their responses, i32[n K],
    mismatched ones included; for all hosts together."""
    members = self.members(step)
    x = self.examples
    lengths = x.lengths[members]
    if self._mismatched:
      lengths[:, 1] = x.chosen_lengths[self._others(members)]
    return x.prompt_lengths[members], lengths

  def tokens(self, step: int) -> int:
    """Row tokens of a step that are not padding; for all hosts together."""
    prompts, lengths = self.lengths(step)
    return int(token_cost(prompts, *lengths.T).sum())

  def fill(self) -> float:
    """Share of row tokens, over all steps, that are not padding."""
    used = sum(map(self.tokens, range(len(self))))
    return used / self.row_tokens()

  def row_tokens(self) -> int:
    """Tokens through the layers over all steps, padding included."""
    return int(self._row_count.sum()) * self.shape.tokens

  def _known(self, ids: np.ndarray) -> Scores:
    """The reference's scores of a batch; 0 in empty places."""

    def pick(x):
      found = np.where(ids[..., None] >= 0, x[np.maximum(ids, 0)], 0)
      return found.astype(np.float32)

    return Scores(*(None if x is None else pick(x) for x in self.reference))

  def _others(self, members: np.ndarray) -> np.ndarray:
    """Whose completion each member is mismatched with: that of the nearest
    other example before it in the batch, around its end; of the data, where a
    batch repeats one example only."""
    others = np.roll(members, 1)
    for i in np.flatnonzero(others == members):
      back = np.roll(members[::-1], i)  # i - 1, i - 2, ... around the end
      different = back[back != members[i]]
      before = (members[i] - 1) % len(self.examples)
      others[i] = different[0] if len(different) else before
    return others

  def _example(self, e: int, other: int) -> Example:
    x = self.examples
    first, second, *rest = map(
      functools.partial(x.response, e), range(x.lengths.shape[1])
    )
    if self._mismatched:
      second = x.chosen(other)
    return Example(
      x.prompt(e), first, second, bool(x.desirable[e]), tuple(rest)
    )

  def _rows(self, step: int) -> list[list[int]]:
    tokens, scored = self._sizes(step)
    return first_fit_decreasing(tokens.tolist(), scored.tolist(), self.shape)

  def _rows_needed(self, steps: Sequence[int], shape: RowShape) -> np.ndarray:
    """`len(_rows(step))` of many steps at once, i64[S]."""
    needed = np.zeros(len(steps), np.int64)
    at_once = max(1, _AT_ONCE // self.batch_size)
    for i in range(0, len(steps), at_once):
      some = steps[i : i + at_once]
      sizes = np.zeros((2, len(some), self.batch_size), np.int64)
      for k, step in enumerate(some):
        tokens, scored = self._sizes(step)
        sizes[:, k, : len(tokens)] = tokens, scored
      needed[i : i + at_once] = rows_needed(*sizes, shape)
    return needed

  def _sizes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Row tokens and scored tokens of a step's examples, i[n] each."""
    prompts, lengths = self.lengths(step)
    return token_cost(prompts, *lengths.T), lengths.sum(axis=1)

  def _choose_shape(self, row_length: int, multiple: int) -> RowShape:
    x = self.examples
    lengths = x.lengths
    if self._mismatched:
      lengths = lengths.copy()
      lengths[:, 1] = x.chosen_lengths.max()
    tokens = token_cost(x.prompt_lengths, *lengths.T)
    longest = int(tokens.max())
    widest = _round_up(int(lengths.sum(axis=1).max()), multiple)
    most = min(
      _MAX_EXAMPLES,
      self.batch_size,
      max(1, len(x)),
      longest // tokens.min() * 4,
    )
    if row_length and row_length < longest:
      worst = int(x.rows[int(tokens.argmax())])
      raise ConfigError(
        f"row_length={row_length} is too short: the example of data row"
        f" {worst} takes {longest} tokens; lower max_length or raise row_length"
      )
    least = _round_up(longest, 64 if longest > 64 else 16)
    sizes = [row_length] if row_length else [least, 2 * least, 4 * least]
    steps = np.unique(
      np.linspace(0, self._steps - 1, min(_SAMPLE, self._steps)).astype(int)
    ).tolist()

    def rows(shape):
      return int(self._rows_needed(steps, shape).sum())

    # Longer rows pack better and cost more attention: worth it from 5 % on.
    best, shape = np.inf, None
    for t in sizes:
      option = RowShape(t, t, int(most), lengths.shape[1])
      cost = rows(option) * t
      if cost < 0.95 * best:
        best, shape = cost, option
    # The narrower the scored part, the smaller the head's share and the more
    # rows are needed. A scored token costs about half of a row token.
    options = {
      _round_up(int(s), multiple) for s in np.linspace(widest, shape.tokens, 9)
    }
    best, chosen = np.inf, shape
    for s in sorted(options):
      option = dataclasses.replace(shape, scored=s)
      cost = rows(option) * (option.tokens + 0.5 * s)
      if cost < best:
        best, chosen = cost, option
    return chosen


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _few_levels(needed: np.ndarray, most: int) -> np.ndarray:
  """At most `most` row counts, sorted, that cover all needed ones."""
  levels = np.unique(needed)
  if len(levels) <= most:
    return levels
  quantiles = np.linspace(0, 1, most + 1)[1:]
  return np.unique(np.quantile(needed, quantiles, method="higher"))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  return np.random.default_rng([seed, int(epoch)]).permutation(n)
