"""The loop: a run from its start, or from where it stopped, to its report."""

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax

from dpo_jax import sharding
from dpo_jax.answers import sample_rows
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.errors import CheckpointError
from dpo_jax.finish import finish
from dpo_jax.progress import Progress
from dpo_jax.run import Run
from dpo_jax.signals import StopSignal
from dpo_jax.step_log import StepLog
from dpo_jax.trainable import join
from dpo_jax.watch import Trace, Watchdog
from dpo_jax.workdir import Workdir
from dpo_jax.writers import MetricsWriter, read_metrics

_LOG = logging.getLogger("dpo_jax")


class Stopped(Exception):
  """A signal asked the run to stop; its checkpoint is saved."""


def train(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
  """Trains, or continues, or finds the run done; returns its summary.

  SIGTERM and SIGINT save a checkpoint after the step under way and raise
  `Stopped`; the same call then continues to the same numbers.

  Raises:
    UserError: one line for what is wrong with the input.
    Stopped: a signal asked for it.
  """
  begun = time.time()
  place = Workdir(workdir)
  place.check(config)
  run = Run(config)
  place.claim(config)
  with Checkpoints(place.checkpoints, config.train.keep_checkpoints) as saved:
    start = saved.latest_step() or 0
    if start:
      _check_same_run(saved, start, run)
    if start == run.steps and place.summary.exists():
      _LOG.info("%s: complete, nothing to do", place.path)
      return place.read_summary()
    (state, frozen), log = run.start(), StepLog(run, begun)
    reference = run.load_reference(state.params, frozen)
    state = run.with_reference(state, reference)
    answerer = run.answerer()
    if answerer and not place.samples.exists():
      policy = join(frozen, state.params)
      place.write_jsonl(place.samples, sample_rows(answerer(policy)))
      del policy
    if start:
      del state  # makes room for the one that is read
      state, earlier = _continue(saved, start, run, log)
      begun -= earlier
    if config.reference.precompute and run.loss.needs_reference:
      run.precompute(reference)
    with MetricsWriter(
      place.path,
      tensorboard=config.log.tensorboard,
      wandb=config.log.wandb,
      run_name=config.log.name,
      config=config.to_dict(),
      resume_step=start,
    ) as writer:
      log.writer = writer
      state = _loop(run, state, frozen, reference, start, saved, log, begun)
    saved.wait()
  policy = join(frozen, state.params)
  seconds = time.time() - begun
  return finish(run, place, state, policy, reference, answerer, seconds)


def _loop(run, state, frozen, reference, start, saved, log, begun):
  """Runs the steps from `start`. Step n is launched before the metrics of step
  n - 1 are read, so the device never waits for the host."""
  t = run.config.train
  online = None if run.train_plan.reference is not None else reference
  evaluated = _last_evaluated(log.writer.path)
  place, settings = log.writer.directory, run.config.log
  watchdog = Watchdog(settings.watchdog, place, jax.process_index())

  def evaluate(step):
    nonlocal evaluated
    if run.eval_plan is not None and evaluated != step:
      with log.untimed(), watchdog.paused():
        result = run.evaluator(
          join(frozen, state.params),
          reference if state.reference is None else state.reference,
          run.eval_plan,
          state.loss_state,
        )
      log.writer.write(step, "eval", result.means)
      evaluated = step

  def save(step):
    meta = run.identity() | {
      "step": step, "seconds": time.time() - begun, "log": log.pending()
    }  # fmt: skip
    with log.untimed():
      saved.save(step, state, meta)

  if start == 0 or _due(start, t.eval_every):
    evaluate(start)
  previous = None
  unit = "pairs" if run.loss.kind == "paired" else "examples"
  with (
    StopSignal() as stop,
    Progress(run.steps, start, batch_size=t.batch_size, unit=unit) as progress,
    watchdog,
    Trace(settings.trace, place) as trace,
  ):
    for step, batch in _batches(run, start):
      state, sums = trace.step(step, run.step, state, online, batch, frozen)
      if previous:
        log.add(progress, *previous)
        watchdog.beat(previous[0])
      previous = step, sums
      last, stopping = step == run.steps, stop.requested
      due = last or _due(step, t.eval_every)
      saves = last or stopping or _due(step, t.checkpoint_every)
      if due or saves:
        log.add(progress, *previous)
        watchdog.beat(step)
        previous = None
      if due:
        evaluate(step)
      if saves:
        save(step)
      if stopping and not last:
        saved.wait()
        raise Stopped(f"stopped at step {step}; the same command continues")
  return state


def _batches(run: Run, start: int) -> Iterator[tuple[int, Any]]:
  """Yields (number of the step, batch on the mesh); batches are packed ahead by
  threads."""
  data = grain.MapDataset.source(run.train_plan)[start:]
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  steps = data.to_iter_dataset(options)
  for step, (batch, _) in enumerate(steps, start + 1):
    yield step, sharding.put_batch(batch, run.built.mesh)


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _last_evaluated(path) -> int | None:
  rows = [r["step"] for r in read_metrics(path) if r["split"] == "eval"]
  return rows[-1] if rows else None


def _check_same_run(saved: Checkpoints, step: int, run: Run) -> None:
  meta = saved.meta(step)
  for key, value in run.identity().items():
    if meta.get(key) != value:
      raise CheckpointError(
        f"{saved.directory}: step {step} was trained with another {key}"
        f" ({str(meta.get(key))[-40:]}, now {str(value)[-40:]}); continue with"
        " what it had, or take another work directory"
      )


def _continue(saved: Checkpoints, step: int, run: Run, log: StepLog):
  meta = saved.meta(step)
  log.restore(meta["log"])
  _LOG.info("continuing at step %d of %d", step, run.steps)
  return saved.restore(step, run.abstract_state), meta["seconds"]
