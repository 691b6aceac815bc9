"""A sentencepiece `tokenizer.model`, converted to a `tokenizer.json`.

The rest of the project then knows one kind of tokenizer. What the `tokenizers`
library cannot do in the same way is refused by name, and the two libraries are
held against each other on a few texts before the result is used.
"""

from typing import Any

import tokenizers
from tokenizers import processors

from dpo_jax.data import spm_backend
from dpo_jax.errors import DataError

_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_PROBES = (
  "a", " The  quick brown\n\n\tfox, 3.14 × 2 = 6.28!  ", "",
  "Ünïcode — 你好, мир 🙂👩‍🚀", "aaaaaaa    bbbbb", "▁x ﬁ ①",
)  # fmt: skip


def convert(
  model: bytes, config: dict[str, Any], where: str
) -> tuple[str, dict[str, Any]]:
  """Texts of `tokenizer.json` and what `tokenizer_config.json` is to say.

  Args:
    model: the bytes of a `tokenizer.model`.
    config: its `tokenizer_config.json`; {} if there is none.
    where: the file, for messages.

  Raises:
    DataError: sentencepiece is not installed, or the model is damaged or of a
      kind that cannot be converted exactly.
  """
  proto, library = _load(model, where)
  _check(proto, where)
  names = [piece.piece for piece in proto.pieces]
  added = _added_tokens(config, where)
  for number, token in added.items():
    if number < len(names):
      names[number] = token.content
  if len(set(names)) < len(names):
    raise DataError(f"{where}: two pieces have one name")
  # As transformers has it where the config does not say.
  llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
  every = bool(config.get("legacy", not llama))
  backend = spm_backend.build(proto, names, prefix_all=every)
  known = _special(proto, names)
  config = known | config | {"tokenizer_class": "PreTrainedTokenizerFast"}
  _add(backend, proto, names, added, where)
  _compare(backend, library, where)
  if config.get("add_bos_token"):
    bos = config["bos_token"]
    bos = bos["content"] if isinstance(bos, dict) else bos
    number = backend.token_to_id(bos)
    if number is not None:
      backend.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos} $B", [(bos, number)]
      )
  return backend.to_str(), config


def _load(model: bytes, where: str) -> tuple[Any, Any]:
  """The parsed file, and the library that reads it."""
  try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
  except ImportError:
    raise DataError(
      f"{where}: a sentencepiece model, and sentencepiece is not installed;"
      " pip install sentencepiece protobuf, or give a tokenizer.json"
    ) from None
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(model)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
  except Exception as error:
    line = (str(error).strip().splitlines() or ["no reason given"])[-1]
    raise DataError(
      f"{where}: not a sentencepiece model ({line[:200]})"
    ) from None
  return proto, library


def _check(proto: Any, where: str) -> None:
  """Raises DataError for what cannot be converted exactly."""
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  kind = _KINDS.get(trainer.model_type, str(trainer.model_type))
  scores = [
    piece.score
    for piece in proto.pieces
    if piece.type == spm_backend.NORMAL and len(piece.piece) > 1
  ]
  wrong = {
    f"a model of kind {kind!r}": kind not in ("unigram", "bpe"),
    f"normalisation {normalizer.name!r}": normalizer.precompiled_charsmap,
    "white space as a suffix": trainer.treat_whitespace_as_suffix,
    "white space not escaped": not normalizer.escape_whitespaces,
    "denormalisation": proto.denormalizer_spec.precompiled_charsmap,
    "unused pieces": any(
      piece.type == spm_backend.UNUSED for piece in proto.pieces
    ),
    "pieces of equal score": kind == "bpe" and len(set(scores)) < len(scores),
  }
  found = [name for name, is_so in wrong.items() if is_so]
  if found:
    raise DataError(
      f"{where}: {found[0]} cannot be converted exactly; expected a unigram or"
      " bpe model without normalisation, or a tokenizer.json"
    )


def _special(proto: Any, names: list[str]) -> dict[str, Any]:
  """What a `tokenizer_config.json` says if it says nothing else."""
  spec = proto.trainer_spec
  ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id}
  ids |= {"unk_token": spec.unk_id, "pad_token": spec.pad_id}
  known = {k: names[i] for k, i in ids.items() if 0 <= i < len(names)}
  return known | {"add_bos_token": "bos_token" in known}


def _added_tokens(
  config: dict[str, Any], where: str
) -> dict[int, tokenizers.AddedToken]:
  """`added_tokens_decoder`: from an id to the token, with its flags."""
  found = {}
  listed = config.get("added_tokens_decoder") or {}
  try:
    for number, value in listed.items():
      flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
      chosen = {flag: bool(value.get(flag)) for flag in flags}
      found[int(number)] = tokenizers.AddedToken(value["content"], **chosen)
  except (AttributeError, KeyError, TypeError, ValueError):
    raise DataError(
      f"{where}: 'added_tokens_decoder' of tokenizer_config.json should map ids"
      " to objects with 'content'"
    ) from None
  return dict(sorted(found.items()))


def _add(
  backend: Any,
  proto: Any,
  names: list[str],
  added: dict[int, tokenizers.AddedToken],
  where: str,
) -> None:
  """Makes added tokens of control pieces and of what the config lists."""
  for number, piece in enumerate(proto.pieces):
    if (
      piece.type in (spm_backend.CONTROL, spm_backend.UNKNOWN)
      and number not in added
    ):
      token = tokenizers.AddedToken(
        names[number], special=True, normalized=False
      )
      added[number] = token
  for number, token in sorted(added.items()):
    backend.add_tokens([token])
    if backend.token_to_id(token.content) != number:
      raise DataError(
        f"{where}: added token {token.content!r} cannot have id {number}; the"
        f" next free one is {backend.get_vocab_size(with_added_tokens=True)}"
      )


def _compare(backend: Any, library: Any, where: str) -> None:
  for text in _PROBES:
    ours = backend.encode(text, add_special_tokens=False).ids
    if ours != library.encode(text):
      raise DataError(
        f"{where}: cannot be converted exactly; {text!r} gets other ids"
      )
