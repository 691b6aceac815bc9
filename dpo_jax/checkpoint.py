"""Checkpoints of a run: the state, the step, and what they belong to.

Orbax writes asynchronously and atomically. Beside the state lies a small JSON
document that says which run it is and what arrays there are; a state of other
arrays is refused with both sides named.
"""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax.errors import CheckpointError


class Checkpoints:
  """The checkpoints of one work directory."""

  def __init__(self, directory: str | os.PathLike, max_to_keep: int = 2):
    self.directory = os.path.abspath(directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, enable_async_checkpointing=True
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts writing; returns as soon as the arrays have left the devices.

    Raises:
      CheckpointError: nothing was saved, because the step is there already or
        because writing failed (also when an earlier write failed meanwhile).
    """
    meta = meta | {"arrays": _describe(state)}
    try:
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
      )
    except (OSError, ValueError) as e:
      raise CheckpointError(f"{self.directory}: saving failed: {e}") from e
    if not saved:
      raise CheckpointError(
        f"{self.directory}: step {step} not saved; newest is"
        f" {self.latest_step()}"
      )

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON document of a step."""
    return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads a state into the shapes, dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: damaged, or of another shape or dtype.
    """
    self._check_arrays(step, abstract)
    args = ocp.args.StandardRestore(abstract)
    return self._restore(step, state=args)["state"]

  def wait(self) -> None:
    """Blocks until everything is written."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as e:
      raise CheckpointError(f"{self.directory}: saving failed: {e}") from e

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._manager.close()

  def _restore(self, step, **items):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as e:  # of damaged arrays orbax raises no narrower one
      reason = " ".join(str(e).split())[:300]
      raise CheckpointError(
        f"{self.directory}: step {step} cannot be restored; delete"
        f" {self.directory}/{step} to continue from the step before: {reason}"
      ) from e

  def _check_arrays(self, step, abstract) -> None:
    """Orbax alone would cast to another dtype silently."""
    saved = self.meta(step)["arrays"]
    _check_fits(f"{self.directory}: step {step}", saved, _describe(abstract))


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
    CheckpointError: damaged.
  """
  place = pathlib.Path(directory).absolute() / str(step)
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      return reader.restore(place / "meta")
  except Exception as e:  # of damaged files orbax raises no narrower one
    raise _unreadable(place, e) from e


def read_trained(directory: str | os.PathLike, step: int, abstract: Any) -> Any:
  """Reads what a step holds of the policy, and nothing of the optimizer.

  Args:
    directory: of the checkpoints; nothing is written there.
    step: one of `saved_steps`.
    abstract: the trained variables as shapes, dtypes and shardings.

  Raises:
    CheckpointError: damaged, or other arrays are trained.
  """
  place = pathlib.Path(directory).absolute() / str(step)
  wanted = {"params": abstract}
  saved = read_meta(directory, step)["arrays"]
  saved = {k: v for k, v in saved.items() if k.startswith("params/")}
  _check_fits(f"{directory}: step {step}", saved, _describe(wanted))
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      )
      return reader.restore(place / "state", args=args)["params"]
  except Exception as e:
    raise _unreadable(place, e) from e


def _unreadable(place: pathlib.Path, error: Exception) -> CheckpointError:
  reason = " ".join(str(error).split())[:300]
  return CheckpointError(f"{place}: cannot be restored: {reason}")


def _check_fits(where: str, saved: dict[str, str], wanted: dict[str, str]):
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
