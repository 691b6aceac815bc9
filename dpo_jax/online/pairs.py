"""Online DPO: of the answers to a prompt the best and the worst are a pair."""

from typing import NamedTuple

import numpy as np

from dpo_jax.online.rollout import Rollout


class Pairs(NamedTuple):
  """Of each prompt; all numpy."""

  chosen: np.ndarray  # i64[N], which answer is the best, the first of equals
  rejected: np.ndarray  # i64[N], the worst
  weights: np.ndarray  # f32[N], 0 where no answer is better than another

  def of(self, values: np.ndarray) -> np.ndarray:
    """[N G ...] of all answers -> [N 2 ...] of the pair."""
    both = np.stack([self.chosen, self.rejected], axis=1)
    return values[np.arange(len(both))[:, None], both]

  def responses(self, rollout: Rollout) -> list[list[np.ndarray]]:
    """Token ids of the two answers to each prompt."""
    tokens, lengths = self.of(rollout.tokens), self.of(rollout.lengths)
    return [
      [row[:n] for row, n in zip(rows, own, strict=True)]
      for rows, own in zip(tokens, lengths, strict=True)
    ]


def pairs_of(scores: np.ndarray) -> Pairs:
  """Pairs by rewards f32[N G]; an answer without one (NaN) is in none."""
  valid = ~np.isnan(scores)
  low = np.where(valid, scores, -np.inf)
  high = np.where(valid, scores, np.inf)
  chosen, rejected = low.argmax(axis=1), high.argmin(axis=1)
  better = low.max(axis=1) > high.min(axis=1)
  return Pairs(chosen, rejected, better.astype(np.float32))
