"""Which responses of a row can be ranked, each against each."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from dpo_jax.data.boundary import Drop, distinct
from dpo_jax.data.formats import RawExample


def strict(example: RawExample) -> tuple[RawExample, Counter]:
  """Leaves out responses without a place of their own in the ranking: those
  that repeat a better one, then those whose score one before them has too.

  Returns:
    The example with at least two responses, best first, and notes on what was
    left out.

  Raises:
    Drop: fewer than two responses are left.
  """
  kept = _only(example, distinct(example.responses))
  if len(kept.responses) < 2:
    raise Drop("identical_responses", "all answers are equal")
  notes = Counter()
  if len(kept.responses) < len(example.responses):
    notes["duplicate_left_out"] = 1
  if not kept.scores:
    return kept, notes
  untied = _only(kept, distinct(kept.scores))
  if len(untied.responses) < 2:
    raise Drop("tied_scores", "all answers have one score")
  if len(untied.responses) < len(kept.responses):
    notes["tie_left_out"] = 1
  return untied, notes


def _only(example: RawExample, places: Sequence[int]) -> RawExample:
  return dataclasses.replace(
    example,
    responses=tuple(example.responses[i] for i in places),
    scores=tuple(example.scores[i] for i in places if example.scores),
  )
