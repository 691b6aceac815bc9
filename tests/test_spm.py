"""A converted sentencepiece model gives the ids of sentencepiece itself."""

import random
import sys

import pytest
from spm_models import KINDS, folder, texts, trained

from dpo_jax.data.spm import convert
from dpo_jax.data.tokenizer import HFTokenizer
from dpo_jax.errors import DataError

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path, kind):
  theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
  ours = HFTokenizer.load(folder(tmp_path, kind))
  assert ours.vocab_size == theirs.vocab_size()
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
  assert ours.adds_bos
  several = list(texts(1, 1500))
  for text, ids in zip(several, ours.encode(several), strict=True):
    assert ids == theirs.encode(text), text
    if theirs.unk_id() not in ids:
      assert ours.decode(ids) == theirs.decode(ids)


def test_a_saved_conversion_needs_no_sentencepiece(tmp_path, monkeypatch):
  ours = HFTokenizer.load(folder(tmp_path))
  ours.save(tmp_path / "copy")
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  again = HFTokenizer.load(str(tmp_path / "copy"))
  some = list(texts(2, 50))
  assert again.encode(some) == ours.encode(some)
  assert again.fingerprint == ours.fingerprint and again.adds_bos
  with pytest.raises(DataError, match="pip install sentencepiece"):
    HFTokenizer.load(str(tmp_path))


def test_a_tokenizer_json_comes_first(tmp_path):
  HFTokenizer.load(folder(tmp_path)).save(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
  assert HFTokenizer.load(str(tmp_path)).eos_id == 2


def entry(content, **flags):
  return {"content": content, "normalized": False, "special": True} | flags


def test_the_config_renames_pieces_and_adds_tokens(tmp_path):
  size = HFTokenizer.load(folder(tmp_path)).vocab_size
  decoder = {
    "1": entry("<|begin|>"),
    str(size): entry("<|turn|>"),
    str(size + 1): entry("<|end|>", rstrip=True),
  }
  config = {"added_tokens_decoder": decoder, "eos_token": "<|end|>"}
  config |= {"bos_token": entry("<|begin|>"), "add_bos_token": False}
  config |= {"tokenizer_class": "LlamaTokenizer"}
  ours = HFTokenizer.load(folder(tmp_path, config=config))
  assert (ours.bos_id, ours.eos_id) == (1, size + 1)
  assert ours.vocab_size == size + 2 and not ours.adds_bos
  ids = ours.encode(["<|begin|>the<|turn|>the<|end|>  the"])[0]
  assert ids[0] == 1 and size in ids and size + 1 in ids
  assert ours.decode(ids) == "thethethe"


def test_a_space_comes_first_only_or_after_every_token(tmp_path):
  first, every = (
    HFTokenizer.load(folder(tmp_path, config={"legacy": legacy}))
    for legacy in (False, True)
  )
  plain = first.encode(["the"])[0]
  assert every.encode(["<s>the"])[0] == [1, *plain]
  assert first.encode(["<s>the"])[0] != [1, *plain]


@pytest.mark.parametrize(
  ("kind", "change", "named"),
  [
    ("bpe", {"normalization_rule_name": "nmt_nfkc"}, "'nmt_nfkc' cannot"),
    ("unigram", {"normalization_rule_name": "nfkc_cf"}, "'nfkc_cf' cannot"),
    ("bpe", {"model_type": "char"}, "kind 'char'"),
    ("bpe", {"model_type": "word"}, "kind 'word'"),
    ("bpe", {"treat_whitespace_as_suffix": True}, "white space as a suffix"),
  ],
)
def test_what_cannot_be_converted_exactly_is_named(
  tmp_path, kind, change, named
):
  with pytest.raises(DataError, match=named) as caught:
    HFTokenizer.load(folder(tmp_path, kind, **change))
  assert "tokenizer.model: " in str(caught.value)


@pytest.mark.parametrize(
  ("decoder", "named"),
  [
    ({"99999": entry("<x>")}, "'<x>' cannot have id 99999"),
    ({"0": "x"}, "should map ids to objects"),
    ([1], "should map ids to objects"),
    ({"3": entry("<s>")}, "two pieces have one name"),
  ],
)
def test_added_tokens_that_cannot_be_are_named(tmp_path, decoder, named):
  config = {"added_tokens_decoder": decoder}
  with pytest.raises(DataError, match=named):
    HFTokenizer.load(folder(tmp_path, config=config))


def test_a_damaged_model_is_a_data_error(tmp_path):
  model, rng = trained(), random.Random(0)
  path = tmp_path / "tokenizer.model"
  refused = 0
  for _ in range(150):
    damaged = bytearray(model)
    for _ in range(rng.randrange(1, 4)):
      # The settings are at the end; most of the rest are pieces.
      first = rng.choice([0, len(damaged) - 300])
      at = rng.randrange(first, len(damaged))
      new = bytes(rng.choices(range(256), k=rng.randrange(3)))
      damaged[at : at + rng.randrange(4)] = new
    path.write_bytes(damaged)
    try:
      HFTokenizer.load(str(tmp_path)).encode(["a b"])
    except DataError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 50


def test_settings_are_checked_against_the_library(monkeypatch):
  monkeypatch.setattr("dpo_jax.data.spm._check", lambda *_: None)
  model = trained("unigram", normalization_rule_name="nmt_nfkc")
  with pytest.raises(DataError, match=r"exactly; '.*' gets"):
    convert(model, {}, "f")
