"""Answers do not depend on company: other prompts, batches, or devices."""

import json

import jax
import numpy as np
import pytest
from devices import run_on_eight

from dpo_jax import sharding
from dpo_jax.models import llama
from dpo_jax.sample import make_sampler, make_stream

MESHES = ((2, 2, 2), (1, 2, 4))  # kv heads do not divide by 4
SETTINGS = (
  {"temperature": 0},
  {"temperature": 1.0},
  {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
)
QUICK = "jax_disable_most_optimizations"
PROMPTS = [[1, *range(5, 5 + n)] for n in (3, 1, 9, 40, 2)]
STOPS = tuple(range(0, 64, 9))


def tiny(mesh=None):
  """A model of random weights, on a mesh or on one device."""
  config = llama.Config(
    vocab_size=64, width=16, ffn=32, layers=2, heads=4, kv_heads=2, head_dim=8
  )
  compute = llama.Compute()
  if mesh is not None:
    pins = sharding.Pins(mesh)
    compute = llama.Compute(**pins.for_model())
  model = llama.Model(config, compute)
  variables = jax.jit(model.init_variables)(jax.random.key(0))
  # Random weights say the same at every place; larger ones do not.
  variables = jax.tree.map(lambda x: x * 6 if x.ndim > 2 else x, variables)
  variables["params"]["unembed"] *= 40
  if mesh is not None:
    variables = jax.device_put(variables, sharding.shard_tree(variables, mesh))
  return model, variables


pytestmark = pytest.mark.usefixtures("compile_quickly")


def answers(mesh=None, some=SETTINGS, **more):
  """Those of the settings: tokens, log-probs and lengths, as lists."""
  model, variables = tiny(mesh)
  out = []
  for settings in some:
    sampler = make_sampler(
      model, max_tokens=12, stop_ids=STOPS, mesh=mesh, **settings, **more
    )
    out.append([x.tolist() for x in sampler(variables, PROMPTS, 3)])
  return out


def same(found, expected):
  for one, other in zip(found, expected, strict=True):
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)
    assert one[2] == other[2]


@pytest.fixture(scope="module")
def alone():
  return answers()


def test_the_prompts_have_answers_of_many_lengths(alone):
  assert len({n for one in alone for n in one[2]}) > 4
  assert len({str(row) for one in alone for row in one[0]}) > 8


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_do_not_depend_on_the_size_of_batches(alone, batch_size):
  same(answers(some=SETTINGS[1:2], batch_size=batch_size), alone[1:2])


def test_programs_are_as_few_as_rounded_widths():
  model, variables = tiny()
  sampler = make_sampler(
    model, max_tokens=1, stop_ids=STOPS, temperature=0, batch_size=4
  )
  for length in (1, 2, 31, 32, 33, 64, 60):
    sampler(variables, [[1] * length] * 3, 0)
  assert sampler.compiled() == 2
  # 9 prompts are three batches of 3 rows, 8 are two of 4.
  sampler(variables, [[1]] * 9, 0)
  assert sampler.compiled() == 2
  out = sampler(variables, [[1]] * 8, 0)
  assert sampler.compiled() == 3
  assert out.tokens.shape == (8, 1)


def test_no_prompts_have_no_answers():
  model, variables = tiny()
  sampler = make_sampler(model, max_tokens=3, stop_ids=STOPS)
  out = sampler(variables, [], 0)
  assert out.tokens.shape == out.logps.shape == (0, 3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_stream_draws_what_the_sampler_draws(settings):
  model, variables = tiny()
  sampler = make_sampler(model, max_tokens=9, stop_ids=(), **settings)
  stream = make_stream(model, **settings)
  for prompt in PROMPTS[2:4]:
    expected = sampler(variables, [prompt], 5).tokens[0].tolist()
    assert list(stream(variables, prompt, 5, 9)) == expected


def on_eight_devices():
  assert jax.device_count() == 8
  jax.config.update(QUICK, True)
  found = {}
  for sizes in MESHES:  # 5 prompts in two batches, and both have filler
    mesh = sharding.make_mesh(*sizes)
    found[str(sizes)] = answers(mesh, SETTINGS[1:], batch_size=3)
  model, variables = tiny(mesh)
  stream = make_stream(model, mesh=mesh)
  found["stream"] = list(stream(variables, PROMPTS[0], 3, 6))
  print(json.dumps(found))


@pytest.fixture(scope="module")
def eight_devices():
  printed = run_on_eight(__file__)
  return json.loads(printed)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_eight_devices_give_the_answers_of_one(eight_devices, alone, sizes):
  same(eight_devices[str(sizes)], alone[1:])


def test_eight_devices_stream_the_tokens_of_one(eight_devices, alone):
  tokens, _, lengths = alone[1]
  most = min(6, lengths[0])
  assert eight_devices["stream"][:most] == tokens[0][:most]


if __name__ == "__main__":
  on_eight_devices()
