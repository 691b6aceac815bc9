"""The loop: a run from its start, or from where it stopped, to its report."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from dpo_jax import losses, metrics, sharding
from dpo_jax.answers import sample_rows
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config
from dpo_jax.errors import CheckpointError, UserError
from dpo_jax.finish import finish
from dpo_jax.progress import Progress
from dpo_jax.run import Run
from dpo_jax.signals import StopSignal
from dpo_jax.trainable import join
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
    (state, frozen), log = run.start(), StepLog(run)
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

  def evaluate(step):
    nonlocal evaluated
    if run.eval_plan is not None and evaluated != step:
      with log.untimed():
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
  ):
    for step, batch, tokens in _batches(run, start):
      state, sums = run.step(state, online, batch, frozen)
      if previous:
        log.add(progress, *previous)
      previous = step, sums, tokens
      last, stopping = step == run.steps, stop.requested
      due = last or _due(step, t.eval_every)
      saves = last or stopping or _due(step, t.checkpoint_every)
      if due or saves:
        log.add(progress, *previous)
        previous = None
      if due:
        evaluate(step)
      if saves:
        save(step)
      if stopping and not last:
        saved.wait()
        raise Stopped(f"stopped at step {step}; the same command continues")
  return state


def _batches(run: Run, start: int) -> Iterator[tuple[int, Any, int]]:
  """Yields (number of the step, batch on the mesh, its real tokens); batches
  are packed ahead by threads."""
  data = grain.MapDataset.source(run.train_plan)[start:]
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  steps = data.to_iter_dataset(options)
  for step, (batch, _) in enumerate(steps, start + 1):
    tokens = int((batch.key_end > 0).sum())
    yield step, sharding.put_batch(batch, run.built.mesh), tokens


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


def _continue(saved: Checkpoints, step: int, run: Run, log: "StepLog"):
  meta = saved.meta(step)
  log.restore(meta["log"])
  _LOG.info("continuing at step %d of %d", step, run.steps)
  return saved.restore(step, run.abstract_state), meta["seconds"]


class StepLog:
  """Means over the steps between two rows of metrics.jsonl."""

  def __init__(self, run: Run):
    self._run = run
    self._sums: dict[str, losses.Sums] = {}
    self._tokens = 0
    self._since: tuple[int, float] | None = None
    self._skipped_in_a_row = 0
    self.writer: MetricsWriter | None = None

  def add(self, progress: Progress, step: int, sums: Any, tokens: int) -> None:
    """Adds one step; writes a row where one is due.

    Raises:
      UserError: too many steps in a row were not finite.
    """
    t = self._run.config.train
    sums = jax.device_get(sums)
    self._check_finite(step, float(sums["skipped"].total))
    self._sums = metrics.add([self._sums, sums])
    self._tokens += tokens
    now = time.perf_counter()
    if self._since is None:  # the first step compiles and is not timed
      self._since, self._tokens = (step, now), 0
    values = metrics.means(sums)
    progress.update(step, values)
    if not (_due(step, t.log_every) or step == self._run.steps):
      return
    row = metrics.means(self._sums)
    row["learning_rate"] = float(self._run.schedule(step - 1))
    steps, seconds = step - self._since[0], now - self._since[1]
    if steps:
      row["pairs_per_second"] = steps * t.batch_size / seconds
      row["tokens_per_second"] = self._tokens / seconds
    self.writer.write(step, "train", row)
    self._sums, self._tokens, self._since = {}, 0, (step, now)

  @contextlib.contextmanager
  def untimed(self) -> Iterator[None]:
    """Leaves what is done inside out of the speed of the steps around it."""
    begun = time.perf_counter()
    yield
    if self._since:
      step, since = self._since
      self._since = step, since + time.perf_counter() - begun

  def pending(self) -> dict[str, list[float]]:
    """What a checkpoint keeps, so that a resumed run writes the same rows."""
    return {
      k: [np.asarray(x).tolist() for x in s] for k, s in self._sums.items()
    }

  def restore(self, pending: dict[str, list[float]]) -> None:
    self._sums = {k: losses.Sums(*map(np.array, v)) for k, v in pending.items()}

  def _check_finite(self, step: int, skipped: float) -> None:
    self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
    if not skipped:
      return
    _LOG.warning("step %d: loss or gradient not finite, update skipped", step)
    limit = self._run.config.train.max_skipped
    if self._skipped_in_a_row >= limit:
      raise UserError(
        f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a"
        " loss or gradient that is not finite; lower optim.learning_rate, or"
        " look at the data of these steps. The last checkpoint is intact"
      )
