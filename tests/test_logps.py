"""Tiled log-probs: the numbers of a log-softmax, without its array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logps

ROWS, WIDTH, VOCABULARY = 37, 12, 53  # none a multiple of any other


def case(rows=ROWS, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(rows, WIDTH)).astype(np.float32) * scale
  head = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
  targets = rng.integers(0, VOCABULARY, rows).astype(np.int32)
  cotangent = rng.normal(size=rows).astype(np.float32)
  return hidden, head, targets, cotangent


def oracle(hidden, head, targets, cotangent):
  """Values and gradients of a log-softmax over all logits, in float64."""

  def f(hidden, head):
    table = jax.nn.log_softmax(hidden @ head.T)
    return jnp.take_along_axis(table, targets[:, None], axis=1)[:, 0]

  with jax.enable_x64(True):
    exact = (jnp.asarray(np.float64(x)) for x in (hidden, head))
    values, pull_back = jax.vjp(f, *exact)
    grads = pull_back(jnp.asarray(np.float64(cotangent)))
    return tuple(np.asarray(x) for x in (values, *grads))


def ours(hidden, head, targets, cotangent, tile):
  # Each program runs once; optimising it would take longer.
  quick = {"xla_backend_optimization_level": 0}

  @functools.partial(jax.jit, compiler_options=quick)
  def f(hidden, head, cotangent):
    values, pull_back = jax.vjp(
      lambda h, w: logps.token_logps(h, w, targets, tile=tile), hidden, head
    )
    return values, *pull_back(cotangent)

  return f(hidden, head, cotangent)


@pytest.mark.parametrize(
  ("rows", "tile"), [(37, 8), (37, 1024), (37, 37), (38, 37), (1, 8), (3, 1)]
)
def test_values_and_gradients_are_those_of_a_float64_log_softmax(rows, tile):
  x = case(rows)
  for got, expected in zip(ours(*x, tile), oracle(*x), strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_the_tile_changes_no_number_but_by_rounding():
  x = case()
  whole = ours(*x, 64)
  for tile in (5, 16):
    for a, b in zip(ours(*x, tile), whole, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_extreme_logits_do_not_overflow():
  hidden, head, targets, cotangent = case(scale=1e4)
  values, *grads = ours(hidden, head, targets, cotangent, 8)
  exact = oracle(hidden, head, targets, cotangent)
  np.testing.assert_allclose(values, exact[0], rtol=1e-5, atol=1e-2)
  assert all(np.isfinite(g).all() for g in grads)


def test_bfloat16_inputs_lose_nothing_in_the_sums():
  # Products of two bfloat16 are exact in float32 and so are their sums but for
  # float32 rounding: against float64 on the same rounded inputs the values are
  # as good as in float32. The gradients are rounded to bfloat16, 2^-9 relative,
  # once as a result and once in the terms, a few of which make up a sum.
  hidden, head, targets, cotangent = case()
  low = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
  exact = oracle(*map(np.float32, low), targets, cotangent)
  values, *grads = ours(*low, targets, cotangent, 8)
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, exact[0], rtol=2e-6, atol=1e-5)
  for got, expected in zip(grads, exact[1:], strict=True):
    assert got.dtype == jnp.bfloat16
    bound = 4 * 2**-9 * np.abs(expected).max()
    np.testing.assert_allclose(np.float32(got), expected, rtol=0, atol=bound)


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
  # 600 rows that each move one weight by the same amount. In bfloat16 a sum of
  # ones stops at 256.
  rows = 600
  hidden = jnp.ones((rows, 1), jnp.bfloat16)
  head = jnp.zeros((2, 1), jnp.bfloat16)  # each probability one half

  def f(head):
    targets = jnp.zeros(rows, jnp.int32)
    return logps.token_logps(hidden, head, targets, tile=1).sum()

  np.testing.assert_array_equal(
    jnp.float32(jax.jit(jax.grad(f))(head)), [[rows / 2], [-rows / 2]]
  )


def intermediates(jaxpr):
  """Shapes of everything a program computes, inner programs included."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars)
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from intermediates(inner)


def largest(function, *args):
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return max(aval.size for aval in intermediates(jaxpr) if aval.shape)


def test_no_array_of_all_rows_by_the_vocabulary_exists_in_the_gradient():
  rows, tile, vocabulary = 1000, 10, 4000
  hidden = jnp.zeros((rows, 3))
  head = jnp.zeros((vocabulary, 3))
  targets = jnp.zeros(rows, jnp.int32)

  def tiled(hidden, head):
    return logps.token_logps(hidden, head, targets, tile=tile).sum()

  def plain(hidden, head):
    table = jax.nn.log_softmax(hidden @ head.T)
    return jnp.take_along_axis(table, targets[:, None], axis=1).sum()

  gradient = jax.grad(tiled, argnums=(0, 1))
  assert largest(gradient, hidden, head) == tile * vocabulary
  # The walk does find such an array where there is one.
  assert largest(jax.grad(plain), hidden, head) >= rows * vocabulary


def test_sums_by_slot_follow_the_slots_and_nothing_else():
  token_logps = jnp.array([[1.0, 2, 4, 8, 16], [1, 2, 4, 8, jnp.nan]])
  slot = jnp.array([[0, 1, 0, 3, 1], [2, 2, 2, 4, 4]])  # 4: padding of 2 places
  sums = logps.sum_by_slot(token_logps, slot, (2, 2))
  np.testing.assert_array_equal(
    sums, [[[1 + 4, 2 + 16], [0, 8]], [[0, 0], [1 + 2 + 4, 0]]]
  )


def test_what_lies_beyond_a_limit_is_counted_from_each_responses_start():
  slot = jnp.array([[0, 0, 0, 1, 1, 3, 4], [2, 2, 2, 2, 4, 4, 4]])
  limits = jnp.array([[[2, 2], [0, 0]], [[0, 0], [1, 9]]])
  np.testing.assert_array_equal(
    logps.beyond(slot, limits),
    np.array([[0, 0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 0, 0, 0]], bool),
  )


@pytest.mark.parametrize("vocabulary", [3, 257])
def test_squares_are_those_of_the_whole_distribution(vocabulary):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(11, 5)), jnp.float32)
  head = jnp.asarray(3 * rng.normal(size=(vocabulary, 5)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, vocabulary, 11))

  def scored(hidden, head):
    return logps.token_logps_and_squares(hidden, head, targets, tile=4)

  tokens, squares = scored(hidden, head)
  log_p = jax.nn.log_softmax(hidden @ head.T)
  expected = jax.nn.logsumexp(2 * log_p, axis=-1)
  np.testing.assert_allclose(squares, expected, rtol=1e-5, atol=1e-5)
  plain = logps.token_logps(hidden, head, targets, tile=4)
  np.testing.assert_array_equal(tokens, plain)
  for i, expected in ((0, lambda h, w: plain_sum(h, w, targets)), (1, None)):
    grads = jax.grad(lambda h, w, i=i: scored(h, w)[i].sum(), (0, 1))(
      hidden, head
    )
    if expected is None:  # behind stop_gradient, in effect
      assert not any(np.asarray(g).any() for g in grads)
    else:
      wanted = jax.grad(expected, (0, 1))(hidden, head)
      for g, w in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def plain_sum(hidden, head, targets):
  log_p = jax.nn.log_softmax(hidden @ head.T)
  return jnp.take_along_axis(log_p, targets[:, None], axis=-1).sum()


def test_the_gradient_of_a_sum_by_slot_is_one_where_it_was_scored():
  slot = jnp.array([[0, 1, 0, 3, 4]])
  f = lambda x: logps.sum_by_slot(x, slot, (2, 2))[0, 0, 0]
  np.testing.assert_array_equal(
    jax.grad(f)(jnp.ones((1, 5))), [[1, 0, 1, 0, 0]]
  )


def test_a_long_response_is_summed_to_float32_precision():
  # 100,000 tokens of -0.1: in bfloat16 the sum would stop at -32.
  n = 100_000
  sums = logps.sum_by_slot(
    jnp.full((1, n), -0.1), jnp.zeros((1, n), int), (1, 2)
  )
  np.testing.assert_allclose(sums[0, 0, 0], n * np.float32(-0.1), rtol=1e-5)
