"""The corpus of tastes: what it draws, and the best that can be had of it."""

import json
import math

import numpy as np
import pytest

from dpo_jax import tabular
from dpo_jax.data import tastes


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tastes")
  tastes.write_tastes(folder, sft=50, pairs=4000, seed=3)
  return folder


def test_what_is_written_is_of_three_words_and_of_one_length(pairs):
  rows = rows_of(pairs / "pairs.jsonl")
  told = [row["completion"] for row in rows_of(pairs / "sft.jsonl")]
  answers = [row[k] for row in rows for k in ("chosen", "rejected")] + told
  assert {len(a) for a in answers} == {13}
  assert {w for a in answers for w in a.strip(" .").split()} == set(
    tastes.WORDS
  )
  assert len({row["prompt"] for row in rows}) == 24 * 8


def test_fewer_pairs_are_the_first_of_more(pairs, tmp_path):
  tastes.write_tastes(tmp_path, pairs=100, seed=3)
  few = (tmp_path / "pairs.jsonl").read_text()
  assert (pairs / "pairs.jsonl").read_text().startswith(few)
  tastes.write_tastes(tmp_path, pairs=100, seed=4)
  assert (tmp_path / "pairs.jsonl").read_text() != few


def test_preferences_are_those_of_bradley_terry(pairs):
  rows = rows_of(pairs / "pairs.jsonl")
  gaps = np.array(
    [
      tastes.true_reward(r["prompt"], r["chosen"])
      - tastes.true_reward(r["prompt"], r["rejected"])
      for r in rows
    ]
  )
  expected = 1 / (1 + np.exp(-np.abs(gaps)))
  seen = np.mean(gaps > 0)
  error = math.sqrt(0.25 / len(gaps))
  assert abs(seen - expected.mean()) < 3 * error + np.mean(gaps == 0)
  assert tastes.bayes_accuracy(rows) == pytest.approx(
    np.mean(gaps > 0) + np.mean(gaps == 0) / 2
  )


def test_wrong_words_cost():
  for said, wrong in ((" big old.", 1), (" big old raw big.", 1), ("", 3)):
    words = list(said.strip(" .").split())[:3]
    worth = sum(tastes.WORTH[2, tastes.WORDS.index(w)] for w in words)
    assert tastes.true_reward("Al's cup:", said) == pytest.approx(
      worth - 2 * wrong
    )


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_frontier_is_that_of_the_tilted_reference(beta):
  uniform = np.full(tastes.WORTH.shape, -math.log(16))
  best = tabular.optimal_policy(uniform, tastes.WORTH, beta)
  kl = 3 * tabular.kl(best, uniform).mean()
  p = np.exp(best)
  reward = 3 * (p * tastes.WORTH).sum(1).mean()
  assert tastes.frontier([beta])[0] == pytest.approx(
    [float(kl), float(reward)], abs=1e-3
  )
  assert reward < tastes.best_possible()
