"""What the forward of a policy keeps for its backward, counted by shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from test_flops_asked import products
from test_train_step import make_batch

from dpo_jax.models import llama, lora, mixtral, qwen3
from dpo_jax.models.attention import attention
from dpo_jax.models.kept import only_products
from dpo_jax.score import Score

F, D, LAYERS, KV_HEADS, HEAD = 24, 16, 3, 2, 4
SIZES = {
  "vocab_size": 32, "width": D, "ffn": F, "layers": LAYERS, "heads": 4,
  "kv_heads": KV_HEADS, "head_dim": HEAD,
}  # fmt: skip
FAMILIES = {
  "llama": (llama, {}),
  "norms of q": (qwen3, {}),
  "experts": (mixtral, {"experts": 4, "experts_per_token": 2}),
}
DENSE = [("llama", False), ("llama", True), ("norms of q", False)]


def make(name, remat, adapters):
  family, changes = FAMILIES[name]
  compute = family.Compute(remat=remat)
  model = family.Model(family.Config(**SIZES, **changes), compute)
  variables = model.init_variables(jax.random.key(0))
  if adapters:
    made = lora.init(jax.random.key(1), variables["params"], lora.Lora(2))
    variables["lora"] = jax.tree.map(lambda x: x + 0.1, made)
  return Score(model), variables, "lora" if adapters else "params"


def residuals(name, remat, adapters=False):
  """Shapes of what a forward hands its backward for a batch."""
  score, variables, trained = make(name, remat, adapters)

  def forward(weights):
    run = lambda w: score(variables | {trained: w}, make_batch()).logps
    return jax.vjp(run, weights)

  program = jax.make_jaxpr(forward)(variables[trained]).jaxpr
  weights = {x.shape for x in jax.tree.leaves(variables)}
  made = {x for x in program.outvars if isinstance(x, Var)}  # no numbers
  shapes = [x.aval.shape for x in made - set(program.invars)]
  return [x for x in shapes if not {x, x[1:]} & weights]


def count(shapes, *last):
  """Arrays that end so, of the layers in the scan and of the last one, which
  runs by itself."""
  batch = make_batch()
  of_scan = (LAYERS - 1, *batch.tokens.shape, *last)
  of_last = (*batch.target.shape, *last)
  return shapes.count(of_scan), shapes.count(of_last)


@pytest.mark.parametrize(("name", "adapters"), DENSE)
def test_of_an_mlp_its_two_products_are_kept_and_nothing_between(
  name, adapters
):
  shapes = residuals(name, "minimal", adapters)
  assert count(shapes, F) == (2, 2)  # gate and up
  assert count(shapes, D)[0] == 2  # the layer's input, what attention adds
  assert count(shapes, KV_HEADS, HEAD)[0] == 2  # k and v
  assert len([x for x in shapes if x[-1:] == (F,)]) == 4  # in no other shape
  assert count(residuals(name, "none", adapters), F)[0] > 2
  assert count(residuals(name, "block", adapters), F) == (0, 0)


def test_of_experts_their_two_products_are_kept_and_nothing_between():
  wide = lambda remat: [
    x for x in residuals("experts", remat) if x[-1:] == (F,)
  ]
  assert len(wide("minimal")) == 2
  assert len(wide("none")) > 2


def test_scores_of_short_rows_are_made_again():
  tokens = make_batch().tokens.shape[1]
  square = lambda remat: [
    x for x in residuals("llama", remat) if x[-2:] == (tokens, tokens)
  ]
  assert square("none") and not square("minimal")


@pytest.mark.parametrize("how", ["blockwise", "triton", "mosaic"])
def test_what_an_attention_made_is_kept_and_not_made_again(how):
  q = jnp.ones((1, 256, 2, 16))
  start = jnp.zeros((1, 256), jnp.int32)
  run = functools.partial(attention, implementation=how)

  def f(q, x):
    # A tanh, so that what comes out is read by the backward.
    return jnp.tanh(run(q, x, x, start, start + 9)).sum()

  def asked(f):
    jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(q, q).jaxpr
    return sum(flops for flops, *_ in products(jaxpr))

  again = jax.checkpoint(f, policy=only_products)
  assert asked(again) == asked(f) < asked(jax.checkpoint(f))


@pytest.mark.parametrize(("name", "adapters"), [*DENSE, ("experts", False)])
def test_what_is_kept_changes_no_number(name, adapters):
  def run(remat):
    score, variables, trained = make(name, remat, adapters)
    f = lambda w: score(variables | {trained: w}, make_batch()).logps.sum()
    return jax.jit(jax.value_and_grad(f))(variables[trained])

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    run("none"), run("minimal"),
  )  # fmt: skip
