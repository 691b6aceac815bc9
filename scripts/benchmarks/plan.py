"""The batches of a problem as `dpo_jax.data.plan` packs them."""

import numpy as np

from benchmarks.problem import Problem
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples


def plan(problem: Problem) -> Plan:
  """Packed batches with the same pairs, in the same order, as
  `Problem.draw`; their order is kept, so nothing is balanced."""
  pairs = [pair for batch in problem.draw() for pair in batch]
  lengths = np.array(problem.lengths)
  examples = Examples(
    tokens=np.concatenate([tokens for pair in pairs for tokens in pair]),
    offsets=np.concatenate([[0], np.cumsum(lengths.sum(axis=1))]),
    prompt_lengths=lengths[:, 0].astype(np.int32),
    lengths=lengths[:, 1:].astype(np.int32),
    desirable=np.ones(len(pairs), bool),
    margins=np.zeros(len(pairs), np.float32),
    rows=np.arange(len(pairs)),
    subsets=np.zeros(len(pairs), np.int32),
    subset_names=("random",),
    kind="paired",
    format="random",
    report={},
    fingerprint=repr(problem),
  )
  return Plan(examples, batch_size=problem.pairs, shuffle=False)
