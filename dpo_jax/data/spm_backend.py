"""The `tokenizers` pipeline that does what a sentencepiece model does."""

import re
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# Types of pieces, as the file has them.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
_SPACE = "▁"  # how pieces write a space


def build(proto: Any, names: list[str], prefix_all: bool) -> Any:
  """A tokenizer that gives the ids of sentencepiece.

  Args:
    proto: the parsed model.
    names: texts of the pieces, where the config may have renamed some.
    prefix_all: the space in front comes after every added token as well, and
      not only at the beginning of the text.
  """
  spec = proto.normalizer_spec
  fallback = proto.trainer_spec.byte_fallback
  user = [n for n, p in zip(names, proto.pieces) if p.type == USER]
  unigram = proto.trainer_spec.model_type == 1
  if unigram:
    # 0 is the most there is: text isolated for such a piece becomes it.
    scored = [
      (name, 0.0 if piece.type == USER else piece.score)
      for name, piece in zip(names, proto.pieces)
    ]
    model = models.Unigram(
      scored, unk_id=_unknown(proto), byte_fallback=fallback
    )
  else:
    model = models.BPE(
      vocab={name: number for number, name in enumerate(names)},
      merges=_merges(proto, names),
      unk_token=names[_unknown(proto)],
      fuse_unk=True,
      byte_fallback=fallback,
      ignore_merges=bool(user),
    )
  backend = tokenizers.Tokenizer(model)
  steps = []
  if spec.remove_extra_whitespaces:
    steps.append(
      normalizers.Replace(tokenizers.Regex(rf"\A +|[ {_SPACE}]+\z"), "")
    )
    steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
  steps.append(normalizers.Replace(" ", _SPACE))
  backend.normalizer = normalizers.Sequence(steps)
  splits = []
  if spec.add_dummy_prefix:
    # "First" means at place 0, which white space that was removed had. No
    # text begins with a space any more, so that the prefix always comes.
    every = prefix_all or spec.remove_extra_whitespaces
    scheme = "always" if every else "first"
    splits.append(pre_tokenizers.Metaspace(" ", scheme, split=False))
    splits.append(pre_tokenizers.Metaspace(_SPACE, "never", split=False))
  if user:
    longest_first = sorted(user, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
    splits.append(pre_tokenizers.Split(pattern, "isolated"))
  # Text must not become the byte that it names, which the library would do
  # wherever it is unigram, and where such text is alone with `ignore_merges`.
  if fallback and (unigram or user):
    byte = r"<(?=0x[0-9A-F]{2}>)" if unigram else r"\A<(?=0x[0-9A-F]{2}>\z)"
    splits.append(pre_tokenizers.Split(tokenizers.Regex(byte), "isolated"))
  if splits:
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
  steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
  steps.append(decoders.Fuse())
  if spec.add_dummy_prefix:
    most = 1000 if spec.remove_extra_whitespaces else 1
    steps.append(decoders.Strip(" ", most, 0))
  backend.decoder = decoders.Sequence(steps)
  return backend


def _merges(proto: Any, names: list[str]) -> list[tuple[str, str]]:
  """All that makes a piece of two others, by the scores of the pieces."""
  scores = {
    name: piece.score
    for name, piece in zip(names, proto.pieces)
    if piece.type == NORMAL and name == piece.piece
  }
  ranked = []
  for name, score in scores.items():
    for i in range(1, len(name)):
      if name[:i] in scores and name[i:] in scores:
        ranked.append((-score, name[:i], name[i:]))
  return [(left, right) for _, left, right in sorted(ranked)]


def _unknown(proto: Any) -> int:
  return next(i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN)
