"""The plan of an online run: which prompts make up step s. What is answered to
them nobody knows before."""

from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.order import Order
from dpo_jax.data.plan import BatchShape


class Prompts(NamedTuple):
  batch: tuple[()]  # what a step trains on it makes itself
  ids: np.ndarray  # i64[batch_size], index into the examples


class Used(NamedTuple):
  """What a step took, known once it was run."""

  tokens: int  # of rows, without padding
  fill: float  # their share
  scored_fill: float  # likewise of scored places
  prompts: np.ndarray  # i64[n], lengths
  responses: np.ndarray  # i32[n G], of all answers
  trained: np.ndarray  # i32[n k], of those in the updates
  shape: Any  # what was compiled for it
  seconds: float


_KEPT = 4  # steps that are remembered; the log looks back by two


class PromptPlan:
  """Exactly `batch_size` prompts a step, one permutation after another, as
  `data.plan.Plan` has it; a pure function of seed and step."""

  reference = None  # no score is known before

  def __init__(
    self,
    examples: Any,
    *,
    batch_size: int,
    steps: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    shapes: tuple[BatchShape, ...] = (),
  ):
    """Args:
    examples: of kind "prompts", see `store.Examples`.
    batch_size: prompts a step.
    steps: how many; None: once through the examples.
    seed: of the permutations.
    shuffle: False keeps the order, with a smaller last step.
    shapes: that batches of answers may have, the largest last.
    """
    self.examples = examples
    self.batch_size = batch_size
    self.shapes = shapes
    self._steps = -(-len(examples) // batch_size) if steps is None else steps
    self._order = Order(len(examples), batch_size, seed=seed, shuffle=shuffle)
    self._used: dict[int, Used] = {}
    self._fills = np.zeros(3)  # sums of both, and how many steps

  def __len__(self) -> int:
    return self._steps

  def __getitem__(self, step: int) -> Prompts:
    if not 0 <= step < len(self):
      raise IndexError(f"step {step} of a plan of {len(self)}")
    return Prompts((), self.members(step))

  def members(self, step: int) -> np.ndarray:
    """Indices of the prompts of a step, i64[batch_size]."""
    (members,) = self._order.members(step, step + 1)
    return members[members >= 0]

  def used(self, step: int, what: Used) -> None:
    """Takes down what a step took, and forgets the steps long before it."""
    self._used[step] = what
    self._fills += what.fill, what.scored_fill, 1
    while len(self._used) > _KEPT:
      del self._used[min(self._used)]

  def lengths(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`prompts`, `responses` and `trained` of a step that was just run."""
    used = self._used[step]
    return used.prompts, used.responses, used.trained

  def tokens(self, step: int) -> int:
    """Row tokens of a step that was just run, 0 of another."""
    return self._used[step].tokens if step in self._used else 0

  def shape_of(self, step: int) -> Any:
    """Of a step that was just run; None of another."""
    return self._used[step].shape if step in self._used else None

  def seconds(self, step: int) -> float | None:
    """What a step that was just run took."""
    return self._used[step].seconds if step in self._used else None

  def fill(self) -> float | None:
    """Share of row tokens that are not padding, over the steps that were run
    in this process; None where none was."""
    return self._mean(0)

  def scored_fill(self) -> float | None:
    """Likewise of scored places."""
    return self._mean(1)

  def describe(self) -> list[str]:
    """Lines that say the shapes."""
    return [
      f"prompts     {self.batch_size} a step of {len(self.examples)}",
      *(
        f"  answers in {s.rows} x {s.row.tokens} tokens, {s.row.scored} of a"
        f" row's scored, up to {s.row.examples} prompts"
        for s in self.shapes
      ),
    ]

  def _mean(self, which: int) -> float | None:
    steps = self._fills[2]
    return float(self._fills[which] / steps) if steps else None
