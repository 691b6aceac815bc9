"""Checkpoints of a run: the state, the step, and what they belong to.

Orbax writes asynchronously and atomically. Beside the state lies a small JSON
document that says which run it is; a checkpoint of another one is refused with
both sides named.
"""

import os
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
    self._check_dtypes(step, abstract)
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
    except (OSError, ValueError, KeyError) as e:
      reason = " ".join(str(e).split())[:500]
      raise CheckpointError(
        f"{self.directory}: step {step} cannot be restored: {reason}"
      ) from e

  def _check_dtypes(self, step, abstract) -> None:
    """Orbax would cast silently."""
    saved = self._manager.item_metadata(step)["state"]
    saved = jax.tree.leaves(saved, is_leaf=lambda x: hasattr(x, "dtype"))
    wanted, _ = jax.tree_util.tree_flatten_with_path(abstract)
    if len(saved) != len(wanted):
      raise CheckpointError(
        f"{self.directory}: step {step} holds {len(saved)} arrays, this run"
        f" has {len(wanted)}; it is of another model or optimizer"
      )
    for have, (path, want) in zip(saved, wanted, strict=True):
      if have.dtype != want.dtype or tuple(have.shape) != tuple(want.shape):
        raise CheckpointError(
          f"{self.directory}: step {step}, {jax.tree_util.keystr(path)}:"
          f" saved {have.dtype}{list(have.shape)}, this run has"
          f" {want.dtype}{list(want.shape)}"
        )
