"""Examples survive their cache, slicing and selecting unchanged."""

import json
import logging

import numpy as np
import pytest

from dpo_jax.data import store
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.store import (
  Examples,
  check_rankings,
  check_vocabulary,
  load_examples,
)
from dpo_jax.data.tokenizer import ByteTokenizer
from dpo_jax.errors import DataError

BYTES = ByteTokenizer()
SETTINGS = EncodeSettings(max_length=64)
ROWS = [
  {
    "prompt": f"p{i}",
    "chosen": " c" * (i + 1),
    "rejected": " r",
    "subset": "ab"[i % 2],
  }
  for i in range(7)
]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps(row) for row in [*ROWS, {"x": 1}]]
  path.write_text("\n".join(lines))
  return str(path)


@pytest.fixture
def examples(source):
  return load_examples(source, "train", BYTES, SETTINGS)


def triples(examples):
  return [
    (
      examples.prompt(i).tolist(),
      examples.chosen(i).tolist(),
      examples.rejected(i).tolist(),
      int(examples.rows[i]),
      examples.subset_names[examples.subsets[i]],
    )
    for i in range(len(examples))
  ]


def same(a, b):
  return (
    triples(a) == triples(b)
    and (a.fingerprint, a.kind, a.format) == (b.fingerprint, b.kind, b.format)
    and a.report == b.report
    and all(
      getattr(a, name).dtype == getattr(b, name).dtype for name in store._ARRAYS
    )
  )


def test_the_report_and_the_log_say_what_was_read(source, examples, caplog):
  assert examples.report == {
    "source": source,
    "format": "paired",
    "rows": 8,
    "examples": 7,
    "dropped": {"wrong_shape": 1},
    "changed": {},
    "first_dropped": {"wrong_shape": f"{source}:8"},
  }
  with caplog.at_level(logging.INFO, "dpo_jax"):
    load_examples(source, "train", BYTES, SETTINGS)
  [record] = caplog.records
  assert "format paired, 8 rows, 7 examples" in record.getMessage()
  assert "wrong_shape 1" in record.getMessage()


def test_arrays_have_the_documented_types(examples):
  kinds = {name: str(getattr(examples, name).dtype) for name in store._ARRAYS}
  assert kinds == {
    "tokens": "int32",
    "offsets": "int64",
    "prompt_lengths": "int32",
    "lengths": "int32",
    "desirable": "bool",
    "margins": "float32",
    "rows": "int64",
    "subsets": "int32",
  }
  assert examples.offsets[-1] == len(examples.tokens)


def test_slices_and_selections_hold_the_same_examples(examples):
  whole = triples(examples)
  part = examples.slice(2, 5)
  assert triples(part) == whole[2:5]
  assert np.shares_memory(part.tokens, examples.tokens)
  assert triples(examples.slice(None, -3)) == whole[:-3]
  assert triples(part.slice(1, None)) == whole[3:5]
  assert triples(examples.select([6, 0, -2])) == [whole[6], whole[0], whole[5]]
  assert len(examples.slice(5, 2)) == len(examples.select([])) == 0
  assert part.report["examples"] == 3


def test_fingerprints_differ_by_content_settings_and_part(source, examples):
  longer = EncodeSettings(max_length=65)
  prints = [
    examples.fingerprint,
    load_examples(source, "train[:3]", BYTES, SETTINGS).fingerprint,
    load_examples(source, "train", BYTES, longer).fingerprint,
    examples.slice(0, 3).fingerprint,
    examples.slice(1, 4).fingerprint,
    examples.select([1, 2]).fingerprint,
    examples.select([2, 1]).fingerprint,
  ]
  assert len(set(prints)) == len(prints)
  again = load_examples(source, "train", BYTES, SETTINGS)
  assert again.fingerprint == examples.fingerprint


def test_a_cache_gives_back_what_was_encoded(
  source, examples, tmp_path, monkeypatch
):
  folder = str(tmp_path / "deep" / "cache")
  first = load_examples(source, "train", BYTES, SETTINGS, folder)
  monkeypatch.setattr(store, "encode_rows", None)  # must not be needed
  second = load_examples(source, "train", BYTES, SETTINGS, folder)
  assert same(first, examples) and same(second, examples)
  assert isinstance(second.tokens, np.memmap)
  assert isinstance(second, Examples)


def test_whatever_changes_the_data_changes_the_key(source, tmp_path):
  folder = tmp_path / "cache"

  def entries(*args):
    load_examples(*args, str(folder))
    return len(list(folder.iterdir()))

  assert entries(source, "train", BYTES, SETTINGS) == 1
  assert entries(source, "train", BYTES, SETTINGS) == 1
  assert entries(source, "train[:3]", BYTES, SETTINGS) == 2
  assert entries(source, "train", BYTES, EncodeSettings()) == 3
  with open(source, "a") as file:
    file.write("\n" + json.dumps(ROWS[0]))
  assert entries(source, "train", BYTES, SETTINGS) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "report", "empty"])
def test_a_damaged_cache_is_rebuilt(source, examples, tmp_path, caplog, damage):
  folder = tmp_path / "cache"
  load_examples(source, "train", BYTES, SETTINGS, str(folder))
  [entry] = folder.iterdir()
  file = entry / "tokens.npy"
  data = bytearray(file.read_bytes())
  if damage == "flip":
    data[-1] ^= 1
    file.write_bytes(data)
  elif damage == "cut":
    file.write_bytes(data[:-4])
  elif damage == "remove":
    file.unlink()
  elif damage == "report":
    (entry / "report.json").write_text("{")
  else:
    for path in entry.iterdir():
      path.unlink()
  again = load_examples(source, "train", BYTES, SETTINGS, str(folder))
  assert same(again, examples)
  assert "damaged cache" in caplog.text
  assert list(folder.iterdir()) == [entry]
  caplog.clear()
  load_examples(source, "train", BYTES, SETTINGS, str(folder))
  assert not caplog.records


def test_a_write_that_dies_leaves_no_cache(source, tmp_path, monkeypatch):
  folder = tmp_path / "cache"

  def die(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr("dpo_jax.data.cache.os.rename", die)
  with pytest.raises(KeyboardInterrupt):
    load_examples(source, "train", BYTES, SETTINGS, str(folder))
  assert list(folder.iterdir()) == []


def test_a_cache_that_another_process_wrote_first_stands(
  source, examples, tmp_path, monkeypatch
):
  folder = str(tmp_path / "cache")
  load_examples(source, "train", BYTES, SETTINGS, folder)
  real, calls = store.cache.read, []

  def miss_once(*args):
    calls.append(args)
    return None if len(calls) == 1 else real(*args)

  monkeypatch.setattr(store.cache, "read", miss_once)
  assert same(load_examples(source, "train", BYTES, SETTINGS, folder), examples)
  assert len(calls) == 1
  assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(
  source, examples, tmp_path, caplog
):
  (tmp_path / "file").write_text("")
  folder = str(tmp_path / "file" / "cache")
  assert same(load_examples(source, "train", BYTES, SETTINGS, folder), examples)
  assert "cache not written" in caplog.text


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}))
  with pytest.raises(DataError) as caught:
    load_examples(str(path), "train", BYTES, SETTINGS)
  assert "no example left of 1 rows (identical_responses 1)" in str(
    caught.value
  )
  assert f"{path}:1" in str(caught.value)


def test_progress_is_told_the_rows_done(source):
  seen = []
  load_examples(source, "train", BYTES, SETTINGS, progress=seen.append)
  assert seen == [8]


def test_token_ids_above_the_vocabulary_name_the_row(examples):
  check_vocabulary(examples, 259)
  largest = int(examples.tokens.max())
  check_vocabulary(examples, largest + 1)
  with pytest.raises(DataError, match=rf"row \d has token id {largest}"):
    check_vocabulary(examples, largest)


RANKINGS = [
  {"prompt": f"p{i}", "responses": list("abcde"[: 3 + i % 3])} for i in range(7)
]
RANKED = EncodeSettings(max_length=64, kind="ranked")


@pytest.fixture
def ranked_source(tmp_path):
  path = tmp_path / "ranked.jsonl"
  path.write_text("\n".join(map(json.dumps, RANKINGS)))
  return str(path)


def rankings(examples):
  return [
    [examples.prompt(i).tolist()]
    + [examples.response(i, k).tolist() for k in range(n)]
    for i, n in enumerate((examples.lengths > 0).sum(axis=1))
  ]


def test_rankings_survive_their_cache_slicing_and_selecting(
  ranked_source, tmp_path, monkeypatch
):
  load = lambda: load_examples(
    ranked_source, "train", BYTES, RANKED, str(tmp_path / "cache")
  )
  first = load()
  whole = rankings(first)
  assert [len(x) - 1 for x in whole] == [3, 4, 5, 3, 4, 5, 3]
  assert whole[1][0] == [1, 3 + ord("p"), 3 + ord("1")]
  assert whole[1][1:] == [[3 + ord(letter), 2] for letter in "abcd"]
  assert first.lengths.shape == (7, 5)
  monkeypatch.setattr(store, "encode_rows", None)  # must not be needed
  second = load()
  assert rankings(second) == whole and same(first, second)
  assert isinstance(second.lengths, np.memmap)
  # A part keeps the width, so that what is held out has the batches' shape.
  part = second.slice(3, 5)
  assert rankings(part) == whole[3:5] and part.lengths.shape == (2, 5)
  assert rankings(second.select([6, 2])) == [whole[6], whole[2]]


def test_the_kind_and_the_width_of_rankings_are_part_of_the_fingerprint(
  ranked_source,
):
  prints = [
    load_examples(ranked_source, split, BYTES, settings).fingerprint
    for split in ("train", "train[:1]", "train[:2]")
    for settings in (RANKED, SETTINGS)
  ]
  assert len(set(prints)) == len(prints)


def test_a_ranking_too_short_for_a_loss_is_named(ranked_source, examples):
  ranked = load_examples(ranked_source, "train", BYTES, RANKED)
  check_rankings(ranked, 3)
  check_rankings(examples, 2)
  with pytest.raises(DataError) as caught:
    check_rankings(ranked.slice(1, None), 4)
  assert str(caught.value) == (
    f"{ranked_source}: row 3 has 3 responses to rank, 2 rows of 6 have too few;"
    " the loss needs 4 in every row"
  )
