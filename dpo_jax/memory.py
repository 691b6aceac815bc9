"""What a step holds on each device, by shapes and by the compiler's account."""

from typing import Any

import numpy as np

from dpo_jax import sharding
from dpo_jax.batch import Scores
from dpo_jax.run import Run


def compile_step(run: Run) -> Any:
  """The compiled step of a run, from shapes: nothing is read or run."""
  batch, _ = run.train_plan[0]
  if run.config.reference.precompute:
    scores = np.zeros(batch.lengths.shape, np.float32)
    tails = scores if run.loss.reads_tails else None
    batch = batch._replace(reference=Scores(scores, tails))
  _, frozen = run.trainable.split(run.built.abstract)
  return run.step.lower(
    run.abstract_state,
    run.abstract_reference(),
    sharding.batch_shapes(batch, run.built.mesh),
    frozen,
  ).compile()
