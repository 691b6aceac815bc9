"""Checkpoints of a run: the state, the step, and what they belong to.

Orbax writes asynchronously and atomically, in any number of processes. Beside
the state lies the document of `stored`, by which it is verified when read.
"""

import contextlib
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp

from dpo_jax import processes
from dpo_jax.errors import CheckpointError
from dpo_jax.files import cannot_write
from dpo_jax.stored import (
  DamagedError,
  in_words,
  one_line,
  read_document,
  read_meta,
  read_state,
  seal,
)

_LOG = logging.getLogger("dpo_jax")
_POLICIES = ocp.checkpoint_managers


class _Manager(ocp.CheckpointManager):
  """Orbax's, which asks JAX for SIGTERM by a count of its own otherwise: the
  point at which all processes stop is one that the loop's count never has."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The checkpoints of one work directory, for the run that owns it."""

  def __init__(
    self,
    directory: str | os.PathLike,
    max_to_keep: int = 2,
    *,
    best: str = "",
  ):
    """Removes what an interrupted save left. Raises DataError where the
    directory cannot be made.

    Args:
      directory: made where it is missing.
      max_to_keep: the newest steps that are kept.
      best: "max" or "min" keeps also the step with the best value (see
        `save`); "" keeps none for that.
    """
    self.directory = os.path.abspath(directory)
    if processes.leads():  # orbax's own cleaning needs more than a name
      for left in pathlib.Path(self.directory).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    processes.wait("clean")
    self._kept = _Kept(self.directory, max_to_keep, best)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._kept,
      enable_async_checkpointing=True,
    )
    handlers = {
      "state": ocp.StandardCheckpointHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    }
    try:
      self._manager = _Manager(
        self.directory, options=options, item_handlers=handlers
      )
    except OSError as e:
      raise cannot_write(self.directory, e) from e

  def steps(self) -> list[int]:
    """Of the complete checkpoints, in order; as the leader sees them, for file
    systems that show a file to one process before another."""
    return processes.lead(lambda: sorted(self._manager.all_steps()))

  def save(
    self,
    step: int,
    state: Any,
    meta: dict[str, Any],
    value: float | None = None,
  ) -> None:
    """Starts writing; returns as soon as the arrays have left the devices. A
    save still under way is waited for.

    Args:
      step: higher than all before.
      state: arrays.
      meta: JSON, goes into the document.
      value: what `best` compares, of this step.

    Raises:
      CheckpointError: nothing was saved, because the step is there already or
        because writing failed (also when an earlier write failed meanwhile).
    """
    document = seal(meta | {"value": value}, state)
    try:
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(document)
        ),
      )
    except (OSError, ValueError) as e:
      raise self._failed(e) from e
    if not saved:
      raise CheckpointError(
        f"{self.directory}: step {step} not saved; newest is"
        f" {self._manager.latest_step()}"
      )

  def learn(self, values: Mapping[int, float]) -> None:
    """Takes what `best` compares from outside, for steps that were saved before
    they were evaluated, as a run that is stopped does."""
    self._kept.values |= values

  def check(self) -> None:
    """Raises CheckpointError if writing in the background has failed."""
    try:
      self._manager.check_for_errors()
    except (OSError, ValueError) as e:
      raise self._failed(e) from e

  def wait(self) -> None:
    """Blocks until everything is written.

    Raises:
      CheckpointError: writing failed.
    """
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as e:
      raise self._failed(e) from e

  def newest_in_words(self) -> str:
    """What there is to continue from, in words; a save under way is waited for.
    All processes ask."""
    with contextlib.suppress(CheckpointError):
      self.wait()
    return processes.lead(lambda: in_words(self.directory))

  def restore(self, step: int, abstract: Any) -> Any:
    """See `stored.read_state`."""
    return read_state(self.directory, step, abstract)

  def newest(
    self, abstract: Any, check: Callable[[dict], None], *, strict: bool = False
  ) -> tuple[int, dict[str, Any], Any]:
    """Reads the newest step that is intact. Damaged ones after it are renamed
    to damaged-N, out of the way and not lost.

    Args:
      abstract: see `restore`.
      check: raises what it has against the document of a step.
      strict: stop at the first damaged one.

    Returns:
      Its number, its document, and the state.

    Raises:
      DamagedError: with `strict`, the newest; else, none is intact.
    """
    steps, damaged = self.steps(), []
    for step in reversed(steps):
      try:
        document = read_meta(self.directory, step)
        check(document)
        state = self.restore(step, abstract)
      except DamagedError as e:
        if strict:
          raise
        _LOG.warning("DAMAGED CHECKPOINT, kept as damaged-%d: %s", step, e)
        damaged.append(step)
      else:
        for other in damaged:  # only now: without a step, a run begins anew
          self._set_aside(other)
        return step, document, state
    raise DamagedError(
      f"{self.directory}: none of the steps {steps} is intact; to start anew,"
      " take another work directory"
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type | None, *exc_info: object) -> None:
    if kind is None or issubclass(kind, processes.Stopped):
      self.wait()
      self._manager.close()
    elif processes.count() == 1:  # of many, the others would not come along
      with contextlib.suppress(Exception):  # what went wrong first is said
        self._manager.close()

  def _set_aside(self, step: int) -> None:
    if processes.leads():
      old = pathlib.Path(self.directory, str(step))
      new = old.with_name(f"damaged-{step}")
      shutil.rmtree(new, ignore_errors=True)
      old.rename(new)
    processes.wait(f"damaged {step}")
    self._manager.reload()

  def _failed(self, error: Exception) -> CheckpointError:
    try:
      free = f"{shutil.disk_usage(self.directory).free:,} bytes free"
      there = in_words(self.directory)
    except OSError as e:  # of a disk that went away
      free, there = f"not to be reached: {e.strerror}", "nothing else is known"
    return CheckpointError(
      f"{self.directory}: saving failed ({free}); {there}: {one_line(error)}"
    )


class _Kept(_POLICIES.PreservationPolicy):
  """The newest steps, and the best."""

  def __init__(self, directory: str, newest: int, best: str):
    self._directory = directory
    self._newest = newest
    self._best = best
    self.values: dict[int, float | None] = {}

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
    del context
    steps = [x.step for x in checkpoints]
    kept = set(sorted(steps)[-self._newest :])
    if self._best:
      values = {s: self._value(s) for s in steps}
      known = [
        s for s in steps if values[s] is not None and math.isfinite(values[s])
      ]
      if known:
        sign = 1 if self._best == "max" else -1
        kept.add(max(known, key=lambda s: (sign * values[s], -s)))
    return [s in kept for s in steps]

  def _value(self, step: int) -> float | None:
    if step not in self.values:
      try:  # alone: orbax asks when it likes, maybe not in all processes
        document = read_document(pathlib.Path(self._directory, str(step)))
      except Exception:  # damaged, which a restore will say
        return None
      self.values[step] = document["value"]
    return self.values[step]
