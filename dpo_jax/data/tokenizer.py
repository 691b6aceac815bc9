"""Tokenizers: text to ids through the `tokenizers` library, nothing remote.

All kinds are one class: a `tokenizer.json` from a checkpoint directory, what a
sentencepiece model there is converted to, and a byte tokenizer built in memory
for runs without a checkpoint.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import tokenizers

from dpo_jax.data import byte_tokenizer
from dpo_jax.data import tokenizer_files as layout
from dpo_jax.data.sources import kind_of
from dpo_jax.errors import DataError


class HFTokenizer:
  """A tokenizer in Hugging Face layout.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id: id of the token that begins a text, or None where there is none.
    eos_id: id of the token that ends one.
    pad_id: id to fill with; `eos_id` where the files name no padding token.
    stop_ids: ids that end an answer: `eos_id`, and what generation_config.json
      names beside it.
    adds_bos: whether plain text is to begin with `bos_id`.
    chat_template: Jinja source, or None.
    special_tokens: name (`bos_token`, ...) to text.
    fingerprint: SHA-256 (hex) of everything that changes ids.
  """

  def __init__(self, files: dict[str, str], where: str = "tokenizer"):
    """From file name to text; `where` begins the error messages.

    Raises:
      DataError: `tokenizer.json` is damaged, or no end token is known.
    """
    self._where = where
    self._files = dict(files)
    self._backend = _backend(files[layout.TOKENIZER], where)
    config = self._config = self._json(layout.CONFIG)
    self.special_tokens = layout.token_texts(self._json(layout.SPECIAL))
    self.special_tokens |= layout.token_texts(config)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):  # named; a list of texts has no names
      self.special_tokens |= layout.token_texts(extra)
    self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
    if "eos_token" not in self.special_tokens:
      self._find_eos()
    self.eos_id = self._id("eos_token")
    self.bos_id = self._id("bos_token")
    pad_id = self._id("pad_token")
    self.pad_id = self.eos_id if pad_id is None else pad_id
    self.stop_ids = self._stop_ids()
    self.adds_bos = self._adds_bos()
    self.chat_template = layout.chat_template(files, config, where)
    # A saved copy names its end token even where config.json did.
    config["eos_token"] = self.special_tokens["eos_token"]
    self.fingerprint = layout.fingerprint(
      files[layout.TOKENIZER],
      [self.bos_id, self.eos_id, self.adds_bos, self.special_tokens],
      self.chat_template,
    )

  def __reduce__(self):
    """As its files: what the library makes of them stays in its process."""
    return HFTokenizer, (self._files, self._where)

  @classmethod
  def load(cls, path: str) -> "HFTokenizer":
    """Reads a checkpoint directory. Raises DataError, naming the file."""
    return cls(layout.read_folder(path), str(path))

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. Nothing is put in front or behind.

    The text of a special token inside a text becomes that token, as chat
    templates need.

    Raises:
      DataError: something is not a string, or holds half a surrogate pair.
    """
    texts = list(texts)
    try:
      with layout.library(self._file):
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    except DataError:
      # The library says that something is no text, but not which and why.
      for number, text in enumerate(texts):
        check_text(text, f"text {number}")
      raise
    return [encoding.ids for encoding in batch]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens left out."""
    ids = [int(one) for one in ids]
    with layout.library(self._file):
      return self._backend.decode(ids, skip_special_tokens=True)

  def save(self, directory: str) -> None:
    """Writes the tokenizer's files, as transformers and `load` read them."""
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (layout.TOKENIZER, layout.TEMPLATE, layout.SPECIAL):
      if name in self._files:
        (folder / name).write_text(self._files[name], encoding="utf-8")
    # Without the latter, transformers would end answers at its own default id.
    for name, value in (
      (layout.CONFIG, self._config),
      (layout.GENERATION, self._generation_config()),
    ):
      text = json.dumps(value, ensure_ascii=False, indent=2)
      (folder / name).write_text(text + "\n", encoding="utf-8")

  def _generation_config(self) -> dict:
    ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
    known = {k: v for k, v in ids.items() if v is not None}
    stops = list(self.stop_ids)
    known["eos_token_id"] = stops if len(stops) > 1 else self.eos_id
    return known | self._json(layout.GENERATION)

  def _stop_ids(self) -> tuple[int, ...]:
    named = layout.ids_of(self._json(layout.GENERATION).get("eos_token_id"))
    return (self.eos_id, *(x for x in named if x != self.eos_id))

  def _json(self, name: str) -> dict:
    return layout.json_object(self._files, name, self._where)

  @property
  def _file(self) -> str:
    return f"{self._where}/{layout.TOKENIZER}"

  def _find_eos(self) -> None:
    for name in (layout.GENERATION, layout.MODEL_CONFIG):
      ids = layout.ids_of(self._json(name).get("eos_token_id"))
      if ids and 0 <= ids[0] < self.vocab_size:
        text = self._backend.id_to_token(ids[0])
        if text is not None:
          self.special_tokens["eos_token"] = text
          return
    raise DataError(
      f"{self._where}: no end token; expected 'eos_token' in {layout.CONFIG}"
      f" or 'eos_token_id' in {layout.GENERATION}"
    )

  def _id(self, name: str) -> int | None:
    text = self.special_tokens.get(name)
    number = None if text is None else self._backend.token_to_id(text)
    if number is None and text is not None and name != "pad_token":
      raise DataError(
        f"{self._where}: {name} {text!r} is not in the vocabulary"
      )
    return number

  def _adds_bos(self) -> bool:
    if self.bos_id is None:
      return False
    says = self._config.get("add_bos_token")
    if isinstance(says, bool):
      return says
    with layout.library(self._file):
      return self._backend.encode("a").ids[:1] == [self.bos_id]


class ByteTokenizer(HFTokenizer):
  """Ids 0 pad, 1 beginning, 2 end, then byte b at 3 + b: 259 in all."""

  def __init__(self) -> None:
    super().__init__(byte_tokenizer.files(), "byte tokenizer")


def load_tokenizer(spec: str) -> HFTokenizer:
  """`bytes`, or a directory in Hugging Face layout. Raises DataError."""
  if spec == "bytes":
    return ByteTokenizer()
  return HFTokenizer.load(os.path.expanduser(spec))


def check_text(text: object, place: str) -> None:
  """Raises DataError unless `text` is a string that UTF-8 can hold."""
  if not isinstance(text, str):
    raise DataError(f"{place} must be a string, found {kind_of(text)}")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise DataError(
      f"{place} holds half a surrogate pair at character {error.start}"
    ) from None


def _backend(text: str, where: str) -> tokenizers.Tokenizer:
  with layout.library(f"{where}/{layout.TOKENIZER}"):
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
  return backend
