"""The two programs of decoding: read the prompts, then one token at a time.

Prompts of different lengths are aligned at their ends; what lies before a
shorter one is outside its range of visible keys.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dpo_jax import sharding
from dpo_jax.logps import capped


class Decoding:
  """What a model answers, one row a prompt.

  All methods but `prompts` are pure, to be compiled by whoever calls them.
  Rows are split over the batch axes of the mesh, and so is the cache.
  """

  def __init__(self, model: Any, mesh: Mesh | None = None):
    self._model = model
    self._mesh = mesh
    self.row_multiple = sharding.batch_shards(mesh) if mesh else 1

  def read(
    self, variables: Any, tokens: jax.Array, pads: jax.Array, room: int
  ) -> tuple[jax.Array, Any]:
    """Logits f[N V] after the prompts i32[N W], and a cache of W + room.

    `pads` i32[N] is how much of each row lies before its prompt.
    """
    rows, width = tokens.shape
    index = jnp.arange(width)[None]
    ends = jnp.where(index >= pads[:, None], index + 1, 0)
    cache = self._pin(self._model.empty_cache(rows, width + room))
    at = jnp.broadcast_to(index, tokens.shape)
    return self._forward(variables, tokens, at, ends, pads, cache)

  def step(
    self, variables: Any, token: jax.Array, pads: jax.Array, at: Any, cache: Any
  ) -> tuple[jax.Array, Any]:
    """Logits f[N V] after one more token i32[N], which goes to place `at`."""
    at = jnp.full((len(token), 1), at)
    return self._forward(variables, token[:, None], at, at + 1, pads, cache)

  def _forward(self, variables, tokens, at, ends, pads, cache):
    start = pads[:, None]  # i32[N 1], first visible key
    hidden, cache = self._model.apply(
      variables, tokens, jnp.maximum(at - start, 0),
      jnp.broadcast_to(start, tokens.shape), ends, cache, at[0, 0],
    )  # fmt: skip
    logits = jnp.einsum(
      "nd,vd->nv",
      hidden[:, -1],
      self._model.unembed(variables),
      preferred_element_type=jnp.float32,
    )
    logits = capped(logits, getattr(self._model, "logit_cap", None))
    return logits, self._pin(cache)

  def prompts(
    self, prompts: Sequence[Sequence[int]], rows: int, width: int, pad_id: int
  ) -> tuple[jax.Array, jax.Array]:
    """Tokens i32[rows width] and pads i32[rows]; rows beyond are filler."""
    tokens = np.full((rows, width), pad_id, np.int32)
    pads = np.full(rows, width - 1, np.int32)  # filler sees one token
    for row, prompt in enumerate(prompts):
      pads[row] = width - len(prompt)
      tokens[row, pads[row] :] = prompt
    return self.put((tokens, pads))

  def put(self, arrays: Any) -> Any:
    """Arrays by row, to where the rows are."""
    return sharding.put_batch(arrays, self._mesh) if self._mesh else arrays

  def whole(self) -> Any:
    """Where results go: to every device, so that every host reads them."""
    return sharding.replicated(self._mesh) if self._mesh else None

  def _pin(self, cache: Any) -> Any:
    if self._mesh is None:
      return cache

    def pin(x):
      if x.ndim != 5:  # f[L B U K h] is split by row and by head
        return x
      heads = "tensor" if x.shape[3] % self._mesh.shape["tensor"] == 0 else None
      spec = sharding.P(None, sharding.BATCH, None, heads, None)
      place = NamedSharding(self._mesh, spec)
      return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(pin, cache)


def bucket(length: int) -> int:
  """Rounds up to one of few lengths, beyond 128 by less than a quarter."""
  step = max(32, (1 << (length - 1).bit_length()) // 8)
  return -(-length // step) * step


def choose(
  logits: jax.Array,
  keys: jax.Array,
  temperature: float,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws i32[N] from f32[N V], each row by its own key."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = truncated(logits / temperature, top_k, top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def truncated(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """-inf for what lies outside the k likeliest, then outside the fewest whose
  probability among these reaches p. What ties with the last stays in."""
  if top_k:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where(before < top_p, ordered, ordered[:, :1])
    logits = jnp.where(
      logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits
    )
  return logits


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
  """f32[N]: of the tokens, at temperature 1 and before any cut."""
  logps = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]
