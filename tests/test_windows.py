"""Sliding windows and soft caps, in blocks and in mirrored rows: a reversed
branch sees its own beginning and the prompt's end, with a gap between."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mirrored_rows as mirrored
from test_mirrored_rows import LENGTHS, PLACES, assert_close, precision

from dpo_jax import logps
from dpo_jax.models import attention, decoder, gemma3_text, layers

__all__ = ["precision"]

SIZES = {
  "vocab_size": mirrored.VOCABULARY, "width": 24, "ffn": 20, "layers": 3,
  "heads": 6, "kv_heads": 2, "head_dim": 4,
}  # fmt: skip
# A window of 3 cuts prompts of 4, 5 and 7 tokens, and longer responses.
ALL_LOCAL = decoder.Config(**SIZES, window=3, local=(True,))
MIXED = gemma3_text.Config(
  **SIZES, tied=False, window=3, local=(True, True, False),
  rope_theta=333.0, local_rope_theta=20.0, query_scalar=2.0,
  attention_cap=1.5, logit_cap=3.0,
)  # fmt: skip
CONFIGS = {"all layers": ALL_LOCAL, "some layers": MIXED}


def make_model(config, dtype=jnp.float32, **compute):
  return decoder.Decoder(
    config, decoder.Compute(dtype=dtype, param_dtype=dtype, **compute)
  )


def make_params(config, dtype):
  """Random weights large enough that attention is far from uniform."""
  shapes = jax.eval_shape(make_model(config).init_variables, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(
      rng.normal(size=x.shape) / math.sqrt(max(x.shape[-1], 4) / 4), dtype
    ),
    shapes,
  )


@functools.cache
def separate_sequences(name, dtype):
  model = make_model(CONFIGS[name], dtype, attention="dense")
  return mirrored.with_gradients(
    lambda p: mirrored.separately(p, model, mirrored.examples()),
    make_params(CONFIGS[name], dtype),
    mirrored.cotangent(2 * len(LENGTHS)),
  )


@pytest.mark.parametrize("how", ["dense", "blockwise"])
@pytest.mark.parametrize("name", CONFIGS)
def test_mirrored_rows_equal_separate_sequences(
  precision, name, how, monkeypatch
):
  dtype = jnp.float64 if precision < 1e-6 else jnp.float32
  if how == "blockwise":
    small = functools.partial(attention.attention, block=8)
    monkeypatch.setattr(layers, "attention", small)
  remat = "block" if how == "blockwise" else "none"
  model = make_model(CONFIGS[name], dtype, attention=how, remat=remat)
  batch = mirrored.packed()
  values, grads = mirrored.with_gradients(
    lambda p: mirrored.in_rows(p, model, batch, PLACES).reshape(-1),
    make_params(CONFIGS[name], dtype),
    mirrored.cotangent(2 * len(LENGTHS)),
  )
  expected, expected_grads = separate_sequences(name, dtype)
  assert values.dtype == dtype
  assert_close(values, expected, precision)
  jax.tree.map(
    lambda a, b: assert_close(a, b, precision * 2), grads, expected_grads
  )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wider_window_is_another_model(name):
  batch, config = mirrored.packed(), CONFIGS[name]
  params = make_params(config, jnp.float32)
  scored = [
    mirrored.in_rows(params, make_model(c), batch, PLACES)
    for c in (config, dataclasses.replace(config, window=4))
  ]
  assert np.abs(scored[0] - scored[1]).max() > 0.01


def visible_by_hand(start, end, oldest, positions):
  """bool[T U] of one row, a key at a time."""
  return np.array(
    [
      [s <= u < e and positions[u] >= o for u in range(len(positions))]
      for s, e, o in zip(start, end, oldest)
    ]
  )


def random_case(length):
  rng = np.random.default_rng(length)
  start, end = mirrored.random_ranges(rng, 2, length)
  window = attention.Window(
    jnp.asarray(rng.integers(-9, 9, (2, length)), jnp.int32),
    jnp.asarray(rng.integers(0, 12, (2, length)), jnp.int32),
  )
  q, k, v, g = (
    rng.normal(size=(2, length, heads, 4)).astype(np.float32)
    for heads in (6, 2, 2, 6)
  )
  return start, end, window, 2 * q, k, v, g


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize(("length", "block"), [(24, 8), (29, 8), (9, 8)])
def test_blockwise_attention_is_dense_attention(length, block, windowed, cap):
  start, end, window, q, k, v, g = random_case(length)

  @functools.partial(jax.jit, static_argnums=3)
  def run(q, k, v, how):
    out, pull_back = jax.vjp(
      lambda *x: attention.attention(
        *x, start, end, window=window if windowed else None, cap=cap,
        implementation=how, block=block,
      ),
      q, k, v,
    )  # fmt: skip
    return out, *pull_back(g)

  for a, b in zip(run(q, k, v, "blockwise"), run(q, k, v, "dense")):
    assert np.isfinite(a).all()
    assert_close(a, b, 3e-6)


def test_attention_is_a_softmax_over_the_visible_keys_of_capped_scores():
  start, end, window, q, k, v, _ = random_case(7)
  out = attention.attention(
    *map(jnp.asarray, (q, k, v)), start, end, window=window, cap=0.7, scale=0.9
  )
  for b, head in ((b, h) for b in range(2) for h in range(6)):
    seen = visible_by_hand(
      start[b], end[b], window.oldest[b], window.positions[b]
    )
    kv = head // 3
    scores = np.exp(0.7 * np.tanh(q[b, :, head] @ k[b, :, kv].T * 0.9 / 0.7))
    probs = np.where(seen, scores, 0)
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1e-30)
    # A query that sees no key gets nothing.
    np.testing.assert_allclose(
      out[b, :, head], probs @ v[b, :, kv], rtol=1e-4, atol=1e-5
    )


def test_a_window_that_no_row_fills_changes_no_operation():
  ids = jnp.zeros((1, 9), jnp.int32)
  wide = dataclasses.replace(ALL_LOCAL, window=9)
  plain = dataclasses.replace(ALL_LOCAL, window=None, local=(False,))
  params = make_params(ALL_LOCAL, jnp.float32)

  def program(config):
    run = jax.jit(make_model(config).apply)
    return run.lower(params, ids, ids, ids, ids).as_text()

  assert program(wide) == program(plain)
  narrow = dataclasses.replace(ALL_LOCAL, window=8)  # by one token
  assert program(narrow) != program(plain)


@pytest.mark.parametrize("squares", [False, True])
def test_the_tiled_head_caps_logits_and_their_gradient(squares):
  rng = np.random.default_rng(2)
  hidden, head = (rng.normal(size=(n, 6)) * 2 for n in (13, 11))
  targets, g = rng.integers(0, 11, 13), rng.normal(size=13)
  score = logps.token_logps_and_squares if squares else logps.token_logps

  def tiled(hidden, head):
    found = score(hidden, head, targets, tile=5, cap=1.5)
    return found if squares else (found, found)

  def plain(hidden, head):
    logits = 1.5 * jnp.tanh(hidden @ head.T / 1.5)
    table = jax.nn.log_softmax(logits)
    picked = table[jnp.arange(13), targets]
    other = jnp.log(jnp.exp(2 * table).sum(axis=1)) if squares else picked
    return picked, other

  def with_gradients(function):
    out, pull_back = jax.vjp(
      lambda *x: function(*x)[0], *map(jnp.float32, (hidden, head))
    )
    both = function(*map(jnp.float32, (hidden, head)))
    return *both, out, *pull_back(jnp.float32(g))

  for a, b in zip(with_gradients(tiled), with_gradients(plain)):
    assert_close(a, b, 1e-5)
