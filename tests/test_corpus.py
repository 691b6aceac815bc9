"""The generated corpus: its files, and rankings that follow the true reward."""

import hashlib
import itertools
import json
import math

import pytest

from dpo_jax.data.corpus import true_reward, write_corpus


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=500)


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
  ("name", "digest"),
  [("sft", "370e1dda84624a35"), ("pairs", "0f4f8686d38c68f0")],
)
def test_completions_and_pairs_stay_as_they_were(paths, name, digest):
  found = hashlib.sha256(paths[name].read_bytes()).hexdigest()
  assert found.startswith(digest)


def test_a_seed_gives_the_same_rankings_and_another_gives_others(
  paths, tmp_path
):
  for seed, same in ((0, True), (1, False)):
    again = write_corpus(tmp_path, pairs=500, seed=seed)["rankings"]
    assert (again.read_bytes() == paths["rankings"].read_bytes()) is same


def test_a_ranking_has_three_different_answers(paths):
  found = rows(paths["rankings"])
  assert len(found) == 500
  assert all(len(set(row["responses"])) == 3 for row in found)


def test_rankings_are_as_likely_as_plackett_luce_says(tmp_path):
  """How often a best answer, by true reward, comes first and comes last."""
  first = last = expected_first = expected_last = 0.0
  for row in rows(write_corpus(tmp_path, pairs=4000)["rankings"]):
    odds = [
      math.exp(true_reward(row["prompt"], answer))
      for answer in row["responses"]
    ]
    first += odds[0] == max(odds)
    last += odds[2] == max(odds)
    for a, b, c in itertools.permutations(odds):
      likely = a / (a + b + c) * b / (b + c)
      expected_first += likely * (a == max(odds))
      expected_last += likely * (c == max(odds))
  for got, wanted in ((first, expected_first), (last, expected_last)):
    assert abs(got - wanted) < 4 * math.sqrt(wanted)
  assert first > 2 * last
