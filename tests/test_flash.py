"""Attention kernels against the dense mask: on CPU interpreted, for GPU and TPU
lowered. What they are on the devices themselves is for
scripts/benchmarks/attention.py to say."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_mirrored_rows as mirrored
from test_mirrored_rows import assert_close

from dpo_jax import losses, score, sharding
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.models import attention, flash_mosaic, flash_triton, layers
from dpo_jax.models.blockwise import Window
from dpo_jax.models.key_blocks import bounds
from dpo_jax.train_step import train_step
from dpo_jax.update import TrainState

# Far from the sizes that devices get, so that short rows have many blocks; and
# no two kernels cut alike.
SMALL = {
  "triton": {
    "tiles": flash_triton.Tiles(
      flash_triton.Tile(32, 16, 1),
      flash_triton.Tile(16, 32, 1),
      flash_triton.Tile(32, 32, 1),
    )
  },
  "mosaic": {"tile": flash_mosaic.Tile(16, 32)},
}
KERNELS = tuple(attention.KERNELS)
CALLS = {"triton": "gpu$xla.gpu.triton", "mosaic": "tpu_custom_call"}
PLATFORMS = {"triton": "cuda", "mosaic": "tpu"}


@functools.cache
def planned(tokens=160):
  """Two rows of pairs that a plan packed: short and long ones, some without a
  rejected response, and padding at the end."""
  rng = np.random.default_rng(0)
  prompt, lengths = rng.integers(1, 40, 16), rng.integers(1, 30, (16, 2))
  lengths[::5, 1] = 0
  sizes = prompt + lengths.sum(axis=1)
  examples = Examples(
    tokens=np.ones(sizes.sum(), np.int32),
    offsets=np.concatenate([[0], np.cumsum(sizes)]),
    prompt_lengths=prompt.astype(np.int32),
    lengths=lengths.astype(np.int32),
    desirable=np.ones(16, bool),
    margins=np.zeros(16, np.float32),
    rows=np.arange(16),
    subsets=np.zeros(16, np.int32),
    subset_names=("random",),
    kind="paired",
    format="random",
    report={},
    fingerprint="random",
  )
  batch = Plan(examples, batch_size=16, row_length=tokens)[0].batch
  batch = jax.tree.map(lambda x: x[:3], batch)
  assert (batch.key_end == 0).any(axis=1).sum() > 0
  assert (batch.weights.sum(axis=1) > 1).all()
  return batch


def random_inputs(rows, queries, keys, heads, kv_heads, head_dim, dtype):
  rng = np.random.default_rng(1)
  draw = lambda n, heads: jnp.asarray(
    rng.normal(size=(rows, n, heads, head_dim)), dtype
  )
  k, v = (draw(keys, kv_heads) for _ in range(2))
  return 2 * draw(queries, heads), k, v, draw(queries, heads)


def with_gradients(function, q, k, v, g):
  @jax.jit
  def run(q, k, v, g):
    out, pull_back = jax.vjp(function, q, k, v)
    return out, *pull_back(g)

  return run(q, k, v, g)


def compare(function, inputs, start, end, tolerance, **options):
  """A kernel's values and gradients with the dense mask's in float32."""
  start, end = jnp.asarray(start), jnp.asarray(end)
  found = with_gradients(
    lambda *x: function(*x, start, end, **options), *inputs
  )
  expected = with_gradients(
    lambda *x: attention.attention(
      *x, start, end, implementation="dense", **options
    ),
    *(x.astype(jnp.float32) for x in inputs),
  )
  for ours, dense, like in zip(found, expected, (*inputs[:1], *inputs[:3])):
    assert ours.dtype == like.dtype
    assert_close(ours.astype(jnp.float32), dense, tolerance)
  unseen = np.asarray(end <= start)
  for x in found[:2]:  # a query that sees nothing
    assert not np.asarray(x, np.float32)[unseen].any()
  return found


@pytest.mark.parametrize(("windowed", "cap"), [(False, None), (True, 0.7)])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_dense_attention_on_packed_mirrored_rows(
  name, windowed, cap
):
  batch = planned()
  window = None
  if windowed:
    at = jnp.asarray(batch.positions)
    window = Window(at - 12, at)
  function = functools.partial(
    attention.KERNELS[name].flash_attention, **SMALL[name]
  )
  inputs = random_inputs(
    *batch.tokens.shape, batch.tokens.shape[1], 6, 2, 4, jnp.float32
  )
  compare(
    function, inputs, batch.key_start, batch.key_end, 1e-5,
    window=window, cap=cap, scale=0.6,
  )  # fmt: skip


# bfloat16 rounds probabilities and the gradients of scores to 8 bits before
# products; relative to the largest entry.
@pytest.mark.parametrize(
  ("head_dim", "dtype", "tolerance"),
  [
    (64, jnp.bfloat16, 0.02),
    (80, jnp.float32, 1e-5),
    (256, jnp.bfloat16, 0.02),
  ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_dense_attention_with_the_blocks_of_devices(
  name, head_dim, dtype, tolerance
):
  rng = np.random.default_rng(2)
  start, end = mirrored.random_ranges(rng, 2, 200)
  # Another number of keys, and ranges in no order.
  inputs = random_inputs(2, 200, 333, 4, 1, head_dim, dtype)
  compare(
    functools.partial(attention.attention, implementation=name),
    inputs, start, end * 333 // 200, tolerance,
  )  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_of_padding_gives_zeros_and_zero_gradients(name):
  inputs = random_inputs(2, 160, 160, 2, 1, 8, jnp.float32)
  end = np.zeros((2, 160), np.int32)
  end[0] = np.arange(160) + 1
  found = compare(
    functools.partial(attention.attention, implementation=name),
    inputs, np.zeros_like(end), end, 1e-5,
  )  # fmt: skip
  for x in found:
    assert not np.asarray(x[1]).any()


def test_blocks_that_meet_are_those_with_a_visible_pair():
  batch = planned()
  start, end, at = batch.key_start, batch.key_end, batch.positions
  keys = np.arange(160)
  seen = (keys >= start[..., None]) & (keys < end[..., None])
  near = at[:, None] >= at[..., None] - 5
  for visible, window in (
    (seen, None),
    (seen & near, Window(jnp.asarray(at - 5), jnp.asarray(at))),
  ):
    met = visible.reshape(-1, 10, 16, 5, 32).any(axis=(2, 4))
    found = bounds(start, end, window, 160, 16, 32)
    for meets, (first, last) in zip((met, met.swapaxes(1, 2)), found):
      for b, i in np.ndindex(first.shape):
        there = np.flatnonzero(meets[b, i])
        if not len(there):
          assert window is not None or first[b, i] == last[b, i]
          continue
        ends = there[0], there[-1] + 1
        if window is None:  # to the block
          assert (first[b, i], last[b, i]) == ends
        assert first[b, i] <= ends[0] and ends[1] <= last[b, i]
  whole, cut = (
    sum(
      int((b.last - b.first).sum()) for b in bounds(start, end, w, 160, 16, 8)
    )
    for w in (None, window)
  )
  assert cut < whole  # a window leaves blocks out


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rest", [(jnp.bfloat16, 128), (jnp.float32, 256)])
def test_the_compiler_of_its_platform_takes_a_kernel(name, rest):
  dtype, head_dim = rest
  inputs = random_inputs(1, 1, 1, 4, 2, head_dim, dtype)
  q, k, v, g = (
    jax.ShapeDtypeStruct((2, 320, *x.shape[2:]), x.dtype) for x in inputs
  )
  ids = jax.ShapeDtypeStruct((2, 320), jnp.int32)

  def run(q, k, v, g, start, end, at):
    out, pull_back = jax.vjp(
      lambda *x: attention.attention(
        *x, start, end, window=Window(at - 9, at), cap=30.0, implementation=name
      ),
      q, k, v,
    )  # fmt: skip
    return out, *pull_back(g)

  traced = jax.jit(run).trace(q, k, v, g, ids, ids, ids)
  try:
    text = traced.lower(lowering_platforms=(PLATFORMS[name],)).as_text()
  except RuntimeError as e:  # jax from 0.11 on asks which GPU it is for
    pytest.skip(str(e))
  # Forward, dq, dk and dv together; and nothing that is interpreted.
  assert text.count(CALLS[name]) == 3
  assert "stablehlo.while" not in text


@functools.cache
def one_step(how):
  """Loss and gradients of a step of DPO on packed rows."""
  model = mirrored.make_model(attention=how)
  params = mirrored.make_params()
  tx = optax.sgd(1.0)
  zero = jnp.int32(0)
  state = TrainState(zero, params, tx.init(params), zero)
  step = functools.partial(
    train_step,
    score=score.Score(model, tile=8),
    loss=losses.make("dpo", beta=0.3),
    tx=tx,
  )
  reference = mirrored.make_params(seed=1)
  state, sums = jax.jit(step)(state, reference, mirrored.packed())
  moved = jax.tree.map(lambda a, b: a - b, params, state.params)
  return sums["loss"].mean(), moved


@pytest.mark.parametrize("name", KERNELS)
def test_a_training_step_is_the_same_under_each(name, monkeypatch):
  expected, expected_grads = one_step("dense")
  small = functools.partial(attention.attention, block=8)
  monkeypatch.setattr(layers, "attention", small)
  loss, grads = one_step(name)
  assert_close(loss, expected, 1e-5)
  jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), grads, expected_grads)


@pytest.mark.parametrize("name", ["blockwise", *KERNELS])
def test_a_model_has_its_kernels_placed_over_the_mesh(name):
  placed = []

  def place(function):
    placed.append(function)
    return function

  model = mirrored.make_model(attention=name, place_attention=place)
  ids = jnp.zeros((1, 160), jnp.int32)
  jax.eval_shape(model.apply, mirrored.make_params(), ids, ids, ids, ids)
  assert bool(placed) == (name in KERNELS)
  pins = sharding.Pins(sharding.make_mesh(devices=jax.devices()[:1]))
  assert pins.for_model()["place_attention"] == pins.attention


def device(platform, **fields):
  return types.SimpleNamespace(platform=platform, **fields)


@pytest.mark.parametrize(
  ("where", "dtype", "head_dim", "chosen"),
  [
    (device("cpu"), jnp.float32, 64, "blockwise"),
    (device("gpu", compute_capability="9.0"), jnp.bfloat16, 128, "triton"),
    (device("gpu", compute_capability="8.6"), jnp.float16, 64, "triton"),
    (device("gpu", compute_capability="7.5"), jnp.float16, 64, "blockwise"),
    (device("gpu", compute_capability="gfx942"), jnp.float32, 64, "blockwise"),
    (device("gpu", compute_capability="9.0"), jnp.float32, 512, "blockwise"),
    (device("gpu", compute_capability="9.0"), jnp.float64, 64, "blockwise"),
    (device("tpu"), jnp.bfloat16, 256, "mosaic"),
    (device("tpu"), jnp.float16, 256, "blockwise"),
    (None, jnp.float32, 64, "blockwise"),  # of these tests
  ],
)
def test_auto_is_what_the_device_runs_fastest(where, dtype, head_dim, chosen):
  assert attention.choose(dtype, head_dim, where) == chosen


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_does_not_take_is_refused(name):
  x = jnp.ones((1, 200, 1, 512))
  ends = jnp.ones((1, 200), jnp.int32)
  with pytest.raises(ValueError, match=rf"'{name}' takes.*at most 256.*512"):
    attention.attention(x, x, x, ends, ends, implementation=name)
