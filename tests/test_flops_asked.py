"""The products that a step asks for, counted in its program and not in the
compiler's: near to the least that the cost model says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_flops import costs
from test_plan import make_examples

from dpo_jax import flops, losses
from dpo_jax.data.plan import Plan
from dpo_jax.models import llama
from dpo_jax.score import Score
from dpo_jax.train_step import train_step
from dpo_jax.update import TrainState

BLOCK, KEY_BLOCK = 128, 64  # of blockwise attention
PAIRS = 4


def inner(eqn):
  """The programs inside of an equation."""
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        yield part


def products(jaxpr, times=1):
  """Yields (FLOPs, whether with the vocabulary, in how many loops of unknown
  length) of each product, those in scans as often as they run."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left, right, out = (x.aval.shape for x in (*eqn.invars, *eqn.outvars))
      each = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
      yield each * times, CONFIG.vocab_size in (*left, *right, *out), 0
    loop = eqn.primitive.name == "while"
    often = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for part in inner(eqn):
      for amount, of_head, below in products(part, times * often):
        yield amount, of_head, below + loop


CONFIG = llama.Config(
  vocab_size=32_000, width=256, ffn=704, layers=4, heads=8, kv_heads=8,
  head_dim=32,
)  # fmt: skip


@functools.cache
def traced(prompt, response):
  """The plan of one batch, its arrays, and the step's products."""
  prompts, responses = np.full(PAIRS, prompt), np.full((PAIRS, 2), response)
  examples = make_examples(prompts, *responses.T)
  plan = Plan(examples, batch_size=PAIRS, shuffle=False)
  model = llama.Model(CONFIG, llama.Compute(attention="blockwise"))
  variables = jax.eval_shape(model.init_variables, jax.random.key(0))
  tx = optax.sgd(1.0)
  zero = jnp.int32(0)
  state = TrainState(zero, variables, tx.init(variables), zero)
  step = functools.partial(
    train_step, score=Score(model), loss=losses.make("dpo"), tx=tx
  )
  batch = plan[0].batch
  jaxpr = jax.make_jaxpr(step)(state, variables, batch).jaxpr
  work = flops.work(CONFIG, prompts, responses)
  return work, batch, list(products(jaxpr))


def least(work):
  variables = jax.eval_shape(
    llama.Model(CONFIG).init_variables, jax.random.key(0)
  )
  c = costs(CONFIG, variables)
  return 2 * c.forward(work) + c.backward(work)


def blocks_met(batch, at=None):
  """Blocks of queries times blocks of keys from the first that one of them sees
  to the last."""
  met = 0
  start, end = (
    x if at is None else np.take_along_axis(x, at, axis=1)
    for x in (batch.key_start, batch.key_end)
  )
  for first in range(0, start.shape[1], BLOCK):
    s, e = (x[:, first : first + BLOCK] for x in (start, end))
    if (e > s).any():
      begin = s[e > s].min() // KEY_BLOCK
      met += -(-e[e > s].max() // KEY_BLOCK) - begin
  return met


SHAPES = [(128, 64), (512, 128), (1024, 256)]


@pytest.mark.parametrize(("prompt", "response"), SHAPES)
def test_products_with_weights_are_the_least_within_two_hundredths(
  prompt, response
):
  work, _, found = traced(prompt, response)
  weights = work._replace(seen=0, seen_near=0, asked=0)
  # Tiles of the head end with a pair; of these shapes they are filled. What is
  # two loops deep is for pairs that no tile holds.
  tiles = PAIRS * 2 * response // 1024
  asked = sum(
    x * (1, tiles, 0)[loops] for x, of_head, loops in found if of_head
  ) + sum(x for x, of_head, loops in found if not (of_head or loops))
  assert least(weights) <= asked <= 1.02 * least(weights)


@pytest.mark.parametrize(
  ("prompt", "response", "bound"),
  [(128, 64, 1.07), (512, 128, 1.08), (1024, 256, 1.08)],
)
def test_with_attention_the_excess_is_the_edges_of_its_blocks(
  prompt, response, bound
):
  """A block costs two products forward and five backward, one of which computes
  scores again: nine with the reference's."""
  work, batch, found = traced(prompt, response)
  queries = -(-batch.tokens.shape[1] // BLOCK)
  of_scored = -(-batch.source.shape[1] // BLOCK)
  earlier = CONFIG.layers - 1
  a_block = 9 * 2 * BLOCK * KEY_BLOCK * CONFIG.heads * CONFIG.head_dim
  looped = sum(x for x, of_head, loops in found if loops and not of_head)
  assert looped == a_block * (queries * earlier + of_scored)
  met = blocks_met(batch) * earlier + blocks_met(batch, batch.source)
  seen = work.seen * earlier + work.asked
  visited = BLOCK * KEY_BLOCK * met
  weights = least(work._replace(seen=0, seen_near=0, asked=0))
  attention = least(work) - weights
  assert attention == 8 * 2 * seen * CONFIG.heads * CONFIG.head_dim
  asked = weights + attention * visited / seen * 9 / 8
  assert seen < visited and asked < bound * least(work)
