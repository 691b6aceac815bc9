"""A file with every kind of damage: each line named, counted, left out."""

import json
import time

import numpy as np
import pytest
from runs import compile_once, small_config  # noqa: F401

from dpo_jax.check_data import check
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import ByteTokenizer
from dpo_jax.errors import DataError
from dpo_jax.run import Run
from dpo_jax.train import train

pytestmark = pytest.mark.usefixtures("compile_quickly")
MEGABYTE = 1_000_000


def pair(**changes):
  return {"prompt": "Q:", "chosen": " yes", "rejected": " no"} | changes


def line(**changes):
  return json.dumps(pair(**changes)).encode()


# What a line is, and what it counts as; None where it can be used.
LINES = {
  "a list for an answer, in the first line": (line(chosen=[]), "bad_value"),
  "byte order mark within": (b"\xef\xbb\xbf" + line(), "bad_line"),
  "missing key": (b'{"prompt": "Q:", "chosen": " a"}', "wrong_shape"),
  "no key": (b"{}", "wrong_shape"),
  "a number for an answer": (line(rejected=3), "bad_value"),
  "true": (line(chosen=True), "bad_value"),
  "null": (line(prompt=None), "bad_value"),
  "an object": (line(rejected={"role": "assistant"}), "bad_value"),
  "a list": (b'["prompt", "chosen"]', "bad_line"),
  "not a number": (b'{"prompt": NaN, "chosen": "a"}', "bad_line"),
  "empty answer": (line(chosen=""), "empty_response"),
  "blank answer": (line(rejected=" \t\n\u00a0"), "empty_response"),
  "the end token alone": (line(chosen="<|eos|>"), "empty_response"),
  "equal answers": (line(rejected=" yes"), "identical_responses"),
  "invalid UTF-8": (line().replace(b" yes", b" \xff\xfe"), "bad_line"),
  "half a surrogate pair": (line(chosen="\ud800"), "bad_text"),
  "other half, in the prompt": (line(prompt="\udfff"), "bad_text"),
  "equal after the cut": (
    line(chosen="x" * 999 + "1", rejected="x" * 999 + "2"),
    "identical_after_cut",
  ),
  "nested too deeply": (b"[" * 50_000, "bad_line"),
  "good": (line(), None),
  "the same again": (line(), None),
  "NUL": (line(chosen=" a\0b"), None),
  "a megabyte of answer": (line(chosen=" " + "y" * MEGABYTE), None),
  "a megabyte of prompt": (line(prompt="z" * MEGABYTE), None),
  "blank line": (b"  ", "skip"),
  "carriage return in a string": (line(chosen=" a\rb"), None),
  "the last line is cut": (line()[:-9], "bad_line"),
}
COUNTED = {
  name: reason for name, (_, reason) in LINES.items() if reason != "skip"
}
GOOD = [name for name, reason in COUNTED.items() if reason is None]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "pairs.jsonl"
  lines = [data for data, _ in LINES.values()]
  path.write_bytes(
    b"\xef\xbb\xbf" + b"\n".join(lines)
  )  # a mark in front is fine
  return path


def expected_counts():
  counts = {}
  for reason in filter(None, COUNTED.values()):
    counts[reason] = counts.get(reason, 0) + 1
  return counts


def place(source, name):
  return f"{source}:{list(LINES).index(name) + 1}"


def test_check_counts_by_reason_and_names_the_first_line_of_each(source):
  begun = time.monotonic()
  text = check(small_config({"pairs": source}, **{"data.max_length": 64}))
  assert time.monotonic() - begun < 10
  assert f"{len(COUNTED)} read, {len(GOOD)} examples" in text
  first = {}
  for name, reason in COUNTED.items():
    first.setdefault(reason, name)
  for reason, count in expected_counts().items():
    wanted = f"{count}  {reason}, first {place(source, first[reason])}"
    assert wanted in text, reason
  assert "1 examples are those of earlier rows" in text
  assert "1  prompt_cut" in text and "1  response_cut" in text


@pytest.mark.parametrize(
  "name", [name for name, reason in COUNTED.items() if reason]
)
def test_where_bad_rows_are_errors_each_is_named_in_one_line(tmp_path, name):
  data, reason = LINES[name]
  if "first line" in name:  # elsewhere it is of another shape than the rest
    reason = "wrong_shape"
  path = tmp_path / "pairs.jsonl"
  path.write_bytes(line() + b"\n" + data)
  settings = EncodeSettings(max_length=64, on_bad_row="error")
  with pytest.raises(DataError) as caught:
    load_examples(str(path), "train", ByteTokenizer(), settings)
  message = str(caught.value)
  assert message.startswith(f"{path}:2: ") and f"({reason})" in message
  assert "\n" not in message and len(message) < 1000


def test_training_sees_whole_pairs_only_and_its_summary_has_the_counts(
  source, tmp_path
):
  config = small_config(
    {"pairs": source},
    **{"data.max_length": 64, "data.eval_rows": 0, "train.steps": 3,
       "sample.prompts": 0, "train.export": False},
  )  # fmt: skip
  run = Run(config)
  examples = run.data.train
  assert (examples.lengths > 0).all() and len(examples) == len(GOOD)
  assert (examples.prompt_lengths + examples.lengths.max(axis=1) <= 64).all()
  for batch, _ in (run.train_plan[s] for s in range(3)):
    there = batch.weights > 0
    assert (batch.lengths[there] > 0).all()
  summary = train(config, tmp_path / "run")
  assert summary["dataset"]["dropped"] == expected_counts()
  assert summary["dataset"]["rows"] == len(COUNTED)
  assert summary["skipped_steps"] == 0


@pytest.mark.parametrize("kind", ["unpaired", "ranked", "sft"])
def test_other_kinds_of_data_are_as_picky(tmp_path, kind):
  good = {
    "unpaired": {"prompt": "Q", "completion": " a", "label": True},
    "ranked": {"prompt": "Q", "responses": [" a", " b", " c"]},
    "sft": {"prompt": "Q", "completion": " a"},
  }[kind]
  bad = [
    good | {key: odd}
    for key in good
    for odd in (None, 3, [], {}, [None], "", "\ud800", 1e9, [[]], [{}])
    if (key, odd) not in [("prompt", "")]
  ]
  bad += [{k: v for k, v in good.items() if k != key} for key in good]
  path = tmp_path / "rows.jsonl"
  rows = [good, *bad, good]
  path.write_text("\n".join(map(json.dumps, rows)))
  examples = load_examples(
    str(path),
    "train",
    ByteTokenizer(),
    EncodeSettings(max_length=64, kind=kind),
  )
  kept = set(examples.rows.tolist())
  assert {0, len(rows) - 1} <= kept
  # Of an answer to SFT a label is no part.
  assert len(examples) == 2, [rows[i] for i in sorted(kept)]
  assert sum(examples.report["dropped"].values()) == len(bad)
  assert (examples.lengths[:, 0] > 0).all()
  np.testing.assert_array_equal(examples.rows, [0, len(rows) - 1])
