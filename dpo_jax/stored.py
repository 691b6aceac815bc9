"""What lies in a checkpoint, read, and proved to be what was written.

Orbax has no checksums of arrays, so beside the state lies a JSON document that
holds them, the shape and dtype of every array, and which run it is; the
document has a digest of itself. All of it is verified when a step is read.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax import checksums, processes
from dpo_jax.errors import CheckpointError


class DamagedError(CheckpointError):
  """A step that cannot be read, or does not hold what was written."""


def saved_steps(directory: str | os.PathLike) -> list[int]:
  """Steps of the complete checkpoints, in order; leaves alone what a run that
  is still going is writing."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def in_words(directory: str | os.PathLike) -> str:
  """What there is to continue from."""
  steps = saved_steps(directory)
  if not steps:
    return "there is no checkpoint to continue from"
  return f"step {steps[-1]} is there to continue from"


def seal(meta: dict[str, Any], state: Any) -> dict[str, Any]:
  """The document of a state: what `meta` says, its arrays, and a digest."""
  document = meta | {
    "arrays": _describe(state),
    "checksums": checksums.of_tree(state),
  }
  return document | {"digest": _digest(document)}


def read_document(place: pathlib.Path) -> dict[str, Any]:
  """The document of the step that lies there; for one process alone.

  Raises:
    Exception: it cannot be read, or is not what was written. Orbax raises
      nothing narrower for damaged files.
  """
  document = ocp.JsonCheckpointHandler().restore(place / "meta")
  if document.pop("digest") != _digest(document):
    raise ValueError("its document was changed since it was written")
  return document


def read_meta(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """The JSON document of a step; writes nothing.

  Raises:
    DamagedError: it cannot be read, or is not what was written.
  """
  place = pathlib.Path(directory).absolute() / str(step)
  document, error = None, None
  try:
    document = read_document(place)
  except Exception as e:  # of damaged files orbax raises no narrower one
    error = e
  if not processes.all_agree(error is None):
    raise _damaged(place, error) from error
  return document


def read_state(directory: str | os.PathLike, step: int, abstract: Any) -> Any:
  """Reads a state into the shapes, dtypes and shardings of `abstract`.

  Raises:
    DamagedError: it cannot be read, or is not what was written.
    CheckpointError: it is of another shape or dtype.
  """
  return _read(directory, step, abstract, _read_whole)


def read_trained(
  directory: str | os.PathLike,
  step: int,
  abstract: Any,
  beside: Collection[str] = (),
) -> Any:
  """Reads what a step holds of the policy, and nothing of the optimizer.

  Args:
    directory: of the checkpoints; nothing is written there.
    step: one of `saved_steps`.
    abstract: the trained variables as shapes, dtypes and shardings.
    beside: collections that were trained as well and are not asked for.

  Raises:
    DamagedError: it cannot be read, or is not what was written.
    CheckpointError: other arrays are trained.
  """
  wanted = {"params": abstract}
  return _read(directory, step, wanted, _read_part, beside)["params"]


def _read(directory, step, abstract, read, beside=()) -> Any:
  place = pathlib.Path(directory).absolute() / str(step)
  document = read_meta(directory, step)
  wanted = _describe(abstract)
  saved = document["arrays"]
  if read is _read_part:
    top = {name.partition("/")[0] for name in wanted}
    saved = {
      name: kind
      for name, kind in saved.items()
      if name.partition("/")[0] in top
      and not name.startswith(tuple(f"params/{one}/" for one in beside))
    }
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


def _read_whole(place, abstract):
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
  reason = one_line(error) if error else "another process cannot read it"
  return DamagedError(f"{place}: cannot be restored: {reason}")


def one_line(error: Exception) -> str:
  """What an error says, without what would fill a screen."""
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
