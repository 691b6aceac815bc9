"""A mirrored, packed row computes what separate sequences would.

The models run in float32 as they are, and in float64 with the float32 that
they ask for by name made float64: then layout is all that is left to differ.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logps, losses, score
from dpo_jax.batch import Batch
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  spread,
  token_cost,
)
from dpo_jax.models import attention, decoder, layers, llama, rope
from dpo_jax.train_step import evaluate_step, train_step
from dpo_jax.update import TrainState

VOCABULARY = 31
CONFIG = llama.Config(
  vocab_size=VOCABULARY,
  width=24,
  ffn=20,
  layers=3,
  heads=6,
  kv_heads=2,
  head_dim=4,
  rope_theta=333.0,
)
# Prompt, chosen and rejected lengths; also of one token, and no second branch.
LENGTHS = [(5, 3, 4), (1, 1, 1), (7, 6, 1), (2, 1, 7), (4, 3, 0), (1, 5, 5)]


class Float64:
  """`jax.numpy` for a module that is to compute in double precision."""

  float32 = jnp.float64

  def __getattr__(self, name):
    return getattr(jnp, name)


@pytest.fixture(params=["float32", "float64"])
def precision(request, monkeypatch):
  """The relative tolerance, in a world of that precision."""
  if request.param == "float32":
    yield 1e-5
    return
  for module in (attention, decoder, layers, rope, logps):
    monkeypatch.setattr(module, "jnp", Float64())
  with jax.enable_x64(True):
    yield 1e-10


def make_model(dtype=jnp.float32, config=CONFIG, **compute):
  return llama.Model(
    config, llama.Compute(dtype=dtype, param_dtype=dtype, **compute)
  )


def make_params(dtype=np.float32, seed=0):
  """Random weights large enough that attention is far from uniform."""
  shapes = jax.eval_shape(make_model().init_variables, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(
      rng.normal(size=x.shape) / math.sqrt(max(x.shape[-1], 4) / 4), dtype
    ),
    shapes,
  )


@functools.cache
def examples(seed=0, lengths=tuple(LENGTHS)):
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, VOCABULARY, n).astype(np.int32)
  return [
    Example(ids(p), ids(r), ids(q), rest=tuple(map(ids, rest)))
    for p, r, q, *rest in lengths
  ]


def pack(rows, shape=None):
  """A batch of rows, each a list of examples; jax arrays."""
  if shape is None:
    cost = lambda e: token_cost(*map(len, (e.prompt, *e.responses)))
    scored = lambda e: sum(map(len, e.responses))
    shape = RowShape(
      tokens=max(sum(map(cost, row)) for row in rows),
      scored=max(sum(map(scored, row)) for row in rows),
      examples=max(map(len, rows)),
      branches=max(len(e.responses) for row in rows for e in row),
    )
  batch = empty_batch(len(rows), shape)
  for i, row in enumerate(rows):
    fill_row(batch, i, row)
  return jax.tree.map(jnp.asarray, batch)


def separately(params, model, rows):
  """Log-probs of all responses in padded [prompt | response] rows, masked
  causally, with a plain log-softmax: no key range but [0, i], no slot, no
  tile."""
  pairs = [(e.prompt, y) for e in rows for y in e.responses]
  width = max(len(p) + len(y) for p, y in pairs)
  tokens = np.zeros((len(pairs), width), np.int32)
  scored = np.zeros((len(pairs), width), bool)
  for i, (p, y) in enumerate(pairs):
    tokens[i, : len(p) + len(y)] = np.concatenate([p, y])
    scored[i, len(p) : len(p) + len(y)] = True
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
  hidden = model.apply(
    params, tokens, positions, np.zeros_like(tokens), positions + 1
  )
  logits = logps.capped(hidden @ model.unembed(params).T, model.logit_cap)
  table = jax.nn.log_softmax(logits)
  each = jnp.take_along_axis(table[:, :-1], tokens[:, 1:, None], 2)[..., 0]
  return jnp.where(scored[:, 1:], each, 0).sum(axis=1)


def in_rows(params, model, batch, order):
  """Log-probs [N K], in the order of the examples, from a packed batch."""
  scores = score.Score(model, tile=8)(params, batch).logps
  return scores.reshape(-1, scores.shape[-1])[np.array(order)]


PACKED = [[0, 1, 4], [2], [3, 5]]  # three places a row, two of them empty
PLACES = [0, 1, 3, 6, 2, 7]  # where example i lies among the 3 * 3 places


def packed():
  return pack([[examples()[i] for i in row] for row in PACKED])


def with_gradients(function, params, cotangent):
  def both(params, cotangent):
    values, pull_back = jax.vjp(function, params)
    return values, pull_back(cotangent.astype(values.dtype))[0]

  # These programs run once; most of their time would go into optimising them.
  quick = {"xla_backend_optimization_level": 0}
  return jax.jit(both, compiler_options=quick)(params, cotangent)


def assert_close(a, b, rtol):
  """Relative to the largest entry of each array: sums cancel."""
  a, b = np.asarray(a), np.asarray(b)
  np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@functools.cache
def cotangent(responses):
  return np.random.default_rng(9).normal(size=responses)


@functools.cache
def separate_sequences(dtype, lengths):
  rows = examples(lengths=lengths)
  return with_gradients(
    lambda p: separately(p, make_model(dtype, attention="dense"), rows),
    make_params(dtype),
    cotangent(sum(len(e.responses) for e in rows)),
  )


@pytest.mark.parametrize("how", ["dense", "blockwise"])
def test_mirrored_rows_equal_separate_sequences(precision, how, monkeypatch):
  dtype = jnp.float64 if precision < 1e-6 else jnp.float32
  if how == "blockwise":  # several blocks in these short rows, the last ragged
    small = functools.partial(attention.attention, block=8)
    monkeypatch.setattr(layers, "attention", small)
  params = make_params(dtype)
  batch = packed()
  values, grads = with_gradients(
    lambda p: in_rows(
      p, make_model(dtype, attention=how), batch, PLACES
    ).reshape(-1),
    params,
    cotangent(2 * len(LENGTHS)),
  )
  expected, expected_grads = separate_sequences(dtype, tuple(LENGTHS))
  assert values.dtype == dtype
  assert_close(values, expected, precision)
  jax.tree.map(
    lambda a, b: assert_close(a, b, precision * 2), grads, expected_grads
  )
  assert expected[9] == 0  # the branch that is not there
  assert np.abs(expected[:9]).min() > 0.1


# Prompt and response lengths of rankings of 3, 4 and 5, among two pairs.
RANKINGS = (
  (5, 3, 4, 2),
  (2, 1, 3),
  (4, 2, 5, 1, 3),
  (1, 2, 1, 4, 1, 2),
  (6, 1, 1, 5, 2, 1),
  (3, 4, 2),
)


@pytest.mark.parametrize("how", ["dense", "blockwise"])
def test_packed_rankings_equal_separate_sequences(precision, how, monkeypatch):
  dtype = jnp.float64 if precision < 1e-6 else jnp.float32
  if how == "blockwise":
    small = functools.partial(attention.attention, block=8)
    monkeypatch.setattr(layers, "attention", small)
  rows = examples(lengths=RANKINGS)
  batch = pack([[rows[i] for i in row] for row in ([3, 0, 5], [4], [1, 2])])
  places = [1, 6, 7, 0, 3, 2]  # where ranking i lies among the 3 * 3 places
  there = np.array([i < len(e) - 1 for e in RANKINGS for i in range(5)])
  weights = np.zeros(len(there))
  weights[there] = cotangent(int(there.sum()))
  model = make_model(dtype, attention=how)
  values, grads = with_gradients(
    lambda p: in_rows(p, model, batch, places).reshape(-1),
    make_params(dtype),
    weights,
  )
  expected, expected_grads = separate_sequences(dtype, RANKINGS)
  assert values.dtype == dtype
  assert_close(values[there], expected, precision)
  jax.tree.map(
    lambda a, b: assert_close(a, b, precision * 2), grads, expected_grads
  )
  assert np.abs(expected).min() > 0.1
  assert not values[~there].any()  # responses that are not there


# Keys that a query sees


def brute_force_visibility(row):
  """bool[T T] from the meaning of a row: each token is (copy of a prompt,
  branch, place along that branch), and sees its own branch up to itself, and
  the prompt. There is a copy for every two responses."""
  who = []
  for example in row:
    p, branches = len(example.prompt), example.responses
    for k in range(0, len(branches), 2):
      r, q = map(len, (*branches[k : k + 2], ())[:2])
      e = object()
      who += [(e, "second", p - 1 + i) for i in reversed(range(q))]
      who += [(e, "prompt", i) for i in range(p - 1)]
      who += [(e, "first", p - 1 + i) for i in range(r)]
  sees = np.zeros((len(who), len(who)), bool)
  for i, (e, branch, place) in enumerate(who):
    for j, (other, seen, at) in enumerate(who):
      sees[i, j] = e == other and at <= place and seen in (branch, "prompt")
  return sees, [place for *_, place in who]


@pytest.mark.parametrize("seed", range(6))
def test_key_ranges_say_own_branch_so_far_and_the_whole_prompt(seed):
  rng = np.random.default_rng(seed)
  lengths = [
    (*rng.integers(1, 5, 2), rng.integers(0, 5), *rng.integers(1, 5, rest))
    for rest in rng.integers(0, 4, rng.integers(1, 5))
  ]
  row = examples(seed, tuple(lengths))
  sees, places = brute_force_visibility(row)
  n, padding = len(sees), 5
  batch = pack([row], RowShape(n + padding, 99, len(row), branches=5))
  keys = np.arange(n + padding)
  ranges = (keys >= batch.key_start[0, :, None]) & (
    keys < batch.key_end[0, :, None]
  )
  np.testing.assert_array_equal(ranges[:n, :n], sees)
  np.testing.assert_array_equal(batch.positions[0, :n], places)
  assert not ranges[n:].any()  # padding sees nothing
  assert not ranges[:n, n:].any()  # and is not seen


# Attention


def random_ranges(rng, rows, length):
  ends = np.sort(rng.integers(0, length + 1, (2, rows, length)), axis=0)
  ends[:, :, 3] = 4  # an empty range
  return ends[0].astype(np.int32), ends[1].astype(np.int32)


@pytest.mark.parametrize(("length", "block"), [(24, 8), (29, 8), (9, 8)])
def test_blockwise_attention_is_dense_attention(length, block):
  rng = np.random.default_rng(0)
  start, end = random_ranges(rng, 2, length)
  q, k, v, g = (
    rng.normal(size=(2, length, heads, 4)).astype(np.float32)
    for heads in (6, 2, 2, 6)
  )

  @functools.partial(jax.jit, static_argnums=3)
  def run(q, k, v, how):
    out, pull_back = jax.vjp(
      lambda *x: attention.attention(
        *x, start, end, implementation=how, block=block
      ),
      q,
      k,
      v,
    )
    return out, *pull_back(g)

  for a, b in zip(run(q, k, v, "blockwise"), run(q, k, v, "dense")):
    assert_close(a, b, 2e-6)


def test_attention_is_a_softmax_over_the_visible_keys():
  rng = np.random.default_rng(1)
  start, end = random_ranges(rng, 1, 7)
  q, k, v = (rng.normal(size=(1, 7, h, 4)) for h in (6, 2, 2))
  out = np.asarray(
    attention.attention(*map(jnp.float32, (q, k, v)), start, end)
  )
  for t, head in itertools.product(range(7), range(6)):
    keys = slice(start[0, t], end[0, t])
    kv = head // 3  # heads 0..2 share the first key head
    scores = np.exp(k[0, keys, kv] @ q[0, t, head] / math.sqrt(4))
    expected = scores @ v[0, keys, kv] / max(scores.sum(), 1e-300)
    np.testing.assert_allclose(out[0, t, head], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(out[0, 3], 0)  # nothing to see


def test_a_query_that_sees_nothing_has_a_zero_gradient():
  start = end = jnp.zeros((1, 5), jnp.int32)
  f = lambda q, k, v: attention.attention(q, k, v, start, end).sum()
  x = jnp.ones((1, 5, 2, 4))
  for grad in jax.grad(f, argnums=(0, 1, 2))(x, x, x):
    np.testing.assert_array_equal(grad, 0)


def test_an_unknown_attention_is_refused():
  x = jnp.ones((1, 200, 2, 4))
  ends = jnp.ones((1, 200), jnp.int32)
  with pytest.raises(ValueError, match=r"'flash'.*'blockwise'"):
    attention.attention(x, x, x, ends, ends, implementation="flash")


# What may change in a batch without changing a number


@functools.cache
def scored_alone():
  model = make_model()
  batch = packed()
  run = jax.jit(lambda p, b: score.Score(model, tile=8)(p, b).logps)
  return run, make_params(), batch


def test_which_row_a_pair_lies_in_changes_nothing():
  run, params, batch = scored_alone()
  shape = RowShape(batch.tokens.shape[1], batch.slot.shape[1], 3)
  by_example = np.asarray(run(params, batch)).reshape(-1, 2)[PLACES]
  for rows in ([[5, 3], [4, 0, 1], [2]], [[2], [1, 4, 0], [3, 5]]):
    moved = pack([[examples()[i] for i in row] for row in rows], shape)
    places = [
      3 * row + rows[row].index(i)
      for i in range(6)
      for row in range(3)
      if i in rows[row]
    ]
    got = np.asarray(run(params, moved)).reshape(-1, 2)[places]
    assert_close(got, by_example, 2e-6)


def test_what_lies_in_the_padding_changes_nothing():
  run, params, batch = scored_alone()
  rng = np.random.default_rng(3)
  noise = lambda x, high: rng.integers(0, high, x.shape).astype(np.int32)
  unseen, unscored = batch.key_end == 0, batch.slot == 6
  assert unseen.any()
  assert unscored.any()
  length = batch.tokens.shape[1]
  other = batch._replace(
    tokens=jnp.where(unseen, noise(batch.tokens, VOCABULARY), batch.tokens),
    positions=jnp.where(unseen, noise(unseen, 99), batch.positions),
    target=jnp.where(unscored, noise(unscored, VOCABULARY), batch.target),
    source=jnp.where(unscored, noise(unscored, length), batch.source),
  )
  np.testing.assert_array_equal(run(params, other), run(params, batch))


def test_a_pair_does_not_see_its_neighbours():
  run, params, batch = scored_alone()
  theirs = (batch.tokens + 1) % VOCABULARY
  # Row 0 holds examples 0, 1, 4: change all tokens behind the first.
  n = token_cost(*LENGTHS[0])
  other = batch._replace(tokens=batch.tokens.at[0, n:].set(theirs[0, n:]))
  before, after = run(params, batch), run(params, other)
  np.testing.assert_array_equal(after[0, 0], before[0, 0])
  assert (np.asarray(after[0, 1:])[[0, 1], 0] != before[0, 1:, 0]).all()


# log 2


class Distances(losses.Loss):
  """And how far each log-ratio is from 0: a sum of which is 0 only where every
  one is."""

  def __call__(self, **x):
    out = super().__call__(**x)
    far = sum(
      jnp.abs(x[f"policy_{s}_logps"] - x[f"reference_{s}_logps"])
      for s in ("chosen", "rejected")
    )
    wrong = out.loss != jnp.float32(math.log(2))
    return out._replace(
      metrics=out.metrics | {"far": far, "wrong": wrong.astype(jnp.float32)}
    )


@functools.cache
def many_batches():
  """Rows of a few hundred random pairs in three batches of one shape."""
  rng = np.random.default_rng(5)
  shape = RowShape(160, 96, 12)
  batches = []
  for seed in range(3):
    lengths = tuple(map(tuple, rng.integers(1, 40, (24, 3)).tolist()))
    some = examples(seed, lengths)
    n = np.array([lengths])
    tokens, scored = token_cost(*np.moveaxis(n, -1, 0)), n[..., 1:].sum(-1)
    (to,) = spread(tokens, scored, 16, shape.examples)
    rows = [[some[i] for i in np.flatnonzero(to == r)] for r in range(16)]
    batches.append(pack(rows, shape))
  return batches


# Each value of each once with either value of the others.
@pytest.mark.parametrize(
  ("how", "remat", "microbatches"),
  [
    ("blockwise", "none", 1),
    ("blockwise", "block", 2),
    ("dense", "block", 1),
    ("dense", "none", 2),
  ],
)
def test_a_policy_that_is_its_reference_loses_log_2_to_the_last_bit(
  how, remat, microbatches
):
  run = jax.jit(
    functools.partial(
      train_step,
      score=score.Score(make_model(attention=how, remat=remat), tile=64),
      loss=Distances(losses.make("dpo").terms),
      tx=optax.sgd(0.0),
      microbatches=microbatches,
    )
  )
  params = make_params()
  zero = jnp.int32(0)
  state = TrainState(zero, params, optax.sgd(0.0).init(params), zero)
  for batch in many_batches():
    _, sums = run(state, params, batch)
    assert sums["loss"].count == 24
    assert sums["far"].total == 0
    assert sums["wrong"].total == 0
    assert sums["rewards/accuracies"].mean() == 0.5
    assert sums["grad_norm"].total > 0.1


def test_evaluation_at_the_reference_is_log_2_to_the_last_bit():
  params = make_params()
  run = jax.jit(
    functools.partial(
      evaluate_step,
      score=score.Score(make_model(), tile=64),
      loss=Distances(losses.make("dpo").terms),
    )
  )
  for batch in many_batches():
    sums, policy, reference = run(params, params, batch)
    np.testing.assert_array_equal(policy.logps, reference.logps)
    assert sums["wrong"].total == 0


def test_a_batch_is_a_tree_of_arrays():
  assert len(jax.tree.leaves(packed())) == len(Batch._fields) - 1
