"""What a step holds on each device, by shapes and by the compiler's account."""

import math
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import numpy as np

from dpo_jax import offload, sharding
from dpo_jax.batch import Scores
from dpo_jax.data.pack import empty_batch
from dpo_jax.run import Run
from dpo_jax.weights import same_path


class Held(NamedTuple):
  """Bytes on one device, in a step."""

  trained: int  # weights or adapters
  frozen: int  # the rest of the policy
  reference: int  # what of it is not the policy's frozen part
  optimizer: int
  batch: int  # and what the loss carries
  temporary: int  # activations, gradients, gathered weights, and the new state
  # where the compiler does not write it over the old
  on_host: int = 0  # of the reference and the optimizer, and not counted above

  @property
  def total(self) -> int:
    """On the device."""
    return sum(self) - self.on_host


def compile_step(run: Run) -> Any:
  """The compiled step of a run, from shapes: nothing is read or run."""
  return run.step.lower(*step_inputs(run)).compile()


def held(run: Run, compiled: Any = None) -> Held:
  """What a device holds during the step of a run.

  Args:
    run: not started.
    compiled: its step; None compiles it.

  Returns:
    All by shapes, but for `temporary`, which is what the compiler of this
    backend plans for: another backend's plan is another.
  """
  stats = (compiled or compile_step(run)).memory_analysis()
  state, _, batch, frozen = step_inputs(run)
  reference = run.abstract_reference()  # kept, also where the step reads none
  of_frozen = device_bytes(frozen)
  own = device_bytes(reference) - _shared(run, frozen, reference)
  rest = state._replace(params=None, opt_state=None, reference=None)
  temporary = (
    stats.temp_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
  )
  return Held(
    trained=device_bytes(state.params),
    frozen=of_frozen,
    reference=own + device_bytes(state.reference),
    optimizer=device_bytes(state.opt_state),
    batch=device_bytes(batch) + device_bytes(rest),
    temporary=temporary,
    on_host=host_bytes((reference, state.opt_state)),
  )


def device_bytes(tree: Any) -> int:
  """Bytes a device, in its own memory, of shapes with shardings."""
  return sum(
    _bytes(x) for x in jax.tree.leaves(tree) if not offload.lies_on_host(x)
  )


def host_bytes(tree: Any) -> int:
  """Bytes a device, in its host's memory."""
  return sum(
    _bytes(x) for x in jax.tree.leaves(tree) if offload.lies_on_host(x)
  )


def render(found: Held) -> list[str]:
  """One line a part, in MiB."""
  parts = found._asdict()
  there = parts.pop("on_host")
  lines = [f"memory      {found.total / 2**20:.1f} MiB a device"]
  lines += [
    f"  {name:10s}{value / 2**20:10.1f} MiB"
    for name, value in parts.items()
    if value
  ]
  if there:
    lines.append(f"on its host {there / 2**20:.1f} MiB beside it")
  return lines


def _bytes(x: Any) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def step_inputs(run: Run) -> tuple[Any, ...]:
  """What the step of a run takes, as shapes with shardings."""
  batch = empty_batch(*run.train_plan.shapes[-1])  # the largest
  if run.config.reference.precompute:
    scores = np.zeros(batch.lengths.shape, np.float32)
    tails = scores if run.loss.reads_tails else None
    batch = batch._replace(reference=Scores(scores, tails))
  _, frozen = run.trainable.split(run.built.abstract)
  return (
    run.abstract_state,
    run.abstract_reference() if run.scores_reference() else None,
    sharding.batch_shapes(batch, run.built.mesh),
    frozen,
  )


def _shared(run, frozen, reference) -> int:
  """Bytes a device of what both trees hold, and a run in the same buffers."""
  path, base = run.config.reference.path, run.config.model.path
  if reference is None or (path and not same_path(path, base)):
    return 0
  both, mine = (traverse.flatten_dict(x, sep="/") for x in (reference, frozen))
  return sum(device_bytes(mine[path]) for path in both.keys() & mine.keys())
