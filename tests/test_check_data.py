"""The look at encoded data, for rankings."""

import dataclasses
import json

import numpy as np
import pytest

from dpo_jax.check_data import check
from dpo_jax.config import from_dict
from dpo_jax.config_file import defaults
from dpo_jax.errors import DataError

ROWS = [
  {"prompt": f"p{i}", "responses": ["aa", "bbb", "c", "dd", "e"][: 2 + i % 4]}
  for i in range(12)
]


def config_of(path, loss, rows=ROWS):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = defaults(loss=loss)
  config.data.source = str(path)
  config.data.cache_dir = ""
  config.model.tokenizer = "bytes"
  config.train.batch_size = 4
  return from_dict(config.to_dict())


def test_rankings_are_counted_measured_and_drawn(tmp_path):
  lines = check(config_of(tmp_path / "a.jsonl", "plackett_luce")).splitlines()
  assert "format      ranked, used as ranked" in lines
  assert "rankings    3 of 2, 3 of 3, 3 of 4, 3 of 5 responses" in lines
  lengths = {
    line[2:12].strip(): [int(x) for x in line[12:].split()]
    for line in lines
    if line.startswith("  rank ")
  }
  assert {name: (x[0], x[-1]) for name, x in lengths.items()} == {
    "rank 1": (3, 3),
    "rank 2": (4, 4),
    "rank 3": (2, 2),
    "rank 4": (3, 3),
    "rank 5": (2, 2),
  }
  branches = {line[33:50].strip() for line in lines if ": " in line[33:50]}
  assert any(branch.endswith(": 3") for branch in branches), branches
  assert any(branch.endswith(": second") for branch in branches)


def test_margins_are_said(tmp_path):
  row = {"prompt": "p", "chosen": "a", "rejected": "b"}
  rows = [row | ({"margin": i} if i % 2 else {}) for i in range(8)]
  lines = check(config_of(tmp_path / "a.jsonl", "reward", rows)).splitlines()
  assert "margins     4 pairs have one, from 1 to 7" in lines


def test_the_packing_ratio_counts_the_sequences_there_are(tmp_path):
  """One batch of one ranking: 3 sequences of 6 tokens against one row."""
  rows = [{"prompt": "ab", "responses": ["x", "yy", "z"]}]
  config = config_of(tmp_path / "a.jsonl", "plackett_luce", rows)
  data = dataclasses.replace(config.data, row_length=16)
  config = dataclasses.replace(
    config,
    data=data,
    train=dataclasses.replace(config.train, batch_size=1),
  )
  padded = 3 * (3 + 3)  # prompt with its beginning, response with its end
  assert f"{np.float64(16 / padded):.2f} of the tokens" in check(config)


@pytest.mark.parametrize("loss", ["tpo", "tpo_l"])
def test_a_loss_of_three_responses_names_a_row_of_two(tmp_path, loss):
  path = tmp_path / "a.jsonl"
  with pytest.raises(DataError, match=r"a\.jsonl: row 0 has 2 responses"):
    check(config_of(path, loss))
  rows = [row for row in ROWS if len(row["responses"]) > 2]
  assert "rankings" in check(config_of(path, loss, rows))


def test_rankings_serve_a_loss_of_pairs(tmp_path):
  text = check(config_of(tmp_path / "a.jsonl", "dpo"))
  assert "format      ranked, used as paired" in text
