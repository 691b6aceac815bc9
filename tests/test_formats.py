"""Every accepted shape is recognised, and every other row is explained."""

import pytest
from shared import SHARED, needs_shared

from dpo_jax.data.formats import FORMATS, detect_format, split_hh, to_example
from dpo_jax.data.sources import read_rows
from dpo_jax.errors import DataError

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "yes"}
BAD = {"role": "assistant", "content": "no"}
STRINGS = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = {
  "chosen": "\n\nHuman: a\n\nAssistant: same b",
  "rejected": "\n\nHuman: a\n\nAssistant: same c",
}
ANSWERS = {"chosen": [GOOD], "rejected": [BAD]}
SHAREGPT = {
  "conversations": [{"from": "human", "value": "hi"}],
  "chosen": {"from": "gpt", "value": "yes"},
  "rejected": {"from": "gpt", "value": "no"},
}
RANKED = {"prompt": "p", "responses": ["a", "b"]}
PAIR_VIEW = ([USER], ([GOOD], [BAD]), None)


@pytest.mark.parametrize(
  ("row", "fmt", "view"),
  [
    (STRINGS, "paired", ("p", ("c", "r"), None)),
    ({"prompt": [USER], **ANSWERS}, "paired_messages", PAIR_VIEW),
    (SHAREGPT, "paired_messages", PAIR_VIEW),
    (
      {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
      "paired_implicit",
      PAIR_VIEW,
    ),
    (
      {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
      "paired_implicit",
      PAIR_VIEW,
    ),
    (
      HH,
      "paired_implicit",
      ("\n\nHuman: a\n\nAssistant:", (" same b", " same c"), None),
    ),
    (
      {
        "instruction": "i",
        "input": "",
        "output": "o",
        **STRINGS,
        "prompt": "p",
      },
      "paired",
      ("p", ("c", "r"), None),
    ),
    (
      {"instruction": "i", "input": "n", "chosen": "c", "rejected": "r"},
      "paired",
      ("Instruction: i\nInput: n\nResponse:", (" c", " r"), None),
    ),
    (
      {"instruction": "i", "output": "o"},
      "completion",
      ("Instruction: i\nResponse:", (" o",), None),
    ),
    (
      {"prompt": "p", "completion": "c", "label": True},
      "unpaired",
      ("p", ("c",), True),
    ),
    (
      {"prompt": "p", "completion": "c", "label": 0},
      "unpaired",
      ("p", ("c",), False),
    ),
    (
      {"prompt": [USER], "completion": [GOOD], "label": 1},
      "unpaired_messages",
      ([USER], ([GOOD],), True),
    ),
    (
      {"messages": [USER, GOOD], "label": False},
      "unpaired_messages",
      ([USER], ([GOOD],), False),
    ),
    ({"prompt": "p", "completion": "c"}, "completion", ("p", ("c",), None)),
    ({"messages": [USER, GOOD]}, "completion", ([USER], ([GOOD],), None)),
    (
      {"prompt": [USER], "completion": [GOOD]},
      "completion",
      ([USER], ([GOOD],), None),
    ),
    (
      {"prompt": "p", "responses": ["a", "b", "c"]},
      "ranked",
      ("p", ("a", "b", "c"), None),
    ),
    (
      {"prompt": [USER], "completions": [[GOOD], BAD]},
      "ranked",
      ([USER], ([GOOD], [BAD]), None),
    ),
    (
      {"instruction": "i", "responses": ["a", "b"], "scores": None},
      "ranked",
      ("Instruction: i\nResponse:", (" a", " b"), None),
    ),
    (
      {
        "prompt": "p",
        "responses": ["c", "a", "d", "b"],
        "scores": [1, 9, 1, 2],
      },
      "ranked",
      ("p", ("a", "b", "c", "d"), None),
    ),
  ],
)
def test_each_shape_is_recognised_and_converted(row, fmt, view):
  assert detect_format(row) == fmt
  example = to_example(row, fmt)
  assert (example.prompt, example.responses, example.desirable) == view
  assert to_example(row | {"subset": "x"}, fmt).subset == "x"


@pytest.mark.parametrize(
  "row", [{}, {"chosen": "c"}, {"question": "q", "answer": "a"}, {"label": 1}]
)
def test_a_row_of_no_shape_lists_the_shapes_and_its_keys(row):
  with pytest.raises(DataError) as caught:
    detect_format(row)
  message = str(caught.value)
  assert all(shape in message for shape in FORMATS.values())
  assert all(key in message for key in row)
  assert "\n" not in message


def test_content_in_parts_is_the_text_of_all():
  parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
  row = {"prompt": [USER | {"content": parts}], **ANSWERS}
  assert to_example(row, detect_format(row)).prompt == [USER]


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (STRINGS | {"prompt": None}, "'prompt' must be a string, found null"),
    (STRINGS | {"chosen": 3}, "'chosen' must be a string, found a number"),
    (
      STRINGS | {"rejected": ["r"]},
      "'rejected' must be a string, found a list",
    ),
    (STRINGS | {"subset": 3}, "'subset' must be a string"),
    (STRINGS | {"margin": "2"}, "'margin' must be a number, found a string"),
    (STRINGS | {"margin": True}, "'margin' must be a number, found true"),
    (STRINGS | {"margin": -0.5}, "'margin' must be from 0 to 1e6, found -0.5"),
    (STRINGS | {"margin": 10**400}, "'margin' must be from 0 to 1e6, found 10"),
    (
      STRINGS | {"margin": float("inf")},
      "'margin' must be a finite number, found inf",
    ),
    ({"prompt": [], **ANSWERS}, "'prompt' must be a list of messages"),
    ({"prompt": ["hi"], **ANSWERS}, "'prompt[0]' must be a message"),
    (
      {"prompt": [{"role": "user"}], **ANSWERS},
      "'prompt[0].content' must be a string, found null",
    ),
    (
      {"prompt": [USER | {"content": [{"type": "image"}]}], **ANSWERS},
      "'prompt[0].content[0]' must be a part of type 'text', found 'image'",
    ),
    (
      {"prompt": [USER | {"content": ["hi"]}], **ANSWERS},
      "'prompt[0].content[0]' must be a part of type 'text', found a string",
    ),
    (
      {"prompt": [USER | {"content": [{"type": "text"}]}], **ANSWERS},
      "'prompt[0].content[0].text' must be a string, found null",
    ),
    (
      {"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
      "'chosen' must end with a message of role 'assistant'",
    ),
    ({"chosen": "a", "rejected": "b"}, "share no beginning that holds"),
    (
      {"chosen": [USER, GOOD], "rejected": [BAD]},
      "share no first message",
    ),
    (
      {"prompt": "p", "completion": "c", "label": None},
      "'label' must be true, false, 1 or 0, found null",
    ),
    ({"prompt": "p", "completion": "c", "label": 2}, "found 2"),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "found a string"),
    ({"messages": [GOOD, USER]}, "must end with a message of role"),
    (
      {"conversations": [{"from": ["x"], "value": "v"}], **ANSWERS},
      "'conversations[0].role' must be a string",
    ),
    (RANKED | {"responses": "a"}, "'responses' must be a list of responses"),
    (RANKED | {"responses": ["a"]}, "must have at least 2 responses, found 1"),
    (
      RANKED | {"responses": ["a", None]},
      "'responses[1]' must be a string, found null",
    ),
    (
      RANKED | {"prompt": [USER]},
      "'responses[0]' must be a list of messages, found a string",
    ),
    (
      {"prompt": [USER], "responses": [[GOOD], [USER]]},
      "'responses[1]' must end with a message of role 'assistant'",
    ),
    (RANKED | {"scores": 3}, "'scores' must be a list of numbers, found a num"),
    (RANKED | {"scores": [1, 2, 3]}, "'scores' must have 2 numbers, found 3"),
    (
      RANKED | {"scores": [1, "2"]},
      "'scores[1]' must be a number, found a str",
    ),
    (
      RANKED | {"scores": [float("nan"), 1]},
      "'scores[0]' must be a finite number, found nan",
    ),
  ],
)
def test_a_wrong_value_names_its_key(row, expected):
  with pytest.raises(DataError) as caught:
    to_example(row, detect_format(row))
  assert expected in str(caught.value)


@pytest.mark.parametrize(
  ("told", "margin"),
  [
    ({"margin": 2}, 2),
    ({"margin": 0.25}, 0.25),
    ({"margin": None}, 0),
    ({}, 0),
  ],
)
def test_a_pair_may_say_by_how_much_it_is_one(told, margin):
  for row in (STRINGS, {"prompt": [USER], **ANSWERS}):
    row = row | told
    assert to_example(row, detect_format(row)).margin == margin


def test_scores_go_with_their_responses_highest_first():
  row = {
    "prompt": "p",
    "responses": ["a", "b", "c"],
    "scores": [1, 3.5, 10**400],
  }
  example = to_example(row, "ranked")
  assert example.responses == ("c", "b", "a")
  assert example.scores == (10**400, 3.5, 1)


def test_equal_dialogues_become_equal_responses():
  example = to_example(
    {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "paired_implicit"
  )
  assert example.responses == ([GOOD], [GOOD])
  same = "\n\nHuman: a\n\nAssistant: b"
  assert split_hh(same, same)[1:] == (" b", " b")


def test_null_keys_of_messages_from_columnar_files_disappear():
  message = USER | {"name": None}
  example = to_example({"messages": [message, GOOD]}, "completion")
  assert example.prompt == [USER]


@needs_shared
@pytest.mark.parametrize(
  ("raw", "normalised"),
  [
    ("hh_harmless/raw_test.jsonl.gz", "hh_harmless/pairs.jsonl.gz"),
    ("tone_pairs/raw.json", "tone_pairs/pairs.jsonl.gz"),
    (
      "chat_demo/raw_dpo_en_demo.json.gz",
      "chat_demo/pairs_messages.jsonl.gz",
    ),
    (
      "chat_demo/raw_kto_en_demo.json.gz",
      "chat_demo/unpaired_messages.jsonl.gz",
    ),
  ],
)
def test_raw_files_equal_their_normalised_twins(raw, normalised):
  def examples(name):
    for _, row in read_rows(str(SHARED / "data" / name)):
      yield to_example(row, detect_format(row))

  pairs = list(zip(examples(raw), examples(normalised), strict=True))
  # Counted, because a failing comparison would print the rows.
  assert sum(ours != theirs for ours, theirs in pairs) == 0
