"""FLOPs by closed forms, by the masks of packed rows and by the compiler."""

import dataclasses
import functools
import math

import flax.traverse_util as traverse
import jax
import numpy as np
import optax
import pytest
from runs import small_config
from test_plan import make_examples, pairs, rankings

from dpo_jax import flops, losses
from dpo_jax.data.corpus import write_corpus
from dpo_jax.data.plan import Plan
from dpo_jax.models import llama, lora, qwen3_moe
from dpo_jax.run import Run
from dpo_jax.score import Score
from dpo_jax.train_step import train_step
from dpo_jax.trainable import Trainable
from dpo_jax.update import TrainState

SHAPE = llama.Config(
  vocab_size=1024, width=128, ffn=384, layers=1, heads=4, kv_heads=2,
  head_dim=32, tied=False,
)  # fmt: skip


def shapes(config, adapters=None):
  variables = jax.eval_shape(
    llama.Model(config).init_variables, jax.random.key(0)
  )
  if adapters:
    variables["lora"] = jax.eval_shape(
      lambda key: lora.init(key, variables["params"], adapters),
      jax.random.key(0),
    )
  return variables


def costs(config, variables, **settings):
  trainable = Trainable(variables, **settings)
  trained, _ = trainable.split(variables)
  sizes = {
    path: math.prod(x.shape[1:])
    for path, x in traverse.flatten_dict(trained, sep="/").items()
    if path.startswith("lora/")
  }
  return flops.Costs(config, trainable.layers(), sizes)


def counted(batch, window):
  """Keys that tokens of a packed batch see, one by one, f[B T]."""
  index = np.arange(batch.tokens.shape[1])
  inside = (batch.key_start[..., None] <= index) & (
    index < batch.key_end[..., None]
  )
  back = batch.positions[..., None] - batch.positions[:, None]
  return (inside & (back < window)).sum(axis=-1)


@pytest.mark.parametrize("window", [1, 3, 8, 1000])
@pytest.mark.parametrize("kind", ["paired", "unpaired", "sft"])
def test_keys_seen_are_those_that_the_masks_of_packed_rows_show(kind, window):
  config = dataclasses.replace(
    SHAPE, layers=2, window=window, local=(True, False)
  )
  plan = Plan(pairs(kind=kind), batch_size=12, steps=3, seed=1)
  for step in range(3):
    batch, _ = plan[step]
    work = flops.work(config, *plan.lengths(step))
    assert work.seen == counted(batch, np.inf).sum()
    assert work.seen_near == counted(batch, window).sum()
    there = batch.slot < batch.lengths[0].size
    scored = np.take_along_axis(counted(batch, np.inf), batch.source, axis=1)
    assert work.asked == scored[there].sum()
    assert work.tokens == plan.tokens(step) == (batch.key_end > 0).sum()
    assert work.scored == batch.lengths.sum()


def test_a_prompt_counts_once_for_any_number_of_responses():
  plan = Plan(rankings(most=4), batch_size=8, steps=1)
  prompts, responses = plan.lengths(0)
  work = flops.work(SHAPE, prompts, responses)
  assert work.tokens == (prompts - 1).sum() + responses.sum()
  assert work.tokens < plan.tokens(0)  # where it lies twice


def test_an_empty_response_sees_nothing():
  assert flops.work(SHAPE, [5], [[3, 0]]) == flops.work(SHAPE, [5], [[3]])


def test_a_dense_step_is_six_flops_a_weight_and_token():
  config = dataclasses.replace(SHAPE, layers=3)
  variables = shapes(config)
  c = costs(config, variables)
  leaves = traverse.flatten_dict(variables["params"], sep="/")
  layers = sum(
    math.prod(x.shape) for path, x in leaves.items() if path.endswith("kernel")
  )
  head = config.vocab_size * config.width
  # No key is seen: what is left are products with weights.
  work = flops.Work(tokens=100, seen=0, seen_near=0, scored=100, asked=0)
  assert c.forward(work) == 2 * layers * 100 + 2 * head * 100
  assert c.backward(work) == 2 * c.forward(work)
  # Scores and their use, forward and twice backward, in each layer.
  attention = flops.Work(0, 7, 0, 0, 7)
  each = 4 * config.heads * config.head_dim * 7 * config.layers
  assert (c.forward(attention), c.backward(attention)) == (each, 2 * each)


def test_the_last_layer_makes_keys_and_values_of_a_prompt_and_no_more():
  config = dataclasses.replace(SHAPE, layers=3)
  c = costs(config, shapes(config))
  q, kv, mlp = 128 * 4 * 32, 128 * 2 * 32, 3 * 128 * 384
  prompt = flops.Work(tokens=1, seen=0, seen_near=0, scored=0, asked=0)
  layer = 2 * (2 * q + 2 * kv + mlp)
  assert c.forward(prompt) == 2 * layer + 2 * 2 * kv
  assert c.backward(prompt) == 2 * c.forward(prompt)
  scored = flops.Work(tokens=1, seen=0, seen_near=0, scored=1, asked=0)
  assert c.forward(scored) == 3 * layer + 2 * 1024 * 128
  rank = 4
  c = costs(config, shapes(config, lora.Lora(rank)))
  pair = 2 * rank * (128 + 2 * 32)  # of k or v
  own = 2 * rank * (2 * (128 + 4 * 32) + 3 * (128 + 384)) + 2 * pair
  extra = c.forward(prompt, adapters=True) - c.forward(prompt)
  assert extra == 2 * own + 2 * pair


def test_layers_with_a_window_count_what_that_shows():
  config = dataclasses.replace(
    SHAPE, layers=3, window=8, local=(True, True, False)
  )
  c = costs(config, shapes(config))
  each = 4 * config.heads * config.head_dim
  assert c.forward(flops.Work(0, 100, 10, 0, 100)) == each * (100 + 2 * 10)
  assert c.backward(flops.Work(0, 100, 10, 0, 100)) == 2 * each * (100 + 2 * 10)


def test_of_experts_only_those_that_a_token_chose_count():
  config = qwen3_moe.Config(
    vocab_size=64, width=16, ffn=8, layers=2, heads=2, kv_heads=1, head_dim=8,
    experts=32, experts_per_token=3,
  )  # fmt: skip
  variables = jax.eval_shape(
    qwen3_moe.Model(config).init_variables, jax.random.key(0)
  )
  leaves = traverse.flatten_dict(variables["params"]["layers"], sep="/")
  active = sum(
    math.prod(x.shape) * (3 / 32 if "/experts/" in path else 1)
    for path, x in leaves.items()
    if path.endswith("kernel")
  )
  c = costs(config, variables)
  work = flops.Work(tokens=10, seen=0, seen_near=0, scored=10, asked=0)
  head = 64 * 16
  assert c.forward(work) == 2 * (active + head) * 10
  assert c.backward(work) == 4 * (active + head) * 10


def test_what_is_frozen_needs_no_gradient_of_its_own():
  config = dataclasses.replace(SHAPE, layers=4)
  work = flops.Work(tokens=100, seen=1000, seen_near=0, scored=100, asked=1000)
  variables = shapes(config)
  whole = costs(config, variables)
  forward, head = whole.forward(work), 2 * 1024 * 128 * 100
  layers = forward - head
  # Below the lowest trained layer nothing runs backward.
  upper = costs(config, variables, freeze="embed|layers/[01]/")
  assert upper.forward(work) == forward
  # Twice the forward, for half of the layers; a frozen head passes through.
  assert upper.backward(work) == layers + head
  # Only the head: its own gradient, and none through it.
  assert costs(config, variables, freeze="^embed|layers|norm").backward(
    work
  ) == head  # fmt: skip
  # All layers run backward for the embedding below them.
  first = costs(config, variables, freeze="unembed|layers|norm")
  seen = 4 * config.heads * config.head_dim * 4 * 1000
  assert first.backward(work) == layers + seen + head


@pytest.mark.parametrize("targets", [(), ("q", "down")])
def test_adapters_need_their_own_gradients_and_those_through_the_base(targets):
  config = dataclasses.replace(SHAPE, layers=2)
  c = costs(config, shapes(config, lora.Lora(4, targets=targets)))
  work = flops.Work(tokens=100, seen=0, seen_near=0, scored=100, asked=0)
  d, q, kv, f = 128, 4 * 32, 2 * 32, 384
  sums = {"q": d + q, "k": d + kv, "v": d + kv, "o": q + d,
          "gate": d + f, "up": d + f, "down": f + d}  # fmt: skip
  own = 2 * 2 * 4 * sum(sums[name] for name in targets or sums) * 100
  assert c.forward(work, adapters=True) == c.forward(work) + own
  assert c.backward(work) == c.forward(work) + 2 * own


def compiled_flops(config, batch, adapters, freeze):
  """Of a step with an online reference, by the compiler."""
  # Of dense attention the scores would be made again, as kernels do.
  compute = llama.Compute(attention="dense", remat="none")
  model = llama.Model(config, compute)
  variables = shapes(config, adapters)
  trainable = Trainable(variables, freeze)
  trained, frozen = trainable.split(variables)
  tx = optax.sgd(1e-3)
  zero = jax.ShapeDtypeStruct((), np.int32)
  state = TrainState(zero, trained, jax.eval_shape(tx.init, trained), zero)
  step = functools.partial(
    train_step,
    score=Score(model, tile=2**20),  # one: loops are counted once
    loss=losses.make("dpo"),
    tx=tx,
    join=trainable.join,
  )
  reference = {"params": variables["params"]}
  lowered = jax.jit(step).lower(state, reference, batch, frozen)
  return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  ("adapters", "freeze", "above"),
  [(None, "", 1.05), (None, "embed", 1.05), (lora.Lora(8), "", 1.05)],
  ids=["all", "embeddings frozen", "adapters"],
)
def test_the_compiler_counts_the_same_for_a_dense_step(adapters, freeze, above):
  """Padding and masked keys, which dense attention computes, put in."""
  plan = Plan(make_examples([33] * 4, [16] * 4, [16] * 4), batch_size=4)
  batch, _ = plan[0]
  rows, length = batch.tokens.shape
  work = flops.work(SHAPE, *plan.lengths(0))
  scored = batch.source.size
  work = flops.Work(rows * length, rows * length**2, 0, scored, scored * length)
  c = costs(SHAPE, shapes(SHAPE, adapters), freeze=freeze)
  ours = c.forward(work) + c.forward(work, adapters=True) + c.backward(work)
  theirs = compiled_flops(SHAPE, batch, adapters, freeze)
  if adapters:  # below those of the lowest q, k and v nothing is trained
    q, kv = (SHAPE.width * SHAPE.head_dim * heads for heads in (4, 2))
    ours -= 2 * (scored * q + 2 * work.tokens * kv)
  # Softmax, norms and activations come on top.
  assert 1 <= theirs / ours < above


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=24)


def test_a_run_counts_what_its_method_needs(corpus):
  def first_step(loss="dpo", **changes):
    run = Run(small_config(corpus, **{"loss.name": loss}, **changes))
    return run, run.ideal_flops(1)

  run, dpo = first_step()
  work = flops.work(run.built.model.config, *run.train_plan.lengths(0))
  forward = run._costs.forward(work)
  assert dpo == 4 * forward  # a reference, and three for the gradient
  assert first_step("orpo")[1] == 3 * forward
  assert first_step(**{"reference.precompute": True})[1] == 3 * forward
  assert 3 * forward < first_step(**{"lora.rank": 2})[1] < 4 * forward


def test_mismatched_completions_are_scored_and_have_no_gradient(corpus):
  run = Run(small_config(corpus, **{"loss.name": "kto"}))
  shape, c = run.built.model.config, run._costs
  prompts, responses = run.train_plan.lengths(0)
  assert (responses[:, 1] > 0).all()
  both = flops.work(shape, prompts, responses)
  own = flops.work(shape, prompts, responses[:, :1])
  assert run.ideal_flops(1) == 2 * c.forward(both) + c.backward(own)


@pytest.mark.parametrize(
  ("kind", "dtype", "tera"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H100 80GB HBM3", "float32", 494),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H200", "bfloat16", 989),
    ("NVIDIA A100-SXM4-80GB", "float32", 156),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40S", "bfloat16", 362),
    ("TPU v4", "bfloat16", 275),
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v6 lite", "float32", 918),
    ("TPU7x", "bfloat16", 1153.5),
  ],
)
def test_peaks_go_by_the_kind_of_a_device(kind, dtype, tera):
  assert flops.peak(kind, dtype) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA H1000", ""])
def test_an_unknown_device_has_no_peak_but_the_one_it_is_given(kind):
  assert flops.peak(kind, "bfloat16") is None
  assert flops.peak(kind, "bfloat16", 2.5) == 2.5e12
