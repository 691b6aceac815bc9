"""A damaged or hostile tokenizer file ends in one line, or does no harm."""

import copy
import functools
import json
import operator
import random

import pytest

from dpo_jax.data.tokenizer import ByteTokenizer, HFTokenizer
from dpo_jax.errors import DataError

BYTES = ByteTokenizer()


def test_a_damaged_tokenizer_file_is_a_data_error():
  text = BYTES._files["tokenizer.json"]
  rng = random.Random(0)
  news = ["", "0", '"', "null", "[]", "-1", "{}", "1e999", "4294967296", "\\u"]
  refused = 0
  for i in range(1000):
    # Half of them in the settings, which come before the vocabulary.
    start = rng.randrange(text.index('"vocab"') if i % 2 else len(text))
    end = start + rng.randrange(40)
    damaged = text[:start] + rng.choice(news) + text[end:]
    try:
      files = BYTES._files | {"tokenizer.json": damaged}
      HFTokenizer(files).decode(HFTokenizer(files).encode(["a b"])[0])
    except DataError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 500


@pytest.mark.parametrize("value", [None, True, 0, -1, [], {}, "x", ["x"], 1e99])
def test_other_values_in_the_settings_are_data_errors_or_harmless(value):
  whole = json.loads(BYTES._files["tokenizer.json"])
  for path in _paths(whole):
    changed = copy.deepcopy(whole)
    inside = functools.reduce(operator.getitem, path[:-1], changed)
    inside[path[-1]] = value
    try:
      files = BYTES._files | {"tokenizer.json": json.dumps(changed)}
      HFTokenizer(files).encode(["a b", "<|eos|>"])
    except DataError as error:
      assert "\n" not in str(error)


def _paths(value, path=()):
  """Of all values in the file but those of the vocabulary."""
  if path and path[-1] != "vocab":
    yield path
  items = ()
  if isinstance(value, dict):
    items = list(value.items())[:12]
  elif isinstance(value, list):
    items = list(enumerate(value))
  for key, inner in items:
    yield from _paths(inner, (*path, key))


def test_a_panic_of_the_library_is_a_data_error(tmp_path):
  backend = json.loads(BYTES._files["tokenizer.json"])
  backend["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {},
  }
  config = {"eos_token": "<|eos|>", "bos_token": "<|bos|>"}
  files = {"tokenizer.json": backend, "tokenizer_config.json": config}
  for name, value in files.items():
    (tmp_path / name).write_text(json.dumps(value))
  with pytest.raises(DataError, match="not a usable tokenizer"):
    HFTokenizer.load(str(tmp_path))
