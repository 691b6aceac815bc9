"""Sampling with a key-value cache, in batches or as a stream.

The answer to a prompt depends on its number and the seed, not on what else is
in its batch, how many batches there are, or over how many devices they lie.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.decode import Decoding, bucket, choose, log_prob


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
  batch_size: int = 64,
  mesh: Mesh | None = None,
) -> Callable[..., Sampled]:
  """Builds `sampler(variables, prompts, seed)`.

  It is compiled once for each number of rows and rounded prompt width.

  Args:
    model: with a cache, as `models.decoder.Decoder`.
    max_tokens: most tokens of a response.
    stop_ids: a response ends with the first of these.
    pad_id: fills what follows.
    temperature: 0 is greedy.
    top_k: sample among the k likeliest tokens only; 0: all.
    top_p: sample among the fewest tokens whose probability reaches p.
    batch_size: most prompts at a time; memory grows with it.
    mesh: rows are split over its batch axes; None: one device.
  """
  decoding = Decoding(model, mesh)
  stops = jnp.asarray(tuple(stop_ids), jnp.int32)

  def run(variables, tokens, pads, seed, numbers):
    rows, width = tokens.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), numbers
    )

    def pick(i, logits, done):
      now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
      token = choose(logits, now, temperature, top_k, top_p)
      logp = jnp.where(done, 0.0, log_prob(logits, token))
      return jnp.where(done, pad_id, token), logp

    def going(state):
      i, _, _, done, *_ = state
      return (i < max_tokens) & ~done.all()

    def one_token(state):
      i, token, cache, done, out, logps, lengths = state
      logits, cache = decoding.step(
        variables, token, pads, width + i - 1, cache
      )
      return record(i, logits, cache, done, out, logps, lengths)

    def record(i, logits, cache, done, out, logps, lengths):
      token, logp = pick(i, logits, done)
      out = out.at[:, i].set(token)
      logps = logps.at[:, i].set(logp)
      lengths = lengths + ~done
      done = done | jnp.isin(token, stops)
      return i + 1, token, cache, done, out, logps, lengths

    logits, cache = decoding.read(variables, tokens, pads, max_tokens)
    state = record(
      0,
      logits,
      cache,
      numbers < 0,
      jnp.full((rows, max_tokens), pad_id, jnp.int32),
      jnp.zeros((rows, max_tokens), jnp.float32),
      jnp.zeros(rows, jnp.int32),
    )
    return jax.lax.while_loop(going, one_token, state)[4:]

  run = jax.jit(run, out_shardings=decoding.whole())

  def sampler(
    variables: Any, prompts: Sequence[Sequence[int]], seed: int
  ) -> Sampled:
    count = len(prompts)
    parts = max(-(-count // batch_size), 1)
    rows = max(-(-count // parts), 1)
    rows = -(-rows // decoding.row_multiple) * decoding.row_multiple
    width = bucket(max(map(len, prompts), default=1))
    found = []
    for first in range(0, max(count, 1), rows):
      part = prompts[first : first + rows]
      numbers = np.full(rows, -1, np.int32)  # of filler
      numbers[: len(part)] = np.arange(first, first + len(part))
      out = run(
        variables,
        *decoding.prompts(part, rows, width, pad_id),
        _seed(seed),
        decoding.put(numbers),
      )
      found.append([np.asarray(x)[: len(part)] for x in out])
    return Sampled(*map(np.concatenate, zip(*found, strict=True)))

  sampler.compiled = run._cache_size
  return sampler


def make_stream(
  model: Any,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  mesh: Mesh | None = None,
) -> Callable[..., Iterator[int]]:
  """Builds `stream(variables, prompt, seed, max_tokens)`, which yields the
  tokens that the sampler draws for a first prompt, and stops nowhere by itself.
  """
  decoding = Decoding(model, mesh)
  rows = decoding.row_multiple

  def pick(logits, seed, i):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), i)
    keys = jnp.broadcast_to(key, (rows,))
    return choose(logits, keys, temperature, top_k, top_p)

  def read(variables, tokens, pads, seed, room):
    logits, cache = decoding.read(variables, tokens, pads, room)
    return pick(logits, seed, 0), cache

  def step(variables, token, pads, seed, i, at, cache):
    logits, cache = decoding.step(variables, token, pads, at, cache)
    return pick(logits, seed, i), cache

  read = jax.jit(read, static_argnames="room")
  step = jax.jit(step, donate_argnames="cache")

  def stream(
    variables: Any, prompt: Sequence[int], seed: int, max_tokens: int
  ) -> Iterator[int]:
    width, room = bucket(len(prompt)), bucket(max_tokens)
    same = [prompt] * rows  # a row for each part of the mesh, all alike
    tokens, pads = decoding.prompts(same, rows, width, 0)
    seed = _seed(seed)
    token, cache = read(variables, tokens, pads, seed, room)
    for i in range(1, max_tokens + 1):
      yield int(token.addressable_data(0)[0])
      if i < max_tokens:
        at = width + i - 1
        token, cache = step(variables, token, pads, seed, i, at, cache)

  return stream


def _seed(seed: int) -> np.uint32:
  # As numpy, which every process of many may hand to a program of all.
  return np.uint32(seed & 0xFFFFFFFF)
