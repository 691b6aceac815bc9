"""Sampling: what is drawn, how often, and the log-probs that come with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import SHARED, needs_shared

from dpo_jax.answers import as_examples
from dpo_jax.data.plan import Plan
from dpo_jax.decode import bucket
from dpo_jax.models import hf, llama
from dpo_jax.sample import make_sampler
from dpo_jax.score import Score

STORIES = SHARED / "data" / "stories260k"
STOP = 0


pytestmark = pytest.mark.usefixtures("compile_quickly")


class Markov:
  """A model whose next token depends on the last one alone.

  `variables` is a table f[V V] of logits; row t holds those after token t.
  """

  def apply(self, table, tokens, positions, key_start, key_end, cache, at):
    return jax.nn.one_hot(tokens, table.shape[0]), cache

  def unembed(self, table):
    return table.T

  def empty_cache(self, rows, length):
    return jnp.zeros(())


def drawn(probs, n=4000, seed=0, max_tokens=1, **settings):
  """Tokens i32[n max_tokens] where each is drawn from `probs`, whatever came
  before; nothing stops."""
  logits = np.log(np.asarray(probs, np.float32))
  sampler = make_sampler(
    Markov(), max_tokens=max_tokens, stop_ids=(len(probs) + 1,), **settings
  )
  return sampler(np.tile(logits, (len(probs), 1)), [[1]] * n, seed)


def agree(tokens, probs):
  """Frequencies within five standard deviations; never where it is 0."""
  probs = np.asarray(probs, np.float64)
  seen = np.bincount(tokens.reshape(-1), minlength=len(probs))
  assert len(seen) == len(probs)
  assert not seen[probs == 0].any()
  sigma = np.sqrt(tokens.size * probs * (1 - probs))
  assert (np.abs(seen - tokens.size * probs) <= 5 * sigma + 1e-9).all(), seen


PROBS = np.array([0.06, 0.4, 0.25, 0.09, 0.2])


def normal(weights):
  return np.asarray(weights) / np.sum(weights)


@pytest.mark.parametrize(
  "settings, wanted",
  [
    ({}, PROBS),
    ({"temperature": 0.5}, normal(PROBS**2)),
    ({"top_k": 2}, normal(PROBS * [0, 1, 1, 0, 0])),
    ({"top_k": 50}, PROBS),  # more than there are: all
    ({"top_p": 0.39}, [0, 1, 0, 0, 0]),  # the fewest that reach it: one
    ({"top_p": 0.41}, normal(PROBS * [0, 1, 1, 0, 0])),
    ({"top_p": 0.66}, normal(PROBS * [0, 1, 1, 0, 1])),
    ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.5}, normal(PROBS * [0, 1, 1, 0, 0])),
    # The flatter distribution of temperature 2 is the one that is cut.
    (
      {"temperature": 2.0, "top_p": 0.6},
      normal(PROBS**0.5 * [0, 1, 1, 0, 1]),
    ),
  ],
  ids=str,
)
def test_frequencies_are_those_of_the_settings(settings, wanted):
  agree(drawn(PROBS, **settings).tokens, wanted)


def test_log_probs_are_the_models_own_whatever_cuts_the_draw():
  out = drawn(PROBS, n=200, temperature=0.7, top_k=3)
  np.testing.assert_allclose(out.logps, np.log(PROBS)[out.tokens], atol=1e-5)


def test_tokens_of_one_answer_are_drawn_independently():
  tokens = drawn(np.full(4, 0.25), max_tokens=3).tokens
  for i, j in ((0, 1), (1, 2), (0, 2)):
    pairs = tokens[:, i] * 4 + tokens[:, j]
    agree(pairs, np.full(16, 1 / 16))


def test_the_same_seed_gives_the_same_answers_and_another_gives_others():
  table = np.tile(np.log(PROBS).astype(np.float32), (5, 1))
  sampler = make_sampler(Markov(), max_tokens=4, stop_ids=(9,))
  first, again, other = (sampler(table, [[1]] * 64, s) for s in (3, 3, 4))
  for x, y in zip(first, again, strict=True):
    np.testing.assert_array_equal(x, y)
  assert (first.tokens != other.tokens).any(axis=1).mean() > 0.5


def test_temperature_zero_takes_the_likeliest():
  out = drawn(PROBS, n=3, temperature=0, top_k=3, top_p=0.9)
  assert out.tokens.tolist() == [[1]] * 3


def chain(table, prompts, **settings):
  """Greedy answers of a chain t -> table[t]."""
  table = np.asarray(table)
  logits = 9.0 * np.eye(len(table), dtype=np.float32)[table]
  settings = {"max_tokens": 6, "stop_ids": (STOP,), "temperature": 0} | settings
  return make_sampler(Markov(), **settings)(logits, prompts, 0)


def test_the_stop_token_ends_an_answer_and_padding_follows():
  # 4 -> 3 -> 2 -> 1 -> 0 (stop) -> 4 ...
  out = chain([4, 0, 1, 2, 3], [[4, 3], [1], [2, 4]], pad_id=7)
  assert out.tokens.tolist() == [
    [2, 1, 0, 7, 7, 7],
    [0, 7, 7, 7, 7, 7],
    [3, 2, 1, 0, 7, 7],
  ]
  assert out.lengths.tolist() == [3, 1, 4]
  ended = np.arange(6) >= out.lengths[:, None]
  assert (out.logps[ended] == 0).all()
  assert (out.logps[~ended] < 0).all()


def test_lengths_are_rounded_to_few_and_not_by_much():
  rounded = [bucket(n) for n in range(1, 4097)]
  assert all(r >= n for n, r in enumerate(rounded, 1))
  assert all(4 * r < 5 * n for n, r in enumerate(rounded, 1) if n > 128)
  assert len(set(rounded)) == 4 * 6 and max(rounded) == 4096


def test_any_stop_token_ends_and_max_tokens_does_without():
  out = chain([4, 0, 1, 2, 3], [[4]], stop_ids=(0, 2), pad_id=7)
  assert out.tokens.tolist() == [[3, 2, 7, 7, 7, 7]]
  out = chain([4, 0, 1, 2, 3], [[4]], max_tokens=2)
  assert out.tokens.tolist() == [[3, 2]]
  assert out.lengths.tolist() == [2]


def test_padding_with_the_stop_token_counts_it_once():
  out = chain([4, 0, 1, 2, 3], [[2]], pad_id=STOP)
  assert out.tokens.tolist() == [[1, 0, 0, 0, 0, 0]]
  assert out.lengths.tolist() == [2]


@pytest.fixture(scope="module")
def stories():
  module, config = hf.read_config(STORIES / "hf")
  model = llama.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  variables = hf.load_variables(STORIES / "hf", module.HF_NAMES, abstract)
  return model, variables


@needs_shared
def test_greedy_decoding_tells_the_published_story(stories):
  wanted = json.loads((STORIES / "golden.json").read_text())["greedy_ids"]
  model, variables = stories
  sampler = make_sampler(model, max_tokens=200, stop_ids=(2,), temperature=0)
  out = sampler(variables, [wanted[:1]], 0)
  assert out.tokens[0].tolist() == wanted[1:]
  assert out.lengths.tolist() == [200]


def prompts_of(*lengths):
  rng = np.random.default_rng(0)
  return [[1, *rng.integers(3, 512, n - 1).tolist()] for n in lengths]


@needs_shared
def test_prompts_of_other_lengths_beside_it_change_no_answer(stories):
  model, variables = stories
  sampler = make_sampler(model, max_tokens=16, stop_ids=(2,), temperature=0)
  prompts = prompts_of(1, 32, 33)
  together = sampler(variables, prompts, 0)
  for i, prompt in enumerate(prompts):
    alone = sampler(variables, [prompt], 0)
    np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
    np.testing.assert_allclose(together.logps[i], alone.logps[0], atol=1e-4)


@needs_shared
def test_log_probs_while_sampling_are_those_of_scoring(stories):
  model, variables = stories
  prompts = prompts_of(1, 9, 40)
  sampler = make_sampler(
    model, max_tokens=24, stop_ids=(2, 426), temperature=1.3, top_k=40
  )
  out = sampler(variables, prompts, 11)
  responses = [row[:n] for row, n in zip(out.tokens, out.lengths, strict=True)]
  plan = Plan(as_examples(prompts, responses), batch_size=3, shuffle=False)
  batch, ids = plan[0]
  scored = np.asarray(jax.jit(Score(model))(variables, batch).logps)
  there = ids >= 0
  np.testing.assert_allclose(
    scored[there][np.argsort(ids[there]), 0], out.logps.sum(axis=1), atol=1e-4
  )
