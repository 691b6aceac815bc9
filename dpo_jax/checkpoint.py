"""Checkpoints of a run: the state, the step, and what they belong to.

Orbax writes asynchronously and atomically, in any number of processes. It has
no checksums of arrays, so beside the state lies a JSON document that holds
them, the shape and dtype of every array, and which run it is; the document has
a digest of itself. All of it is verified when a step is read.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax import checksums, processes
from dpo_jax.errors import CheckpointError

_LOG = logging.getLogger("dpo_jax")
_POLICIES = ocp.checkpoint_managers


class DamagedError(CheckpointError):
  """A step that cannot be read, or does not hold what was written."""


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
    """Removes what an interrupted save left.

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
    self._manager = _Manager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(self.directory, max_to_keep, best),
        enable_async_checkpointing=True,
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )

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
    document = meta | {
      "arrays": _describe(state),
      "checksums": checksums.of_tree(state),
      "value": value,
    }
    document["digest"] = _digest(document)
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

  def newest_step(self) -> str:
    """What there is to continue from, in words; a save under way is waited for.
    All processes ask."""
    with contextlib.suppress(CheckpointError):
      self.wait()
    return processes.lead(lambda: _intact(self.directory))

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads a state into the shapes, dtypes and shardings of `abstract`.

    Raises:
      DamagedError: it cannot be read, or is not what was written.
      CheckpointError: it is of another shape or dtype.
    """
    return _read(self.directory, step, abstract, _read_state)

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
    free = shutil.disk_usage(self.directory).free
    return CheckpointError(
      f"{self.directory}: saving failed ({free:,} bytes free);"
      f" {_intact(self.directory)}: {_one_line(error)}"
    )


class _Kept(_POLICIES.PreservationPolicy):
  """The newest steps, and the best."""

  def __init__(self, directory: str, newest: int, best: str):
    self._directory = directory
    self._newest = newest
    self._best = best
    self._values: dict[int, float | None] = {}

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
    del context
    steps = [x.step for x in checkpoints]
    kept = set(sorted(steps)[-self._newest :])
    if self._best:
      values = {s: self._value(s) for s in steps}
      known = [s for s in steps if values[s] is not None]
      if known:
        sign = 1 if self._best == "max" else -1
        kept.add(max(known, key=lambda s: (sign * values[s], -s)))
    return [s in kept for s in steps]

  def _value(self, step: int) -> float | None:
    if step not in self._values:
      try:  # alone: orbax asks when it likes, maybe not in all processes
        value = _document(pathlib.Path(self._directory, str(step)))["value"]
      except Exception:  # damaged, which a restore will say
        return None
      good = value is not None and math.isfinite(value)
      self._values[step] = value if good else None
    return self._values[step]


def saved_steps(directory: str | os.PathLike) -> list[int]:
  """Steps of the complete checkpoints, in order. Unlike `Checkpoints`, this
  leaves alone what a run that is still going is writing."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def read_meta(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """The JSON document of a step; writes nothing.

  Raises:
    DamagedError: it cannot be read, or is not what was written.
  """
  place = pathlib.Path(directory).absolute() / str(step)
  document, error = None, None
  try:
    document = _document(place)
  except Exception as e:  # of damaged files orbax raises no narrower one
    error = e
  if not processes.all_agree(error is None):
    raise _damaged(place, error) from error
  return document


def read_trained(directory: str | os.PathLike, step: int, abstract: Any) -> Any:
  """Reads what a step holds of the policy, and nothing of the optimizer.

  Args:
    directory: of the checkpoints; nothing is written there.
    step: one of `saved_steps`.
    abstract: the trained variables as shapes, dtypes and shardings.

  Raises:
    DamagedError: it cannot be read, or is not what was written.
    CheckpointError: other arrays are trained.
  """
  return _read(directory, step, {"params": abstract}, _read_part)["params"]


def _document(place: pathlib.Path) -> dict[str, Any]:
  document = ocp.JsonCheckpointHandler().restore(place / "meta")
  if document.pop("digest") != _digest(document):
    raise ValueError("its document was changed since it was written")
  return document


def _read(directory, step, abstract, read) -> Any:
  place = pathlib.Path(directory).absolute() / str(step)
  document = read_meta(directory, step)
  wanted = _describe(abstract)
  saved = document["arrays"]
  if read is _read_part:
    top = {name.partition("/")[0] for name in wanted}
    saved = {k: v for k, v in saved.items() if k.partition("/")[0] in top}
  _check_fits(f"{directory}: step {step}", saved, wanted)
  tree, error = None, None
  try:
    # Not through a manager or checkpointer: those wait for all processes at
    # the end, and one that fails would leave the others waiting.
    tree = read(place / "state", abstract)
  except Exception as e:  # of damaged arrays orbax raises no narrower one
    error = e
  if not processes.all_agree(error is None):
    raise _damaged(place, error) from error
  now = checksums.of_tree(tree)
  changed = [k for k in wanted if now[k] != document["checksums"].get(k)]
  # A copy may have been changed in one process only.
  if not processes.all_agree(not changed):
    if not changed:
      raise _damaged(place, None)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    error = ValueError(f"{changed[0]}{more} changed since it was written")
    raise _damaged(place, error)
  return tree


def _read_state(place, abstract):
  args = ocp.args.StandardRestore(abstract)
  return ocp.StandardCheckpointHandler().restore(place, args=args)


def _read_part(place, abstract):
  args = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  return ocp.PyTreeCheckpointHandler().restore(place, args=args)


def _damaged(place: pathlib.Path, error: Exception | None) -> DamagedError:
  reason = _one_line(error) if error else "another process cannot read it"
  return DamagedError(f"{place}: cannot be restored: {reason}")


def _intact(directory: str) -> str:
  steps = saved_steps(directory)
  if not steps:
    return "there is no checkpoint to continue from"
  return f"step {steps[-1]} is there to continue from"


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]


def _digest(document: dict[str, Any]) -> str:
  text = json.dumps(document, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _check_fits(where: str, saved: dict[str, str], wanted: dict[str, str]):
  """Orbax alone would cast to another dtype silently."""
  wrong = [
    f"{name}: saved {saved.get(name, 'nothing')}, this run has"
    f" {wanted.get(name, 'nothing')}"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  if wrong:
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    raise CheckpointError(
      f"{where} does not fit: " + "; ".join(wrong[:3]) + more
    )


def _describe(state: Any) -> dict[str, str]:
  """Path of each array -> dtype and shape, as in "float32[2, 64]"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}{list(leaf.shape)}"
    )
    for path, leaf in leaves
  }
