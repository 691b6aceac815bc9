"""Tokenizers: text to ids through the `tokenizers` library, nothing remote.

Both kinds are one class: a `tokenizer.json` from a checkpoint directory, and a
byte tokenizer built in memory for runs without a checkpoint.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dpo_jax.data.sources import kind_of, parse_json
from dpo_jax.errors import DataError

_BYTE_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"


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
    self._backend = _backend(files["tokenizer.json"], where)
    config = self._config = self._json(_CONFIG)
    self.special_tokens = _token_texts(self._json("special_tokens_map.json"))
    self.special_tokens |= _token_texts(config)
    self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
    if "eos_token" not in self.special_tokens:
      self._find_eos()
    self.eos_id = self._id("eos_token")
    self.bos_id = self._id("bos_token")
    pad_id = self._id("pad_token")
    self.pad_id = self.eos_id if pad_id is None else pad_id
    self.stop_ids = self._stop_ids()
    self.adds_bos = self._adds_bos()
    self.chat_template = self._template()
    # A saved copy names its end token even where config.json did.
    config["eos_token"] = self.special_tokens["eos_token"]
    self.fingerprint = _fingerprint(
      files["tokenizer.json"],
      [self.bos_id, self.eos_id, self.adds_bos, self.special_tokens],
      self.chat_template,
    )

  @classmethod
  def load(cls, path: str) -> "HFTokenizer":
    """Reads a checkpoint directory. Raises DataError, naming the file."""
    folder = pathlib.Path(path)
    if not (folder / "tokenizer.json").is_file():
      raise DataError(
        f"{path}: no tokenizer.json there; expected a directory in Hugging "
        "Face layout, or 'bytes'"
      )
    names = ("special_tokens_map.json", _GENERATION, "config.json")
    files = {}
    for name in ("tokenizer.json", _CONFIG, _TEMPLATE, *names):
      if (folder / name).is_file():
        try:
          files[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
          raise DataError(
            f"{folder / name}: cannot be read ({error})"
          ) from None
    return cls(files, str(path))

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. Nothing is put in front or behind.

    The text of a special token inside a text becomes that token, as chat
    templates need.

    Raises:
      DataError: something is not a string, or holds half a surrogate pair.
    """
    texts = list(texts)
    try:
      with _library(self._where):
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
    with _library(self._where):
      return self._backend.decode(ids, skip_special_tokens=True)

  def save(self, directory: str) -> None:
    """Writes the tokenizer's files, as transformers and `load` read them."""
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", _TEMPLATE, "special_tokens_map.json"):
      if name in self._files:
        (folder / name).write_text(self._files[name], encoding="utf-8")
    # Without the latter, transformers would end answers at its own default id.
    for name, value in (
      (_CONFIG, self._config),
      (_GENERATION, self._generation_config()),
    ):
      text = json.dumps(value, ensure_ascii=False, indent=2)
      (folder / name).write_text(text + "\n", encoding="utf-8")

  def _generation_config(self) -> dict:
    ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
    known = {k: v for k, v in ids.items() if v is not None}
    stops = list(self.stop_ids)
    known["eos_token_id"] = stops if len(stops) > 1 else self.eos_id
    return known | self._json(_GENERATION)

  def _stop_ids(self) -> tuple[int, ...]:
    named = self._json(_GENERATION).get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    more = [x for x in named if isinstance(x, int) and x != self.eos_id]
    return (self.eos_id, *more)

  def _json(self, name: str) -> dict:
    try:
      value = parse_json(self._files.get(name, "{}"))
    except ValueError as error:
      raise DataError(f"{self._where}/{name}: not JSON ({error})") from None
    if not isinstance(value, dict):
      found = kind_of(value)
      raise DataError(
        f"{self._where}/{name}: expected an object, found {found}"
      )
    return value

  def _find_eos(self) -> None:
    for name in (_GENERATION, "config.json"):
      ids = self._json(name).get("eos_token_id")
      first = ids[0] if isinstance(ids, list) and ids else ids
      if isinstance(first, int) and 0 <= first < self.vocab_size:
        text = self._backend.id_to_token(first)
        if text is not None:
          self.special_tokens["eos_token"] = text
          return
    raise DataError(
      f"{self._where}: no end token; expected 'eos_token' in {_CONFIG} or "
      "'eos_token_id' in generation_config.json"
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
    with _library(self._where):
      return self._backend.encode("a").ids[:1] == [self.bos_id]

  def _template(self) -> str | None:
    if _TEMPLATE in self._files:
      return self._files[_TEMPLATE]
    found = self._config.get("chat_template")
    if isinstance(found, list):  # several, by name
      named = [one for one in found if isinstance(one, dict)]
      found = next(
        (one.get("template") for one in named if one.get("name") == "default"),
        None,
      )
    if found is not None and not isinstance(found, str):
      raise DataError(
        f"{self._where}/{_CONFIG}: 'chat_template' must be a string, found "
        f"{kind_of(found)}"
      )
    return found


class ByteTokenizer(HFTokenizer):
  """Ids 0 pad, 1 beginning, 2 end, then byte b at 3 + b: 259 in all."""

  def __init__(self) -> None:
    tokens = {"pad_token": "<|pad|>", "bos_token": "<|bos|>"}
    tokens["eos_token"] = "<|eos|>"
    vocabulary = {text: number for number, text in enumerate(tokens.values())}
    letters = _byte_letters()
    vocabulary |= {letter: 3 + byte for byte, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(
      [
        tokenizers.AddedToken(text, special=True, normalized=False)
        for text in tokens.values()
      ]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    config = tokens | {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "add_bos_token": True,
      "chat_template": _BYTE_TEMPLATE,
      "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": backend.to_str(), _CONFIG: json.dumps(config)}
    super().__init__(files, "byte tokenizer")


def load_tokenizer(spec: str) -> HFTokenizer:
  """`bytes`, or a directory that holds `tokenizer.json`. Raises DataError."""
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
  with _library(where):
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
  return backend


@contextlib.contextmanager
def _library(where: str) -> Iterator[None]:
  """Turns what the library raises over a damaged file into a DataError."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit):
    raise
  # A panic inside the library is not an Exception.
  except BaseException as error:
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    raise DataError(
      f"{where}/tokenizer.json: not a usable tokenizer ({reason[:200]})"
    ) from None


def _token_texts(config: dict) -> dict[str, str]:
  """`*_token` entries; each is a string, or an object with `content`."""
  texts = {}
  for name, value in config.items():
    if isinstance(value, dict):
      value = value.get("content")
    if name.endswith("_token") and isinstance(value, str):
      texts[name] = value
  return texts


def _fingerprint(text: str, ids: list, template: str | None) -> str:
  payload = json.dumps([text, ids, template], sort_keys=True)
  return hashlib.sha256(payload.encode()).hexdigest()


def _byte_letters() -> list[str]:
  """The visible character by which byte-level vocabularies write each byte."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in visible]
  letters = {byte: chr(byte) for byte in visible}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
  return [letters[byte] for byte in range(256)]
