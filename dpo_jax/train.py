"""The loop: a run from its start, or from where it stopped, to its report."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from dpo_jax import memory, processes, sharding
from dpo_jax.answers import Answerer, sample_rows
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import Config, check_names, differences, without
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.finish import finish
from dpo_jax.online import make_run
from dpo_jax.processes import Stopped, StopSignal
from dpo_jax.progress import Progress
from dpo_jax.run import Run
from dpo_jax.step_log import StepLog
from dpo_jax.stored import DamagedError, read_meta
from dpo_jax.watch import Trace, Watchdog
from dpo_jax.workdir import Workdir
from dpo_jax.writers import MetricsWriter, NoWriter, read_metrics

_LOG = logging.getLogger("dpo_jax")


def train(
  config: Config, workdir: str | os.PathLike, allow: Sequence[str] = ()
) -> dict[str, Any]:
  """Trains, or continues, or finds the run done; returns its summary.

  SIGTERM and SIGINT save a checkpoint after the step under way and raise
  `Stopped`; the same call then continues to the same numbers. With many
  processes (see `processes.start`) all of them call it, with one work
  directory that all see.

  Args:
    config: of the run.
    workdir: where it lives; made where it is missing.
    allow: settings that may differ from those the run began with, by name
      ("optim.learning_rate") or section ("data").

  Raises:
    UserError: one line for what is wrong with the input.
    Stopped: a signal asked for it.
  """
  begun = time.time()
  check_names(allow)
  place = Workdir(workdir)
  with StopSignal() as stop:
    processes.lead(lambda: place.check(config, allow))
    run = make_run(config)
    _check_all_alike(run)
    memory.fit(run)
    best = config.train.keep_best.partition(" ")[0]
    if best and run.eval_plan is None:
      raise ConfigError(
        f"config.train.keep_best={config.train.keep_best!r} needs held-out"
        " data; set config.data.eval_rows or config.data.eval_source"
      )
    with (
      place.claimed(config, allow),
      Checkpoints(
        place.checkpoints, config.train.keep_checkpoints, best=best
      ) as saved,
    ):
      return _Training(run, place, saved, stop, allow, begun).go()


class _Training:
  """One attempt at a run, from where it stands to its end."""

  def __init__(
    self,
    run: Run,
    place: Workdir,
    saved: Checkpoints,
    stop: StopSignal,
    allow: Sequence[str],
    begun: float,
  ):
    self.run, self.place, self.saved = run, place, saved
    self.stop, self.allow, self.begun = stop, allow, begun
    number, log = processes.number(), run.config.log
    self.log = StepLog(
      run,
      begun,
      place.skipped if processes.leads() else None,
      saved.newest_in_words,
    )
    self.watchdog = Watchdog(log.watchdog, place.path, number)
    part = str(number) if processes.count() > 1 else ""
    self.trace = Trace(log.trace, place.trace / part, self.log.untimed)
    self.evaluated: tuple[int, dict[str, float]] | None = None  # last row
    self.best = run.config.train.keep_best.partition(" ")[2]

  def go(self) -> dict[str, Any]:
    run, place, steps = self.run, self.place, self.saved.steps()
    if steps:
      self._check_newest(steps[-1])
    if processes.lead(lambda: self._complete(steps)):
      _LOG.info("%s: complete, nothing to do", place.path)
      return processes.lead(place.read_results)
    state, frozen = run.start()
    reference = run.load_reference(state.params, frozen)
    state = run.with_reference(state, reference)
    answerer = run.answerer()
    if answerer and not processes.lead(lambda: self._answered(answerer)):
      self._answer_before(answerer, run.policy(frozen, state.params))
    start = 0
    if steps:
      del state  # makes room for the one that is read
      start, state = self._continue()
    if run.config.reference.precompute and run.loss.needs_reference:
      run.precompute(reference)
    if processes.leads():
      self.place.forget_skipped(start)
    with self._writer(start) as self.log.writer:
      self._take_up(processes.lead(self._evaluated_rows))
      state = self._loop(state, frozen, reference, start)
    self.saved.wait()
    policy = run.policy(frozen, state.params)
    seconds = time.time() - self.begun
    return finish(run, place, state, policy, reference, answerer, seconds)

  def _complete(self, steps: Sequence[int]) -> bool:
    """Whether the run came to its end, also where somebody has made room and
    removed its checkpoints."""
    if not self.place.summary.exists():
      return False
    done = steps[-1] if steps else self.place.read_summary().get("steps")
    return done == self.run.steps

  def _loop(self, state, frozen, reference, start):
    """Runs the steps from `start`. Step n is launched before the metrics of
    step n - 1 are read, so the device never waits for the host."""
    run, log, t = self.run, self.log, self.run.config.train
    online = run.unshared(reference)
    if run.train_plan.reference is not None:  # its scores are known
      online = None
    variables = frozen, reference
    begins = start == 0 or _due(start, t.eval_every)
    if begins and self._evaluate(start, state, *variables):
      raise Stopped(f"stopped at step {start}; the same command continues")
    unit = "pairs" if run.loss.kind == "paired" else "examples"
    silent, previous = not processes.leads(), None
    with (
      Progress(
        run.steps, start, batch_size=t.batch_size, unit=unit, silent=silent
      ) as progress,
      self.watchdog,
      self.trace,
      self.stop.between_steps(),
    ):
      for step, batch in log.waited_for(_batches(run, start)):
        state, sums = self.trace.step(
          step, run.step, state, online, batch, frozen
        )
        if previous:
          log.add(progress, *previous)
          self.watchdog.beat(previous[0])
        previous = step, sums
        self.saved.check()
        last, stopping = step == run.steps, self.stop.requested()
        due = last or _due(step, t.eval_every)
        saves = last or stopping or _due(step, t.checkpoint_every)
        saves |= due and bool(self.best)
        if due or saves:
          log.add(progress, *previous)
          self.watchdog.beat(step)
          previous = None
        if due and (last or not stopping):
          stopping |= self._evaluate(step, state, *variables)
        if saves or stopping:
          self._save(step, state)
        if stopping and not last:
          self.saved.wait()
          raise Stopped(f"stopped at step {step}; the same command continues")
    return state

  def _evaluate(self, step, state, frozen, reference) -> bool:
    """Writes the row of a step, if it is not there; True if it was cut short
    because the run is to stop, and is left to who continues it."""
    run = self.run
    if run.eval_plan is None or (self.evaluated or [None])[0] == step:
      return False

    def interrupted() -> bool:
      self.watchdog.beat(step)
      return step < run.steps and self.stop.requested()

    with self.log.untimed():
      result = run.evaluator(
        run.policy(frozen, state.params),
        reference if state.reference is None else state.reference,
        run.eval_plan,
        state.loss_state,
        interrupted=interrupted,
      )
    if result is None:
      return True
    self.log.writer.write(step, "eval", result.means)
    if self.best:  # before steps are lost to a typo
      self.saved.learn({step: _named(result.means, self.best)})
    self.evaluated = step, result.means
    return False

  def _save(self, step, state):
    meta = self.run.identity() | {
      "step": step,
      "seconds": time.time() - self.begun,
      "log": self.log.pending(),
      "config": self.run.config.identity(),
    }
    value, (at, means) = None, self.evaluated or (None, {})
    if self.best and at == step:
      value = _named(means, self.best)
    with self.log.untimed():
      self.saved.save(step, state, meta, value)

  def _continue(self):
    """The newest state that is intact, and its step."""
    step, meta, state = self.saved.newest(
      self.run.abstract_state,
      self._check_same_run,
      strict=self.run.config.train.on_damaged_checkpoint == "stop",
    )
    self.log.restore(meta["log"])
    self.begun -= meta["seconds"]
    _LOG.info("continuing at step %d of %d", step, self.run.steps)
    return step, state

  def _check_newest(self, step: int) -> None:
    """Refuses another run's checkpoint before anything large is loaded."""
    with contextlib.suppress(DamagedError):  # `_continue` looks for another
      self._check_same_run(read_meta(self.saved.directory, step))
    if step > self.run.steps:
      raise ConfigError(
        f"{self.saved.directory}: step {step} is there, beyond the"
        f" {self.run.steps} steps of this run; take another work directory"
      )

  def _check_same_run(self, meta: dict[str, Any]) -> None:
    mine = self.run.identity() | {"config": self.run.config.identity()}
    there, here = ({k: m.get(k) for k in mine} for m in (meta, mine))
    there, here = (_flat(m, self.allow) for m in (there, here))
    if other := differences(there, here):
      raise CheckpointError(
        f"{self.saved.directory}: step {meta['step']} was trained with another"
        f" {other}; continue with what it had, allow it (--allow=NAME), or take"
        " another work directory"
      )

  def _answered(self, answerer: Answerer) -> bool:
    """Whether there are answers to the same prompts from before any step."""
    rows = self.place.read_samples()
    return rows is not None and answerer.asked(rows)

  def _answer_before(self, answerer: Answerer, policy) -> None:
    rows = sample_rows(answerer(policy))
    if processes.leads():
      self.place.write_jsonl(self.place.samples, rows)

  def _evaluated_rows(self) -> list[dict[str, Any]]:
    rows = read_metrics(self.place.metrics)
    return [row for row in rows if row["split"] == "eval"]

  def _take_up(self, rows: list[dict[str, Any]]) -> None:
    """Takes what earlier attempts evaluated as known."""
    if rows:
      self.evaluated = rows[-1]["step"], rows[-1]
    if best := self.best:
      self.saved.learn({r["step"]: r[best] for r in rows if best in r})

  def _writer(self, start: int) -> MetricsWriter | NoWriter:
    if not processes.leads():
      return NoWriter()
    log = self.run.config.log
    return MetricsWriter(
      self.place.path,
      tensorboard=log.tensorboard,
      wandb=log.wandb,
      run_name=log.name,
      config=self.run.config.to_dict(),
      resume_step=start,
    )


def _check_all_alike(run: Run) -> None:
  """Raises ConfigError where the processes of a run were not given the same."""
  given = run.config.to_dict()
  del given["data"]["cache_dir"]  # may be each host's own
  mine = json.dumps([given, run.identity()], sort_keys=True)
  alike = processes.lead(lambda: mine) == mine
  if not processes.all_agree(alike):
    raise ConfigError(
      "the processes of this run have other settings, weights or data than the"
      " first; give all of them the same"
    )


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


def _named(means: dict[str, float], metric: str) -> float:
  if metric not in means:
    raise ConfigError(
      f"config.train.keep_best: evaluation has no metric {metric!r}; it has"
      f" {', '.join(means)}"
    )
  return means[metric]


def _flat(meta: dict[str, Any], allow: Sequence[str]) -> dict[str, Any]:
  """What decides the numbers of a run, less what may differ. An allowed
  "loss.beta" allows another `loss`, of which it is a part."""
  sections = {name.partition(".")[0] for name in allow}
  run = {
    key: value
    for key, value in meta.items()
    if key != "config" and not sections & {key, *_SET_BY.get(key, ())}
  }
  return run | without(meta["config"] or {}, allow)


# Sections of the config that decide parts of a run's identity.
_SET_BY = {
  "reference": ("model",),
  "frozen": ("model",),
  "adapters": ("lora",),
  "dropout": ("lora",),
  "loss": ("online",),
  "reward_model": ("online",),
}
