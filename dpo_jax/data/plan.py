"""The plan: which examples make up step s, and in which rows they lie.

A plan is a pure function of the lengths, the seed and its settings. The batch
at a step needs nothing but the step: a resumed run continues with one integer,
and any number of hosts computes the same plan.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.batch import Batch, Scores
from dpo_jax.data import shapes
from dpo_jax.data.layout import Layout, Layouts
from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.errors import ConfigError

_CHUNK = 2**16  # examples laid out at a time


class Planned(NamedTuple):
  batch: Batch  # numpy arrays; of many processes' rows, this one's
  ids: np.ndarray  # i64[B M], index into the examples, -1 for an empty place


class BatchShape(NamedTuple):
  """What is static for the compiler."""

  rows: int
  row: RowShape


class Plan:
  """Batches of exactly `batch_size` examples, packed, by step number.

  `plan[s]` is the batch of step s; `len(plan)` the number of steps. Training
  walks through one permutation per epoch, without a break in between;
  evaluation (`shuffle=False`) sees each example once and fills up the last
  batch with places of weight 0.

  All batches have one of few `shapes`; see `layout.Layouts` for their rows.
  """

  def __init__(
    self,
    examples: Any,
    *,
    batch_size: int,
    steps: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    balance: int = 16,
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
      balance: shuffled batches among which examples are dealt out so that all
        take about as much room, see `order.Order`; 0: as they were shuffled.
      row_length: tokens a row; 0 chooses it from the lengths.
      rows_multiple: rows of a batch are a multiple of this (devices that share
        the batch, times microbatches).
      scored_multiple: likewise for scored tokens a row.
      row_counts: most different shapes that batches may have; each is to be
        compiled.
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
    self.shuffle = shuffle
    self.reference = reference
    self._local_rows = local_rows
    mismatched = mismatch and examples.kind == "unpaired"
    if mismatched and min(batch_size, len(examples)) < 2:
      raise ConfigError(
        "this loss needs batch_size >= 2 (and as many examples): each"
        " completion is also matched with another one's prompt"
      )
    self._steps = -(-len(examples) // batch_size) if steps is None else steps
    self._layouts = Layouts(
      examples,
      batch_size=batch_size,
      row_length=row_length,
      rows_multiple=rows_multiple,
      mismatched=mismatched,
      seed=seed,
      shuffle=shuffle,
      balance=balance,
    )
    window = self._layouts.order.window
    self._chunk = window * max(1, _CHUNK // (batch_size * window))
    self._cached = functools.lru_cache(maxsize=4)(self._lay_out)
    self._plan_shapes(row_length, scored_multiple, row_counts)

  def __len__(self) -> int:
    return self._steps

  def __getitem__(self, step: int) -> Planned:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} of a plan of {len(self)}")
    members = self.members(step)
    layout, i = self._find(step)
    rows = layout.rows[i, : len(members)]
    others = members
    if self._layouts.mismatched:
      (others,) = self._layouts.others(members[None])
    shape = self.shape_of(step)
    batch = empty_batch(shape.rows, shape.row)
    ids = np.full(batch.weights.shape, -1, np.int64)
    local = self._local_rows and self._local_rows(len(ids))
    for row in range(shape.rows):
      places = np.flatnonzero(rows == row)
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
    (members,) = self._layouts.order.members(step, step + 1)
    return members[members >= 0]

  def shape_of(self, step: int) -> BatchShape:
    """The shape of a step's batch; for all hosts together."""
    return self.shapes[self._shape[step]]

  def lengths(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a step's prompts, i32[n], and of their responses, i32[n K],
    mismatched ones included; for all hosts together."""
    layout, i = self._find(step)
    n = (layout.members[i] >= 0).sum()
    return layout.prompts[i, :n], layout.lengths[i, :n]

  def tokens(self, step: int) -> int:
    """Row tokens of a step that are not padding; for all hosts together."""
    return int(self._tokens[step])

  def fill(self) -> float:
    """Share of row tokens, over all steps, that are not padding."""
    return int(self._tokens.sum()) / self.row_tokens()

  def scored_fill(self) -> float:
    """Share of scored places, over all steps, that are not padding."""
    places = [s.rows * s.row.scored for s in self.shapes]
    return int(self._scored.sum()) / int(np.array(places)[self._shape].sum())

  def row_tokens(self) -> int:
    """Tokens through the layers over all steps, padding included."""
    tokens = [s.rows * s.row.tokens for s in self.shapes]
    return int(np.array(tokens)[self._shape].sum())

  def describe(self) -> list[str]:
    """Lines that say the shapes, how often each is used and how full it is."""
    return [
      f"packing     {self.fill():.1%} of row tokens filled,"
      f" {self.scored_fill():.1%} of scored places",
      *(
        f"  {int((self._shape == i).sum()):8d}  steps of {s.rows} x"
        f" {s.row.tokens} tokens, {s.row.scored} of a row's scored, up to"
        f" {s.row.examples} examples"
        for i, s in enumerate(self.shapes)
      ),
    ]

  def _known(self, ids: np.ndarray) -> Scores:
    """The reference's scores of a batch; 0 in empty places."""

    def pick(x):
      found = np.where(ids[..., None] >= 0, x[np.maximum(ids, 0)], 0)
      return found.astype(np.float32)

    return Scores(*(None if x is None else pick(x) for x in self.reference))

  def _example(self, e: int, other: int) -> Example:
    x = self.examples
    first, second, *rest = map(
      functools.partial(x.response, e), range(x.lengths.shape[1])
    )
    if self._layouts.mismatched:
      second = x.chosen(other)
    return Example(
      x.prompt(e), first, second, bool(x.desirable[e]), tuple(rest),
      float(x.margins[e]),
    )  # fmt: skip

  def _find(self, step: int) -> tuple[Layout, int]:
    number, i = divmod(step, self._chunk)
    return self._cached(number), i

  def _lay_out(self, number: int) -> Layout:
    start = number * self._chunk
    return self._layouts.of(start, min(start + self._chunk, self._steps))

  def _plan_shapes(self, row_length: int, multiple: int, most: int) -> None:
    """Chooses the shapes, and one of them for every step."""
    parts = []
    for number in range(-(-self._steps // self._chunk)):
      x = self._cached(number)
      parts.append((x.needs, x.tokens(), x.scored(), [x.most]))
    needs, self._tokens, self._scored, places = map(
      np.concatenate, zip(*parts, strict=True)
    )
    needs[:, 1] = row_length or _round_length(needs[:, 1])
    needs[:, 2] = _round_up(needs[:, 2], multiple)
    chosen = shapes.choose(needs, most)
    self._shape = shapes.assign(needs, chosen)
    branches = self.examples.lengths.shape[1]
    self.shapes = tuple(
      BatchShape(rows, RowShape(tokens, scored, int(places.max()), branches))
      for rows, tokens, scored in chosen.tolist()
    )


def _round_up(n: np.ndarray, multiple: int) -> np.ndarray:
  return -(-n // multiple) * multiple


def _round_length(tokens: np.ndarray) -> np.ndarray:
  """To what hardware likes, for a few hundredths of padding."""
  short = _round_up(tokens, 16)
  return np.where(tokens > 1024, _round_up(tokens, 64), short)
