"""The last layer at scored tokens only, and layers read out of their stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import make_batch

from dpo_jax.models import gemma2, llama, lora, quantize, qwen3
from dpo_jax.models.stack import open_stack, take_layer
from dpo_jax.score import Score

SIZES = {
  "vocab_size": 32, "width": 16, "ffn": 24, "heads": 4, "kv_heads": 2,
  "head_dim": 4,
}  # fmt: skip
CASES = {
  "llama": (llama, {"layers": 3}, {}),
  "one layer": (llama, {"layers": 1}, {}),
  "recomputed": (llama, {"layers": 3}, {"remat": "block"}),
  "kept on the host": (llama, {"layers": 3}, {"remat": "offload"}),
  "window": (gemma2, {"layers": 3, "window": 5}, {}),
  "window in the last": (gemma2, {"layers": 2, "window": 5,
                         "local": (False, True)}, {}),
  "norms of q": (qwen3, {"layers": 2}, {"dtype": jnp.float32}),
}  # fmt: skip


def make(name):
  family, shape, compute = CASES[name]
  model = family.Model(
    family.Config(**SIZES, **shape), family.Compute(**compute)
  )
  return model, model.init_variables(jax.random.key(0))


def by_weights(score, variables, batch, trained="params"):
  """Scores, and the gradient of something of them by what is trained."""

  def f(weights):
    out = score(variables | {trained: weights}, batch).logps
    return jnp.sin(out).sum(), out

  # At optimisation level 0 both forms round alike, and compile in no time.
  run = jax.jit(
    jax.grad(f, has_aux=True),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return run(variables[trained])


def assert_close(a, b):
  def one(x, y):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)

  jax.tree.map(one, a, b)


@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_are_those_of_all_tokens(name):
  model, variables = make(name)
  some, every = (
    by_weights(Score(model, skip_prompts=skip), variables, make_batch())
    for skip in (True, False)
  )
  assert_close(some, every)
  last = jax.tree.leaves(jax.tree.map(lambda x: x[-1], some[0]["layers"]))
  assert all(np.abs(x).max() > 1e-4 for x in last)


@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_adapters_over_any_base_have_the_gradients_of_all_tokens(kind):
  family, shape, _ = CASES["llama"]
  shape = family.Config(**SIZES | {"width": 64, "ffn": 64}, **shape)
  unpack = {"unpack_weights": quantize.unpack} if kind else {}
  model = family.Model(shape, family.Compute(**unpack))
  variables = model.init_variables(jax.random.key(0))
  adapters = lora.init(jax.random.key(1), variables["params"], lora.Lora(4))
  variables["lora"] = jax.tree.map(lambda x: x + 0.1, adapters)
  if kind:
    variables["params"] = quantize.pack(variables["params"], kind=kind)
  some, every = (
    by_weights(Score(model, skip_prompts=skip), variables, make_batch(),
               "lora")
    for skip in (True, False)
  )  # fmt: skip
  assert_close(some, every)


def test_queries_come_out_in_their_order_and_nothing_where_there_is_none():
  model, variables = make("llama")
  batch = make_batch()
  inputs = batch.tokens, batch.positions, batch.key_start, batch.key_end
  length = batch.tokens.shape[1]
  queries = jnp.array([[5, 2, length, 9]] * len(batch.tokens))
  every = model.apply(variables, *inputs)
  some = model.apply(variables, *inputs, queries=queries)
  np.testing.assert_allclose(some[:, 0], every[:, 5], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(some[:, 3], every[:, 9], rtol=1e-5, atol=1e-5)
  assert not some[:, 2].any()


def scan(weights, x, last, remat):
  """Layers taken one by one, the last by itself; or all by a plain scan."""

  def layer(x, w):
    return x + jnp.tanh(x @ w["a"]) @ w["b"]

  if not last:
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()
  stack, sinks = open_stack(weights)

  def run(carry, i):
    x, sinks = carry
    w, sinks = take_layer(stack, sinks, i)
    return (layer(x, w), sinks), None

  if remat:
    run = jax.checkpoint(run, prevent_cse=False)
  n = len(weights["a"]) - 1
  carry, _ = jax.lax.scan(run, (x, sinks), jnp.arange(n))
  return run(carry, n)[0][0].sum()


@pytest.mark.parametrize("remat", [False, True])
def test_taking_layers_has_the_gradients_of_a_scan_over_them(remat):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = {"a": (4, 8, 12), "b": (4, 12, 8)}
  weights = {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, shapes.items(), strict=False)
  }
  x = jax.random.normal(keys[2], (5, 8))
  taken, scanned = (
    jax.jit(jax.grad(functools.partial(scan, last=last, remat=remat), (0, 1)))(
      weights, x
    )
    for last in (True, False)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), taken, scanned
  )


def test_no_part_of_the_stack_is_copied():
  layers, width, ffn = 8, 64, 256
  weights = {
    "a": jax.ShapeDtypeStruct((layers, width, ffn), jnp.float32),
    "b": jax.ShapeDtypeStruct((layers, ffn, width), jnp.float32),
  }
  x = jax.ShapeDtypeStruct((2, width), jnp.float32)
  size = 2 * layers * width * ffn * 4

  def temporary(f):
    compiled = jax.jit(f).lower(weights, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  f = functools.partial(scan, last=True, remat=True)
  assert temporary(f) < 0.5 * size
  assert temporary(jax.grad(f, 1)) < 0.5 * size
  # The gradient itself, if not written to where it is handed out.
  assert temporary(jax.grad(f, 0)) < 1.5 * size
