"""Ids come out the same after saving, and special tokens are what files say."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from dpo_jax.data.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer
from dpo_jax.errors import DataError

BYTES = ByteTokenizer()
STORIES = SHARED / "data" / "stories260k" / "hf"


def folder(path, *, config=None, **files):
  """A tokenizer directory: the byte tokenizer's, with other files."""
  BYTES.save(path)
  (path / "generation_config.json").unlink()
  if config is not None:
    files["tokenizer_config.json"] = config
  for name, value in files.items():
    name = name if "." in name else f"{name}.json"
    (path / name).write_text(
      value if isinstance(value, str) else json.dumps(value)
    )
  return str(path)


def refusal(path):
  with pytest.raises(DataError) as caught:
    HFTokenizer.load(str(path))
  assert "\n" not in str(caught.value)
  return str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_each_byte_is_its_own_id(text):
  assume("<|" not in text)
  assert BYTES.encode([text]) == [[3 + byte for byte in text.encode()]]
  assert BYTES.decode(BYTES.encode([text])[0]) == text


def test_special_tokens_are_read_in_text_and_left_out_of_it():
  ids = BYTES.encode(["<|bos|>a<|eos|><|pad|>"])[0]
  assert ids == [1, 3 + ord("a"), 2, 0]
  assert BYTES.decode(ids) == "a"
  assert (BYTES.pad_id, BYTES.bos_id, BYTES.eos_id) == (0, 1, 2)
  assert BYTES.vocab_size == 259 and BYTES.adds_bos


def test_a_saved_byte_tokenizer_loads_to_the_same_ids(tmp_path):
  BYTES.save(tmp_path / "new")
  again = load_tokenizer(str(tmp_path / "new"))
  texts = [
    "",
    "a b",
    "é\n\0\U0001f600",
    "<|eos|>",
    "".join(map(chr, range(300))),
  ]
  assert again.encode(texts) == BYTES.encode(texts)
  assert again.fingerprint == BYTES.fingerprint
  assert again.chat_template == BYTES.chat_template
  assert again.special_tokens == BYTES.special_tokens


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bytes", "stories"])
def test_transformers_reads_a_saved_tokenizer(tmp_path, name):
  transformers = pytest.importorskip("transformers")
  if name == "stories" and not STORIES.exists():
    pytest.skip("no shared data")
  ours = BYTES if name == "bytes" else HFTokenizer.load(str(STORIES))
  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  text = " Hé, you\n\U0001f600"
  assert theirs.encode(text, add_special_tokens=False) == ours.encode([text])[0]
  assert theirs.eos_token_id == ours.eos_id
  assert theirs.bos_token_id == ours.bos_id
  messages = [{"role": "user", "content": "x"}]
  assert "user: x" in theirs.apply_chat_template(messages, tokenize=False)


@needs_shared
def test_the_stories_tokenizer_is_read_as_its_files_say():
  tokenizer = load_tokenizer(str(STORIES))
  assert tokenizer.vocab_size == 512
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
  assert tokenizer.adds_bos
  golden = json.loads((STORIES.parent / "golden.json").read_text())
  text = golden["greedy_text"]
  assert tokenizer.encode([text])[0] == golden["greedy_ids"][1:]
  assert tokenizer.decode(golden["greedy_ids"]) == text


def test_special_tokens_may_be_objects_or_null(tmp_path):
  config = {"bos_token": None, "eos_token": {"content": "<|eos|>", "id": 9}}
  tokenizer = HFTokenizer.load(folder(tmp_path, config=config))
  assert tokenizer.bos_id is None and not tokenizer.adds_bos
  assert tokenizer.eos_id == tokenizer.pad_id == 2
  assert "bos_token" not in tokenizer.special_tokens
  assert tokenizer.chat_template is None


@pytest.mark.parametrize(
  "files",
  [
    {"special_tokens_map": {"eos_token": "<|eos|>"}},
    {"generation_config": {"eos_token_id": [2, 1]}},
    {"config": {"eos_token_id": 2}},
  ],
)
def test_the_end_token_is_found_where_the_config_is_silent(tmp_path, files):
  path = folder(tmp_path, tokenizer_config={})
  for name, value in files.items():
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
  tokenizer = HFTokenizer.load(path)
  assert tokenizer.eos_id == 2
  tokenizer.save(tmp_path / "copy")
  assert HFTokenizer.load(str(tmp_path / "copy")).eos_id == 2


def test_chat_templates_come_from_each_place_they_are_kept(tmp_path):
  listed = [
    {"name": "tool_use", "template": "T"},
    {"name": "default", "template": "D"},
  ]
  config = {"eos_token": "<|eos|>", "chat_template": listed}
  path = folder(tmp_path, config=config)
  assert HFTokenizer.load(path).chat_template == "D"
  (tmp_path / "chat_template.jinja").write_text("J")
  tokenizer = HFTokenizer.load(path)
  assert tokenizer.chat_template == "J"
  tokenizer.save(tmp_path / "copy")
  assert HFTokenizer.load(str(tmp_path / "copy")).chat_template == "J"


def test_the_fingerprint_follows_what_changes_ids(tmp_path):
  base = {"eos_token": "<|eos|>", "bos_token": "<|bos|>"}
  configs = [
    base,
    base | {"add_bos_token": False},
    base | {"bos_token": "<|pad|>"},
    base | {"chat_template": "x"},
  ]
  prints = {
    HFTokenizer.load(folder(tmp_path, config=config)).fingerprint
    for config in configs
  }
  assert len(prints) == len(configs)


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({"config": {}}, "no end token"),
    ({"config": {"eos_token": "</x>"}}, "'</x>' is not in the vocabulary"),
    (
      {"config": {"eos_token": "<|eos|>", "bos_token": "<x>"}},
      "bos_token '<x>' is not in the vocabulary",
    ),
    ({"config": "{"}, "tokenizer_config.json: not JSON"),
    ({"config": "[]"}, "expected an object, found a list"),
    (
      {"config": {"eos_token": "<|eos|>", "chat_template": 3}},
      "'chat_template' must be a string",
    ),
    ({"tokenizer": "{"}, "tokenizer.json: not a usable tokenizer"),
    ({"tokenizer": '{"model": {"type": "BPE"}}'}, "not a usable tokenizer"),
  ],
)
def test_wrong_files_are_named(tmp_path, files, expected):
  assert expected in refusal(folder(tmp_path, **files))


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  ByteTokenizer().save(str(tmp_path / "mine"))
  assert load_tokenizer("~/mine").vocab_size == ByteTokenizer().vocab_size


def test_a_missing_tokenizer_names_what_was_expected(tmp_path):
  assert "no tokenizer.json or tokenizer.model there" in refusal(tmp_path)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a\ud800", "text 1 holds half a surrogate pair at character 1"),
    (3, "text 1 must be a string, found a number"),
    (None, "text 1 must be a string, found null"),
  ],
)
def test_text_that_cannot_be_encoded_is_named(text, expected):
  with pytest.raises(DataError, match=expected):
    BYTES.encode(["fine", text])


def test_a_saved_tokenizer_says_where_answers_end(tmp_path):
  ByteTokenizer().save(str(tmp_path / "one"))
  saved = json.loads((tmp_path / "one" / "generation_config.json").read_text())
  assert saved == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
  assert HFTokenizer.load(str(tmp_path / "one")).stop_ids == (2,)

  saved |= {"eos_token_id": [2, 70], "temperature": 0.6}
  (tmp_path / "one" / "generation_config.json").write_text(json.dumps(saved))
  several = HFTokenizer.load(str(tmp_path / "one"))
  assert several.stop_ids == (2, 70)
  several.save(str(tmp_path / "two"))
  again = json.loads((tmp_path / "two" / "generation_config.json").read_text())
  assert again == saved
