"""Tokenizers read as transformers reads the same folder."""

import json
import re

import pytest

from dpo_jax.data.tokenizer import ByteTokenizer, HFTokenizer

from .live import WHY

transformers = pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("sentencepiece", reason=WHY)

from spm_models import folder, texts  # noqa: E402

from tests.parity.live import SEED  # noqa: E402

pytestmark = pytest.mark.parity
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = NAMES | {"tokenizer_class": "LlamaTokenizer"}
FOLDERS = {
  "llama": ("bpe", LLAMA),
  "llama legacy": ("bpe", LLAMA | {"legacy": True}),
  "llama not legacy": ("bpe", LLAMA | {"legacy": False}),
  "gemma": ("bpe no prefix", NAMES | {"tokenizer_class": "GemmaTokenizer"}),
  "no config": ("bpe", None),
  "unigram": ("unigram", {"tokenizer_class": "PreTrainedTokenizerFast"}),
}


def theirs_of(path):
  transformers.logging.set_verbosity_error()
  return transformers.AutoTokenizer.from_pretrained(str(path))


def some_texts(space=" "):
  print(f"PARITY_SEED={SEED}")
  plain = list(texts(SEED, 300))
  turns = [f"<s>the{text}</s>{space}and {text}<s>" for text in plain]
  return plain + turns


def known_to_differ(text):
  """Where transformers' own readers differ from sentencepiece: they put no
  space before text that begins with one, take `<0x41>` for a byte, and look
  for a piece of the user before spaces are written as it has them."""
  mixed = re.search(" [ ▁]*▁▁", text)
  return text[:1] in (" ", "▁") or "<0x41>" in text or mixed


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sentencepiece_model_gives_their_ids(tmp_path, name):
  kind, config = FOLDERS[name]
  theirs = theirs_of(folder(tmp_path, kind, config))
  ours = HFTokenizer.load(str(tmp_path))
  # Neither do they after a special token, if one is due there.
  space = "" if name == "llama legacy" else " "
  wanted = [text for text in some_texts(space) if not known_to_differ(text)]
  for text, ids in zip(wanted, ours.encode(wanted), strict=True):
    assert theirs.encode(text, add_special_tokens=False) == ids, text
  for token in ("bos", "eos", "unk"):
    there = getattr(theirs, f"{token}_token")
    assert ours.special_tokens.get(f"{token}_token") == there


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_for_a_sentencepiece_model_is_read(tmp_path, name):
  kind, config = FOLDERS[name]
  ours = HFTokenizer.load(folder(tmp_path, kind, config))
  ours.save(tmp_path / "copy")
  theirs = theirs_of(tmp_path / "copy")
  wanted = some_texts()
  for text, ids in zip(wanted, ours.encode(wanted), strict=True):
    assert theirs.encode(text, add_special_tokens=False) == ids, text
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
  assert theirs("a").input_ids[0] == ours.bos_id
  assert theirs.eos_token_id == ours.eos_id


def added(content, number, **flags):
  base = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
  return {"content": content, "id": number, "special": True} | base | flags


FLAGS = [
  added("<|a|>", 259, lstrip=True),
  added("<|b|>", 260, rstrip=True),
  added("<|c|>", 261, lstrip=True, rstrip=True, special=False),
  added("word", 262, single_word=True, special=False),
  added("Norm", 263, normalized=True, special=False),
  added("<|im_end|>", 264),
]
OBJECT = {"__type": "AddedToken", "lstrip": False, "normalized": False}
CONFIGS = {
  "null bos, pad is eos": {
    "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
  },
  "no pad": {"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
  "objects": {
    "bos_token": OBJECT | {"content": "<|bos|>"},
    "eos_token": OBJECT | {"content": "<|im_end|>"},
  },
  "adds bos": {
    "bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": True,
  },
  "adds none": {
    "bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": False,
  },
  "more": {
    "eos_token": "<|eos|>", "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|a|>", "<|b|>"],
  },
  "extra list": {
    "eos_token": "<|eos|>", "extra_special_tokens": ["<|a|>"],
  },
  "extra names": {
    "eos_token": "<|eos|>", "extra_special_tokens": {"turn_token": "<|a|>"},
  },
}  # fmt: skip
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.role ~ m.content ~ eos_token }}"
  "{% endfor %}{{ pad_token is defined }}{{ bos_token is defined }}"
  "{{ turn_token }}"
)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_special_tokens_are_theirs(tmp_path, name, listed):
  ByteTokenizer().save(tmp_path)
  backend = json.loads((tmp_path / "tokenizer.json").read_text())
  backend["added_tokens"] += FLAGS
  backend["normalizer"] = {"type": "Lowercase"}
  if name != "adds bos":  # transformers 5 asks only tokenizer.json
    backend["post_processor"] = None
  config = {"tokenizer_class": "PreTrainedTokenizerFast"} | CONFIGS[name]
  config["chat_template"] = TEMPLATE
  if listed:
    config["added_tokens_decoder"] = {
      str(one["id"]): {k: v for k, v in one.items() if k != "id"}
      for one in backend["added_tokens"]
    }
  (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  ours, theirs = HFTokenizer.load(str(tmp_path)), theirs_of(tmp_path)

  assert ours.vocab_size == len(theirs)
  assert ours.bos_id == theirs.bos_token_id
  assert ours.eos_id == theirs.eos_token_id
  if theirs.pad_token_id is not None:
    assert ours.pad_id == theirs.pad_token_id
  assert ours.adds_bos == (
    ours.bos_id is not None and theirs("x").input_ids[0] == ours.bos_id
  )
  pieces = (" ", *(one["content"] for one in FLAGS), "norm", " sword ", "é\n")
  for i in range(200):
    text = "".join(pieces[(i * k + i // k) % len(pieces)] for k in range(1, 9))
    ids = ours.encode([text])[0]
    assert ids == theirs.encode(text, add_special_tokens=False), text
    wanted = theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == wanted
  messages = [{"role": "user", "content": "x"}]
  from dpo_jax.data.chat import render

  assert render(
    ours.chat_template, messages, ours.special_tokens, False
  ) == theirs.apply_chat_template(messages, tokenize=False)
