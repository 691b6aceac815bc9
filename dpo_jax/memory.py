"""What a step holds on each device, by shapes and by the compiler's account,
and what of it to compute again so that it fits."""

import logging
import math
from typing import Any, NamedTuple

import flax.traverse_util as traverse
import jax
import numpy as np
from jax.extend.core import Var

from dpo_jax import offload, processes, sharding
from dpo_jax.batch import Scores
from dpo_jax.build import recomputed
from dpo_jax.data.pack import empty_batch
from dpo_jax.run import Run
from dpo_jax.weights import other_reference

_LOG = logging.getLogger("dpo_jax")
# Of a device's memory, what a plan may fill: the reckoning leaves out what one
# layer needs while it runs.
_USED = 0.9


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


def fit(run: Run, limit: int | None = None) -> None:
  """Settles `model.remat="auto"` of a run on pairs: the first of what backward
  passes may compute again with which the step seems to fit. Where the devices
  do not say how much they have, as CPUs, and for online runs, whose batches are
  not known before, it stays at the least.

  Args:
    run: not started.
    limit: bytes of a device; what it says itself if None.
  """
  if run.config.model.remat != "auto" or run.config.online.method:
    return
  limit = processes.lead(lambda: limit or _limit(run))
  if limit is None:
    return
  choices = ["minimal", "block"]
  kinds = run.built.mesh.local_devices[0].addressable_memories()
  if offload.KIND in [memory.kind for memory in kinds]:
    choices.append("offload")
  for remat in choices:
    if remat != run.built.model.compute.remat:
      run.recompute(remat)
    bytes_ = needed(run)
    if bytes_ <= _USED * limit:
      break
  _LOG.info(
    "model.remat=auto: %s, for about %.1f of %.1f GiB a device",
    remat, bytes_ / 2**30, limit / 2**30,
  )  # fmt: skip


def needed(run: Run) -> int:
  """Bytes on a device that a step of a run needs, about: what is given, the
  gradients, what the forward keeps for the backward, and a tile of logits."""
  state, _, batch, frozen = step_inputs(run)
  reference = run.abstract_reference()
  own = device_bytes(reference) - _shared(run, frozen, reference)
  config = run.built.model.config
  logits = 2 * 4 * run.config.model.head_tile * config.vocab_size
  gradients = device_bytes(state.params)
  given = device_bytes((state, batch, frozen)) + own
  return given + gradients + kept(run) + (0 if config.scalar_head else logits)


def kept(run: Run) -> int:
  """Bytes on a device of what the policy's forward keeps for its backward, by
  shapes; where layers are computed again, also what one of them keeps then."""
  built = run.built
  found = _kept(run, built.score)
  if built.model.compute.remat != "none":
    every = recomputed(run.config, built, "none").score
    found += (_kept(run, every) - found) // built.model.config.layers
  return found


def _kept(run, score) -> int:
  state, _, batch, frozen = step_inputs(run)

  def forward(params, frozen, batch):
    def f(params):
      return score(run.trainable.join(frozen, params), batch).logps

    return jax.vjp(f, params)

  program = jax.make_jaxpr(forward)(state.params, frozen, batch).jaxpr
  # Not of the batch, and so not split with it, are copies of embeddings. What
  # has the shape of all layers' weights is these themselves or their gradients,
  # and of such a thing for each layer nothing is read.
  weights, stacks = set(), set()
  for tree in (state.params, frozen):
    for path, x in traverse.flatten_dict(tree, sep="/").items():
      (stacks if "/layers/" in path else weights).add(x.shape)
  parts = sharding.batch_shards(run.built.mesh) * run.config.train.microbatches
  total = 0
  made = {x for x in program.outvars if isinstance(x, Var)}  # no numbers
  for x in made - set(program.invars):
    shape = x.aval.shape
    nothing = {shape, shape[1:]} & stacks
    if x.aval.memory_space != jax.memory.Space.Host and not nothing:
      size = math.prod(shape) * x.aval.dtype.itemsize
      total += size if shape in weights else size // parts
  return total


def _limit(run) -> int | None:
  """Bytes that a device says it may use."""
  stats = run.built.mesh.local_devices[0].memory_stats() or {}
  return stats.get("bytes_limit")


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
  reference = run.abstract_reference()
  return (
    run.abstract_state,
    run.unshared(reference) if run.scores_reference() else None,
    sharding.batch_shapes(batch, run.built.mesh),
    frozen,
  )


def _shared(run, frozen, reference) -> int:
  """Bytes a device of what both trees hold, and a run in the same buffers."""
  if reference is None or other_reference(run.config):
    return 0
  both, mine = (traverse.flatten_dict(x, sep="/") for x in (reference, frozen))
  return sum(device_bytes(mine[path]) for path in both.keys() & mine.keys())
