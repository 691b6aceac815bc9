"""What training sees: shared prompts, one BOS, one EOS, nothing lost unsaid."""

import json

import pytest
from chat_templates import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.encode_pool import encode_rows
from dpo_jax.data.sources import scan_rows
from dpo_jax.data.store import _assemble
from dpo_jax.data.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer
from dpo_jax.errors import ConfigError, DataError

BYTES = ByteTokenizer()
PAIR = {"prompt": "p:", "chosen": " good", "rejected": " bad"}
USER = {"role": "user", "content": "hi"}


def turn(content):
  return {"role": "assistant", "content": content}


def encode(rows, tokenizer=BYTES, **kwargs):
  """Examples of rows, and the counts of what was dropped and changed."""
  chosen = EncodeSettings(**kwargs)
  items = [(f"f:{i}", row) for i, row in enumerate(rows)]
  encoded = encode_rows(items, tokenizer, chosen)
  changed = {name: n for name, n in encoded.changed.items() if n}
  if not len(encoded):
    return None, dict(encoded.dropped), changed
  examples = _assemble(encoded, "f", tokenizer, chosen)
  return examples, dict(encoded.dropped), changed


def text(ids):
  """Bytes as text, special tokens as `^` and `$`."""
  return "".join({1: "^", 2: "$"}.get(i) or chr(i - 3) for i in ids.tolist())


def with_files(config, template=None):
  """The byte tokenizer with other special tokens or another template."""
  base = json.loads(BYTES._files["tokenizer_config.json"])
  base |= config
  if template is not None:
    base["chat_template"] = template
  return HFTokenizer(BYTES._files | {"tokenizer_config.json": json.dumps(base)})


def test_a_pair_becomes_one_prompt_and_two_ended_responses():
  examples, dropped, changed = encode([PAIR | {"subset": "s"}])
  assert text(examples.prompt(0)) == "^p:"
  assert text(examples.chosen(0)) == " good$"
  assert text(examples.rejected(0)) == " bad$"
  assert examples.subset_names == ("s",)
  assert (dropped, changed) == ({}, {})


def test_prompt_loses_its_beginning_never_its_end():
  row = PAIR | {"prompt": "0123456789"}
  examples, _, changed = encode([row], max_length=20, max_prompt_length=5)
  assert text(examples.prompt(0)) == "^6789"
  assert changed == {"prompt_cut": 1}
  examples, _, _ = encode([row], with_files({"bos_token": None}), max_length=10)
  assert text(examples.prompt(0)) == "56789"


def test_a_cut_response_has_no_end_token():
  examples, _, changed = encode([PAIR], max_length=8)
  assert text(examples.chosen(0)) == " good"
  assert text(examples.rejected(0)) == " bad$"
  assert changed == {"response_cut": 1}


def test_responses_that_differ_behind_the_cut_are_dropped():
  row = {"prompt": "p", "chosen": "same A", "rejected": "same B"}
  examples, dropped, _ = encode([row, PAIR], max_length=6)
  assert dropped == {"identical_after_cut": 1}
  assert examples.rows.tolist() == [1]


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    (PAIR | {"chosen": ""}, "empty_response"),
    (PAIR | {"rejected": " \n"}, "empty_response"),
    (PAIR | {"rejected": "<|eos|>"}, "empty_response"),
    (PAIR | {"rejected": " good"}, "identical_responses"),
    (PAIR | {"rejected": " good<|eos|>"}, "identical_responses"),
    (PAIR | {"prompt": None}, "bad_value"),
    (PAIR | {"chosen": True}, "bad_value"),
    (PAIR | {"chosen": "a\ud800"}, "bad_text"),
    ({"prompt": "p", "chosen": "c"}, "wrong_shape"),
    ({"prompt": "p", "completion": "c"}, "wrong_shape"),
    (DataError("f:1: not JSON"), "bad_line"),
  ],
)
def test_an_unusable_row_is_counted_or_stops(row, reason):
  examples, dropped, _ = encode([PAIR, row, PAIR])
  assert dropped == {reason: 1}
  assert examples.rows.tolist() == [0, 2]
  assert examples.report["first_dropped"] == {reason: "f:1"}
  with pytest.raises(DataError, match=rf"^f:1: .*\({reason}\)$"):
    encode([PAIR, row], on_bad_row="error")


def test_without_any_prompt_token_the_row_is_dropped():
  row = PAIR | {"prompt": ""}
  assert encode([row], with_files({"bos_token": None}))[1] == {
    "empty_prompt": 1
  }
  examples, _, _ = encode([row])
  assert text(examples.prompt(0)) == "^"


def test_the_first_row_that_fits_decides_the_shape():
  examples, dropped, _ = encode([{"x": 1}, PAIR, {"messages": []}])
  assert examples.format == "paired" and dropped == {"wrong_shape": 2}


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_there_is_one_beginning_token_whoever_writes_it(adds, writes):
  turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
  template = "{{ bos_token }}" * writes + turns
  tokenizer = with_files({"add_bos_token": adds}, template)
  row = {"prompt": [USER], "chosen": [turn("a")], "rejected": [turn("b")]}
  examples, _, _ = encode([row], tokenizer)
  expected = "^hi" if adds or writes else "hi"
  assert text(examples.prompt(0)) == expected
  assert text(examples.chosen(0)) == "a$"


@pytest.mark.parametrize(
  ("ending", "expected"),
  [
    ("", "a$"),
    ("<|eos|>", "a$"),
    ("<|eos|>\n", "a$"),
    ("<|eos|><|eos|> \n", "a$"),
    ("<|eos|><|pad|>", "a$"),
    ("\n", "a\n$"),
    ("<|eos|>b", "a$b$"),
  ],
)
def test_a_response_ends_in_one_end_token(ending, expected):
  examples, _, _ = encode([PAIR | {"chosen": "a" + ending}])
  assert text(examples.chosen(0)) == expected


def test_a_chat_pair_is_rendered_whole():
  row = {
    "prompt": [USER],
    "chosen": [turn("a"), {"role": "user", "content": "u"}, turn("b")],
    "rejected": [turn("c")],
  }
  examples, _, changed = encode([row])
  assert text(examples.prompt(0)) == "^user: hi\nassistant:"
  assert text(examples.chosen(0)) == " a$\nuser: u\nassistant: b$"
  assert text(examples.rejected(0)) == " c$"
  assert changed == {}


def test_a_template_that_rewrites_the_opening_moves_the_boundary():
  template = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[think{% endif %}"
  )
  row = {"prompt": [USER], "chosen": [turn("a")], "rejected": [turn("b")]}
  examples, _, changed = encode([row], with_files({}, template))
  assert text(examples.prompt(0)) == "^[hi]["
  assert text(examples.chosen(0)) == "a]$"
  assert changed == {"opening_left_out": 1}


def test_a_template_that_rewords_the_last_turn_keeps_the_answer_apart():
  # The system's words come with the last turn, if that is a user's.
  template, _ = TEMPLATES["last_user"]
  system = {"role": "system", "content": "be"}
  row = {
    "prompt": [system, USER],
    "chosen": [turn("a b")],
    "rejected": [turn("a c")],
  }
  examples, _, changed = encode([row], with_files({}, template))
  assert text(examples.prompt(0)) == "^[Q] hi[/Q]"
  assert text(examples.chosen(0)) == " a b$"
  assert text(examples.rejected(0)) == " a c$"
  assert changed == {"opening_left_out": 1}
  single = {"messages": [system, USER, turn("a b")]}
  examples, _, _ = encode([single], with_files({}, template), kind="sft")
  assert text(examples.prompt(0)) == "^[Q] hi[/Q]"
  assert text(examples.chosen(0)) == " a b$"


def test_what_a_template_refuses_is_dropped_and_what_breaks_it_stops():
  refuses = "{{ raise_exception('no') if messages|length > 1 }}"
  row = {"prompt": [USER], "chosen": [turn("a")], "rejected": [turn("b")]}
  assert encode([row], with_files({}, refuses))[1] == {"template_refused": 1}
  with pytest.raises(DataError, match=r"^f:0: chat template does what"):
    encode([row], with_files({}, "{{ 'a' * 10**10 }}"))
  with pytest.raises(DataError, match=r"^f:0: .*no chat template"):
    encode(
      [row],
      HFTokenizer(
        BYTES._files | {"tokenizer_config.json": '{"eos_token": "<|eos|>"}'}
      ),
    )


def test_margins_stay_with_their_pairs():
  rows = [
    PAIR | {"margin": 0.5},
    PAIR | {"margin": 1, "chosen": ""},
    PAIR,
    PAIR | {"margin": 3},
  ]
  examples, dropped, _ = encode(rows)
  assert examples.margins.tolist() == [0.5, 0, 3]
  assert dropped == {"empty_response": 1}
  assert examples.select([2, 0]).margins.tolist() == [3, 0.5]


def test_pairs_read_as_unpaired_give_both_sides_in_order():
  rows = [PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": PAIR["chosen"]}]
  examples, dropped, _ = encode(rows, kind="unpaired")
  assert [text(examples.chosen(i)) for i in range(3)] == [
    " good$",
    " bad$",
    " bad$",
  ]
  assert examples.desirable.tolist() == [True, False, False]
  assert examples.rows.tolist() == [0, 0, 1]
  assert examples.rejected_lengths.tolist() == [0, 0, 0]
  assert dropped == {"empty_response": 1, "identical_responses": 2}


def responses_of(examples, i=0):
  count = (examples.lengths[i] > 0).sum()
  return [text(examples.response(i, k)) for k in range(count)]


def test_a_ranking_keeps_all_its_responses_best_first():
  rows = [
    {"prompt": "p:", "responses": ["1", "2", "3", "4"]},
    {"prompt": "p:", "responses": ["lo", "high"], "scores": [-1, 0.5]},
  ]
  examples, dropped, changed = encode(rows, kind="ranked")
  assert responses_of(examples) == ["1$", "2$", "3$", "4$"]
  assert responses_of(examples, 1) == ["high$", "lo$"]
  assert examples.lengths.tolist() == [[2, 2, 2, 2], [5, 3, 0, 0]]
  assert text(examples.prompt(1)) == "^p:"
  assert (dropped, changed) == ({}, {})


def test_a_chat_ranking_is_rendered_whole():
  row = {"prompt": [USER], "responses": [turn("a"), [turn("b")], turn("c")]}
  examples, _, _ = encode([row], kind="ranked")
  assert text(examples.prompt(0)) == "^user: hi\nassistant:"
  assert responses_of(examples) == [" a$", " b$", " c$"]


@pytest.mark.parametrize(
  ("row", "kept", "changed"),
  [
    ({"responses": ["a", "b", "a", "b"]}, "ab", {"duplicate_left_out": 1}),
    ({"responses": ["a", "b", "a<|eos|>"]}, "ab", {"duplicate_left_out": 1}),
    (
      {"responses": ["a", "b", "c"], "scores": [1, 2, 1]},
      "ba",
      {"tie_left_out": 1},
    ),
    # The repeated answer counts at its better place and ties with nothing.
    (
      {"responses": ["a", "b", "a"], "scores": [1, 1, 2]},
      "ab",
      {"duplicate_left_out": 1},
    ),
    (
      {"responses": ["a", "a", "b", "c"], "scores": [3, 3, 2, 2]},
      "ab",
      {"duplicate_left_out": 1, "tie_left_out": 1},
    ),
  ],
)
def test_what_has_no_place_of_its_own_in_a_ranking_is_left_out(
  row, kept, changed
):
  examples, dropped, found = encode([{"prompt": "p"} | row], kind="ranked")
  assert responses_of(examples) == [f"{letter}$" for letter in kept]
  assert (dropped, found) == ({}, changed)


def test_a_ranking_loses_what_the_cut_makes_equal():
  row = {"prompt": "p", "responses": ["same A", "other", "same B"]}
  examples, _, changed = encode([row], kind="ranked", max_length=6)
  assert responses_of(examples) == ["same", "othe"]
  assert changed == {"response_cut": 1, "duplicate_left_out": 1}


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"responses": ["a", "a", "a"]}, "identical_responses"),
    ({"responses": ["a", "a<|eos|>"]}, "identical_responses"),
    ({"responses": ["a", "b"], "scores": [1, 1.0]}, "tied_scores"),
    ({"responses": ["long A", "long B", "long C"]}, "identical_after_cut"),
    ({"responses": ["a", " ", "b"]}, "empty_response"),
    ({"responses": ["a"]}, "bad_value"),
    ({"responses": ["a", "b", "\ud800"]}, "bad_text"),
    ({"chosen": "a", "rejected": "b"}, "wrong_shape"),
  ],
)
def test_a_row_without_a_ranking_is_counted_or_stops(row, reason):
  row = {"prompt": "p"} | row
  good = {"prompt": "p", "responses": ["a", "b", "c"]}
  kwargs = {"kind": "ranked", "max_length": 6}
  examples, dropped, _ = encode([good, row], **kwargs)
  assert (len(examples), dropped) == (1, {reason: 1})
  with pytest.raises(DataError, match=rf"^f:1: .*\({reason}\)$"):
    encode([good, row], on_bad_row="error", **kwargs)


def test_rankings_give_pairs_of_best_and_worst_and_completions_of_the_best():
  rows = [
    {"prompt": "p", "responses": ["a", "b", "c"]},
    {"prompt": "p", "responses": ["c", "a", "b", "d"], "scores": [1, 9, 5, 1]},
    {"prompt": "p", "responses": ["a", "b", "a"]},
    {"prompt": "p", "responses": ["a", "", "a"]},
    {"prompt": "p", "responses": ["a", "b"], "scores": [0, 0]},
  ]
  examples, dropped, changed = encode(rows, kind="paired")
  assert [responses_of(examples, i) for i in range(len(examples))] == [
    ["a$", "c$"],
    ["a$", "c$"],
    ["a$", "b$"],
  ]
  assert dropped == {"empty_response": 1, "tied_scores": 1}
  assert changed == {}
  examples, dropped, _ = encode(rows, kind="sft")
  assert [responses_of(examples, i) for i in range(5)] == [["a$"]] * 5
  assert examples.lengths.tolist() == [[2, 0]] * 5
  assert dropped == {}


def test_sft_takes_what_was_liked():
  assert text(encode([PAIR], kind="sft")[0].chosen(0)) == " good$"
  rows = [{"prompt": "p", "completion": "c", "label": n} for n in (1, 0, 1)]
  examples, dropped, _ = encode(rows, kind="sft", on_bad_row="error")
  assert examples.rows.tolist() == [0, 2] and examples.desirable.all()
  assert dropped == {"undesirable_skipped": 1}
  examples, _, _ = encode([{"messages": [USER, turn("a")]}], kind="sft")
  assert text(examples.chosen(0)) == " a$"


@pytest.mark.parametrize(
  ("row", "kind"),
  [
    ({"prompt": "p", "completion": "c", "label": 1}, "paired"),
    ({"prompt": "p", "completion": "c"}, "paired"),
    ({"messages": [USER, turn("a")]}, "unpaired"),
    ({"prompt": "p", "responses": ["a", "b"]}, "unpaired"),
    (PAIR, "ranked"),
  ],
)
def test_a_kind_says_what_it_takes_and_what_it_found(row, kind):
  with pytest.raises(DataError, match=f"f:0: kind '{kind}' takes .*; found"):
    encode([row], kind=kind)


@pytest.mark.parametrize(
  ("kwargs", "expected"),
  [
    ({"max_length": 8, "max_prompt_length": 8}, "fill the whole row"),
    ({"max_length": 3}, "at least 4"),
    ({"max_prompt_length": 1}, "at least 2"),
    ({"max_prompt_length": -1}, "at least 2"),
    ({"kind": "pairs"}, "expected paired, unpaired, sft, ranked"),
    ({"on_bad_row": "skip"}, "expected drop or error"),
  ],
)
def test_settings_that_cannot_work_are_refused(kwargs, expected):
  with pytest.raises(ConfigError, match=expected):
    EncodeSettings(**kwargs)


TEXT = st.text(alphabet="ab \n\té\0<|eos|>", max_size=30)


@settings(max_examples=150, deadline=None)
@given(
  st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4),
  st.integers(4, 40),
)
def test_every_example_has_a_prompt_and_responses_within_the_limit(rows, most):
  rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
  examples, dropped, _ = encode(rows, max_length=most)
  if examples is None:
    return
  assert len(examples) + sum(dropped.values()) == len(rows)
  for i in range(len(examples)):
    prompt = examples.prompt(i).tolist()
    assert 1 <= len(prompt) <= most // 2
    assert prompt[0] == 1 and 1 not in prompt[1:]
    for ids in (examples.chosen(i).tolist(), examples.rejected(i).tolist()):
      assert 1 <= len(ids) <= most - len(prompt)
      complete = len(ids) < most - len(prompt)
      assert not complete or ids[-1] == 2
      assert ids[-2:] != [2, 2]


def shared_examples(name, tokenizer, **kwargs):
  source = str(SHARED / "data" / name)
  chosen = EncodeSettings(**kwargs)
  encoded = encode_rows(scan_rows(source), tokenizer, chosen)
  return _assemble(encoded, source, tokenizer, chosen)


@pytest.fixture(scope="module")
def stories():
  return load_tokenizer(str(SHARED / "data" / "stories260k" / "hf"))


@needs_shared
@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "raw.json"])
def test_tone_pairs_encode_to_the_golden_ids(stories, name):
  examples = shared_examples(f"tone_pairs/{name}", stories, max_length=512)
  golden = SHARED / "data" / "stories260k" / "golden.json"
  for i, pair in enumerate(json.loads(golden.read_text())["pairs"]):
    assert examples.prompt(i).tolist() == pair["prompt_ids"]
    assert examples.chosen(i).tolist() == pair["chosen_ids"]
    assert examples.rejected(i).tolist() == pair["rejected_ids"]
  assert examples.report["rows"] == 1100
  assert examples.report["dropped"] == {"identical_responses": 6}


@needs_shared
def test_hh_counts_its_empty_answers_and_further_turns(stories):
  raw = shared_examples("hh_harmless/raw_test.jsonl.gz", stories)
  pairs = shared_examples("hh_harmless/pairs.jsonl.gz", stories)
  for report in (raw.report, pairs.report):
    assert report["rows"] == 2312
    assert report["dropped"] == {"empty_response": 4}
    assert report["changed"]["extra_turns"] == 5
  assert raw.format == "paired_implicit" and pairs.format == "paired"
  assert raw.fingerprint == pairs.fingerprint


@needs_shared
@pytest.mark.parametrize(
  ("raw", "normalised", "kind"),
  [
    ("raw_dpo_en_demo.json.gz", "pairs_messages.jsonl.gz", "paired"),
    ("raw_kto_en_demo.json.gz", "unpaired_messages.jsonl.gz", "unpaired"),
  ],
)
def test_chats_have_one_beginning_and_one_end(stories, raw, normalised, kind):
  names = (f"chat_demo/{raw}", f"chat_demo/{normalised}")
  twin, examples = (shared_examples(n, stories, kind=kind) for n in names)
  assert len(examples) == 300
  assert twin.fingerprint == examples.fingerprint
  assert (examples.tokens == 1).sum() == 300
  for i in range(300):
    prompt = examples.prompt(i)
    assert prompt[0] == 1 and stories.decode(prompt).endswith("assistant:")
    for ids in (examples.chosen(i), examples.rejected(i)):
      if len(ids) and len(prompt) + len(ids) < 1024:
        assert ids[-1] == 2 and (ids == 2).sum() == 1
  if kind == "unpaired":
    assert examples.desirable.sum() == 150
