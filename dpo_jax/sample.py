"""Sampling with a key-value cache: prefill once, then one token at a time.

Prompts of different lengths are aligned at their ends; what lies before a
shorter one is outside its range of visible keys.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.logps import capped


class Sampled(NamedTuple):
  tokens: np.ndarray  # i32[N R], the response, padded after its stop token
  logps: np.ndarray  # f32[N R], under the model at temperature 1; 0 for padding
  lengths: np.ndarray  # i32[N], with the stop token


def make_sampler(
  model: Any,
  *,
  max_tokens: int,
  stop_ids: Sequence[int],
  pad_id: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Callable[..., Sampled]:
  """Builds `sampler(variables, prompts, seed)`, compiled once per shape.

  Args:
    model: with a cache, as `models.decoder.Decoder`.
    max_tokens: most tokens of a response.
    stop_ids: a response ends with the first of these.
    pad_id: fills what follows.
    temperature: 0 is greedy.
    top_k: sample among the k likeliest tokens only; 0: all.
    top_p: sample among the fewest tokens whose probability reaches p.
  """

  @functools.partial(jax.jit, static_argnames="length")
  def run(variables, tokens, pads, key, length):
    rows, width = tokens.shape
    head = model.unembed(variables)
    index = jnp.arange(width)[None]
    start = pads[:, None]  # i32[N 1], first visible key

    def forward(tokens, at, ends, cache):
      hidden, cache = model.apply(
        variables, tokens, jnp.maximum(at - start, 0),
        jnp.broadcast_to(start, tokens.shape), ends, cache, at[0, 0],
      )  # fmt: skip
      last = hidden[:, -1]
      logits = jnp.einsum(
        "nd,vd->nv", last, head, preferred_element_type=jnp.float32
      )
      return capped(logits, getattr(model, "logit_cap", None)), cache

    ends = jnp.where(index >= start, index + 1, 0)
    cache = model.empty_cache(rows, width + length)
    at = jnp.broadcast_to(index, tokens.shape)
    logits, cache = forward(tokens, at, ends, cache)

    def one_token(carry, i):
      logits, cache, done = carry
      token = _choose(
        logits, jax.random.fold_in(key, i), temperature, top_k, top_p
      )
      logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits), token[:, None], axis=1
      )[:, 0]
      token = jnp.where(done, pad_id, token)
      logp = jnp.where(done, 0.0, logp)
      counted = ~done
      done = done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
      at = jnp.full((rows, 1), width + i)
      logits, cache = forward(token[:, None], at, at + 1, cache)
      return (logits, cache, done), (token, logp, counted)

    none = jnp.zeros(rows, bool)
    _, out = jax.lax.scan(one_token, (logits, cache, none), jnp.arange(length))
    tokens, logps, counted = (jnp.swapaxes(x, 0, 1) for x in out)
    return tokens, logps, counted.sum(axis=1)

  def sampler(
    variables: Any, prompts: Sequence[Sequence[int]], seed: int
  ) -> Sampled:
    width = -(-max(len(p) for p in prompts) // 32) * 32
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[width - len(prompt) :] = prompt
    pads = np.array([width - len(p) for p in prompts], np.int32)
    out = run(variables, tokens, pads, jax.random.key(seed), max_tokens)
    return Sampled(*(np.asarray(x) for x in out))

  return sampler


def _choose(logits, key, temperature, top_k, top_p):
  """f32[N V] -> i32[N]."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
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
  return jax.random.categorical(key, logits).astype(jnp.int32)
