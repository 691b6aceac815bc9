"""Scores of the training pairs under the reference, kept on disk.

They are computed once for everything that decides their bits: the weights as
they are in memory, the encoded examples, how these are packed and on what they
are run. The loss and its hyper-parameters are no part of that, so a sweep over
them scores once. An entry has all that any loss reads of a reference.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import Scores
from dpo_jax.build import Built
from dpo_jax.config import Model
from dpo_jax.data import cache
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples

_LOG = logging.getLogger("dpo_jax")
# Counts up when the same model and examples would be given other numbers.
VERSION = 1
_ARRAYS = ("logps", "tails")
# Of config.model: what the weights do not show and may change how scores round.
_ROUNDING = ("dtype", "param_dtype", "remat", "attention", "head_tile")


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
  with cache.locked(folder, key):
    found = cache.read(folder, key, _ARRAYS)
    if found:
      arrays, _ = found
      # Read whole: batches pick from them at random.
      scores = Scores(*(np.array(arrays[name]) for name in _ARRAYS))
      if _fits(scores, shape):
        _LOG.info("reference scores of %d examples from cache", shape[0])
        return scores
      _LOG.warning("%s/%s: damaged cache, will be rebuilt", folder, key)
      cache.remove(folder, key)
    scores = _scored(score, shape)
    arrays = {"logps": scores.logps, "tails": scores.tails}
    cache.write(folder, key, arrays, {"examples": shape[0]})
  return scores


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
    "examples": examples.fingerprint,
    "rows": [
      dataclasses.astuple(plan.shape),
      plan.row_counts.tolist(),
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
  """SHA-256 (hex) of paths, dtypes, shapes and checksums of all arrays; these
  are taken where the arrays lie, and are the same on any mesh."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
  parts = []
  for path, leaf in leaves:
    sums = [int(x) for x in jax.device_get(_checksums(leaf))]
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    parts.append([name, str(leaf.dtype), list(leaf.shape), sums])
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two sums, u32[], of well mixed bits and places: integers, so that the order
  of adding does not matter."""
  if not jnp.issubdtype(x.dtype, jnp.floating):  # those of 4 bits among them
    bits = x.astype(jnp.int32).astype(jnp.uint32)
  else:
    wide = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, wide).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place * jnp.uint32(size) + along
  return tuple(
    _mix(bits ^ _mix(place + jnp.uint32(seed))).sum(dtype=jnp.uint32)
    for seed in (0x9E3779B9, 0x85EBCA6B)
  )


def _mix(x: jax.Array) -> jax.Array:
  """The last steps of MurmurHash3 (public domain), a bijection of u32."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _scored(score: Callable[[], Scores], shape: tuple[int, int]) -> Scores:
  _LOG.info("scoring %d examples under the reference", shape[0])
  return score()


def _fits(scores: Scores, shape: tuple[int, int]) -> bool:
  return all(
    x.shape == shape and x.dtype == np.float32
    for x in (scores.logps, scores.tails)
  )
