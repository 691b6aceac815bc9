"""Sentencepiece models for tests, trained on the spot, and texts to try."""

import functools
import io
import json
import random

IDENTITY = {
  "normalization_rule_name": "identity",
  "remove_extra_whitespaces": False,
}
KINDS = {
  # As Llama 2 and Mistral have it.
  "bpe": IDENTITY | {"model_type": "bpe", "byte_fallback": True},
  # As Gemma has it: no space in front, white space as pieces of the user.
  "bpe no prefix": IDENTITY
  | {
    "model_type": "bpe",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "user_defined_symbols": ["<sep>", "\n\n", "▁▁", "<turn>"],
  },
  "bpe unknowns": {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
  },
  "unigram": IDENTITY | {"model_type": "unigram", "byte_fallback": True},
  "unigram user": {
    "model_type": "unigram",
    "normalization_rule_name": "identity",
    "user_defined_symbols": ["<sep>"],
  },
}
_WORDS = (
  "the", "of", "and", "preference", "model", "answer", "reward", "loss",
  "policy", "reference", "prompt", "chosen", "rejected", "length", "Étude",
  "naïve", "3.14", "{", "}", "(", ")", "=", "==", "_x", "self.", "return",
  "def", "你好", "мир", "🙂",
)  # fmt: skip
_PIECES = (
  *"abcdeht  ▁\n\t.,(){}_=01", "the ", "return ", "é", "🙂", "你", "ﬁ", "①",
  "e\u0301", "\u200d", "\u3000", "\u00a0", "<0x41>", "<sep>", "aaaa", "    ",
  "\r\n", "\0", "\u202e", "ａ", "<turn>", "\n\n\n",
)  # fmt: skip


@functools.cache
def trained(kind="bpe", **more):
  """The bytes of a `tokenizer.model`."""
  import sentencepiece

  rng = random.Random(0)
  lines = [" ".join(rng.choices(_WORDS, k=12)) for _ in range(400)]
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=out, vocab_size=420,
    hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    **KINDS[kind] | more,
  )  # fmt: skip
  return out.getvalue()


def texts(seed, count):
  """Texts of all sorts, without the names of control pieces."""
  rng = random.Random(seed)
  for _ in range(count):
    n = rng.randrange(40)
    kind = rng.random()
    if kind < 0.3:
      ranges = ((1, 0xD800), (32, 300), (0xE000, 0x20000))
      yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(n))
    elif kind < 0.5:
      yield "".join(rng.choice("ab ") for _ in range(n))
    else:
      yield "".join(rng.choice(_PIECES) for _ in range(n))


def folder(path, kind="bpe", config=None, **more):
  """A directory with such a model."""
  (path / "tokenizer.model").write_bytes(trained(kind, **more))
  if config is not None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  return str(path)
