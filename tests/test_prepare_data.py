"""A prepared directory gives back the rows, in order, without TensorFlow."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from shared import SHARED, needs_shared

from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.sources import read_rows, source_digest
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import ByteTokenizer
from dpo_jax.errors import DataError

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "prepare_data.py"
PAIRS = [
  {"prompt": f"p{i} é\0", "chosen": "", "rejected": "r", "subset": "s"}
  for i in range(30)
]
CLEAR = [row | {"margin": i / 4} for i, row in enumerate(PAIRS)]
CHATS = [
  {
    "prompt": [{"role": "user", "content": f"{i}"}] * (1 + i % 3),
    "completion": [{"role": "assistant", "content": "é", "name": "x"}],
    "label": i % 2 == 0,
  }
  for i in range(30)
]
RANKINGS = [
  {"prompt": f"p{i}", "responses": ["é", "", "x"], "scores": [2.5, 1, 1]}
  for i in range(30)
]


@pytest.fixture(scope="module")
def run():
  spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return lambda *args: module.main([str(arg) for arg in args])


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def rows_of(source, split="train"):
  return [row for _, row in read_rows(str(source), split)]


@pytest.mark.parametrize(
  "rows",
  [PAIRS, CLEAR, CHATS, RANKINGS],
  ids=["pairs", "margins", "chats", "rankings"],
)
def test_rows_come_back_in_order(run, tmp_path, capsys, rows):
  source = write(tmp_path / "a.jsonl", rows)
  assert run("--input", source, "--output", tmp_path / "out") == 0
  assert (
    capsys.readouterr().out == f"{tmp_path}/out: 30 rows in train, 0 dropped\n"
  )
  assert rows_of(tmp_path / "out") == rows
  places = [where for where, _ in read_rows(str(tmp_path / "out"))]
  assert places[:2] == [f"{tmp_path}/out[0]", f"{tmp_path}/out[1]"]
  assert "tensorflow" not in sys.modules


def test_splits_are_kept_apart_and_can_be_sliced(run, tmp_path):
  a = write(tmp_path / "a.jsonl", PAIRS)
  b = write(tmp_path / "b.jsonl", PAIRS[:4])
  out = tmp_path / "out"
  args = ("--input", a, "--split", "train", "--input", b, "--split", "test")
  assert run(*args, "--output", out) == 0
  assert rows_of(out, "test") == PAIRS[:4]
  assert rows_of(out, "train[:10%]") == PAIRS[:3]
  with pytest.raises(
    DataError, match="unknown split 'dev'; known are test, tr"
  ):
    rows_of(out, "dev")
  with pytest.raises(DataError, match="TFDS cannot read it"):
    rows_of(out, "train[oh]")


def test_a_dataset_is_found_by_its_name(tmp_path, monkeypatch):
  class NamedChats(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      text = tfds.features.Text()
      message = {"role": text, "content": text}
      features = {
        "messages": tfds.features.Sequence(message),
        "label": np.bool_,
        "ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),
      }
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
      )

    def _split_generators(self, _):
      return {"train": enumerate(rows), "dev": enumerate(rows[:1])}

    def _generate_examples(self):
      raise NotImplementedError

  rows = [
    {"messages": row["prompt"], "label": row["label"], "ids": [i, 7]}
    for i, row in enumerate(CHATS)
  ]
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  assert rows_of("named_chats") == rows
  assert rows_of("named_chats:1.0.0", "dev") == rows[:1]
  places = [where for where, _ in read_rows("named_chats", "train[1:2]")]
  assert places == ["named_chats:train[1:2][0]"]
  assert source_digest("named_chats") == source_digest("named_chats")
  with pytest.raises(DataError, match="known are dev, train"):
    rows_of("named_chats", "test")


def test_encoding_is_the_same_from_the_file_and_the_directory(run, tmp_path):
  rows = [row | {"chosen": "c"} for row in PAIRS]
  source = write(tmp_path / "a.jsonl", rows)
  out = str(tmp_path / "out")
  assert run("--input", source, "--output", out) == 0
  cache = str(tmp_path / "cache")
  chosen = EncodeSettings(max_length=64)
  from_file = load_examples(source, "train", ByteTokenizer(), chosen)
  for _ in range(2):
    read = load_examples(out, "train", ByteTokenizer(), chosen, cache)
    assert read.fingerprint == from_file.fingerprint
  before = source_digest(out)
  shard = next(pathlib.Path(out).glob("*array_record*"))
  shard.touch()
  assert source_digest(out) != before


def test_wrong_input_gives_one_line_and_leaves_nothing(run, tmp_path, capsys):
  bad = write(tmp_path / "bad.jsonl", [PAIRS[0], PAIRS[1] | {"prompt": 3}])
  out = tmp_path / "out"
  for source, expected in (
    (bad, f"{bad}:2: 'prompt' must be a string, found a number\n"),
    (write(tmp_path / "x.jsonl", [{"x": 1}]), "no known shape"),
    (tmp_path / "no.jsonl", "no such file\n"),
    (
      write(tmp_path / "s.jsonl", [PAIRS[0] | {"prompt": "\ud800"}]),
      "surrogate",
    ),
  ):
    before = sorted(tmp_path.iterdir())
    assert run("--input", source, "--output", out) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
  assert run("--input", bad, "--output", out, "--on_bad_row", "drop") == 0
  assert "1 rows in train, 1 dropped" in capsys.readouterr().out
  assert run("--input", bad, "--output", out) == 2
  assert "exists already" in capsys.readouterr().err


def test_each_input_needs_a_split_of_its_own(run, tmp_path, capsys):
  args = (
    "--input",
    "a.jsonl",
    "--input",
    "b.jsonl",
    "--output",
    tmp_path / "o",
  )
  assert run(*args) == 2
  assert run(*args, "--split", "x", "--split", "x") == 2
  assert "one --split of its own" in capsys.readouterr().err


@needs_shared
@pytest.mark.parametrize(
  ("raw", "normalised"),
  [
    ("hh_harmless/raw_test.jsonl.gz", "hh_harmless/pairs.jsonl.gz"),
    ("tone_pairs/raw.json", "tone_pairs/pairs.jsonl.gz"),
    ("chat_demo/raw_dpo_en_demo.json.gz", "chat_demo/pairs_messages.jsonl.gz"),
  ],
)
def test_raw_files_are_stored_normalised(run, tmp_path, raw, normalised):
  data = SHARED / "data"
  assert run("--input", data / raw, "--output", tmp_path / "out") == 0
  pairs = zip(
    rows_of(tmp_path / "out"), rows_of(data / normalised), strict=True
  )
  # Counted, because a failing comparison would print the rows.
  assert sum(ours != theirs for ours, theirs in pairs) == 0
