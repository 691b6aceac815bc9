"""Scores of the training pairs under the reference, kept on disk.

They are computed once for everything that decides their bits: the weights as
they are in memory, the encoded examples, how these are packed and on what they
are run. The loss and its hyper-parameters are no part of that, so a sweep over
them scores once. An entry has all that any loss reads of a reference.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpo_jax import checksums, processes
from dpo_jax.batch import Scores
from dpo_jax.build import Built
from dpo_jax.config import Model
from dpo_jax.data import cache
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples

_LOG = logging.getLogger("dpo_jax")
# Counts up when the same model and examples would be given other numbers.
VERSION = 2
_ARRAYS = ("logps", "tails")
# Of config.model: what the weights do not show and may change how scores round.
_ROUNDING = ("dtype", "param_dtype", "attention", "head_tile")


def find_or_score(
  folder: str,
  key: str,
  shape: tuple[int, int],
  score: Callable[[], Scores],
) -> Scores:
  """The scores stored under `key`, or those that `score` computes, stored.

  Of several processes that want the same at a time one computes it, and the
  others wait. A damaged entry is replaced, with a warning.

  Args:
    folder: of the cache; "" keeps none.
    key: see `make_key`.
    shape: N examples, K responses.
    score: computes f32[N K] each, tails included.
  """
  if not folder:
    return _scored(score, shape)
  found = None
  with contextlib.ExitStack() as held:
    # Scoring takes all processes of a run, so only its leader waits for others.
    if processes.leads():
      held.enter_context(cache.locked(folder, key))
      found = _read(folder, key, shape)
    if processes.lead(lambda: found is not None):
      nothing = np.zeros(shape, np.float32)
      return Scores(*processes.share(found or [nothing for _ in _ARRAYS]))
    scores = _scored(score, shape)
    if processes.leads():
      arrays = {name: getattr(scores, name) for name in _ARRAYS}
      cache.write(folder, key, arrays, {"examples": shape[0]})
  return scores


def _read(folder, key, shape) -> list[np.ndarray] | None:
  """An entry, unless it is damaged or not there."""
  found = cache.read(folder, key, _ARRAYS)
  if not found:
    return None
  # Read whole: batches pick from them at random.
  arrays = [np.array(found[0][name]) for name in _ARRAYS]
  if all(x.shape == shape and x.dtype == np.float32 for x in arrays):
    _LOG.info("reference scores of %d examples from cache", shape[0])
    return arrays
  _LOG.warning("%s/%s: damaged cache, will be rebuilt", folder, key)
  cache.remove(folder, key)
  return None


def make_key(
  built: Built, variables: Any, examples: Examples, plan: Plan, settings: Model
) -> str:
  """A name made of everything that decides the scores, rounding included.

  Args:
    built: the model, and the mesh it runs on.
    variables: of the reference; every bit of them counts.
    examples: their fingerprint covers tokenizer, settings and content.
    plan: by which they are packed.
    settings: those that may change how the model rounds are looked at.
  """
  device = jax.devices()[0]
  parts = {
    "version": VERSION,
    "weights": fingerprint(variables),
    "model": repr(built.model.config),
    "settings": [getattr(settings, name) for name in _ROUNDING],
    "remat": built.model.compute.remat,
    "examples": examples.fingerprint,
    "rows": [
      [[x.rows, *dataclasses.astuple(x.row)] for x in plan.shapes],
      plan.batch_size,
    ],
    "mesh": dict(built.mesh.shape),
    "device": [device.platform, device.device_kind],
    "jax": jax.__version__,
    "precision": str(jax.config.jax_default_matmul_precision),
  }
  digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  return f"reference-{digest}"


def fingerprint(variables: Any) -> str:
  """SHA-256 (hex) of paths, dtypes, shapes and checksums of all arrays; the
  same on any mesh."""
  described = {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}{list(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]
  }
  parts = json.dumps([described, checksums.of_tree(variables)], sort_keys=True)
  return hashlib.sha256(parts.encode()).hexdigest()


def _scored(score: Callable[[], Scores], shape: tuple[int, int]) -> Scores:
  _LOG.info("scoring %d examples under the reference", shape[0])
  return score()
