"""The files of a tokenizer in Hugging Face layout, and what each may say."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data import spm
from dpo_jax.data.sources import kind_of, parse_json
from dpo_jax.errors import DataError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
SPECIAL = "special_tokens_map.json"
MODEL_CONFIG = "config.json"
_SENTENCEPIECE = "tokenizer.model"


def read_folder(path: str) -> dict[str, str]:
  """Name to text of the files that are there.

  A folder without `tokenizer.json` may have a sentencepiece model instead,
  which is converted.

  Raises:
    DataError: neither is there, or a file cannot be read; names it.
  """
  folder = pathlib.Path(path)
  names = (TOKENIZER, CONFIG, TEMPLATE, SPECIAL, GENERATION, MODEL_CONFIG)
  files = {}
  for name in names:
    if os.path.isfile(folder / name):  # False also for what no path can be
      try:
        files[name] = (folder / name).read_text(encoding="utf-8")
      except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / name}: cannot be read ({error})") from None
  if TOKENIZER in files:
    return files
  model = folder / _SENTENCEPIECE
  if not os.path.isfile(model):
    raise DataError(
      f"{path}: no tokenizer.json or tokenizer.model there; expected a"
      " directory in Hugging Face layout, or 'bytes'"
    )
  with library(str(model)):
    files[TOKENIZER], config = spm.convert(
      model.read_bytes(), json_object(files, CONFIG, path), str(model)
    )
  return files | {CONFIG: json.dumps(config, ensure_ascii=False)}


def json_object(files: dict[str, str], name: str, where: str) -> dict:
  """The object a file holds; {} where there is none."""
  try:
    value = parse_json(files.get(name, "{}"))
  except ValueError as error:
    raise DataError(f"{where}/{name}: not JSON ({error})") from None
  if not isinstance(value, dict):
    found = kind_of(value)
    raise DataError(f"{where}/{name}: expected an object, found {found}")
  return value


def token_texts(config: dict) -> dict[str, str]:
  """`*_token` entries; each is a string, or an object with `content`."""
  texts = {}
  for name, value in config.items():
    if isinstance(value, dict):
      value = value.get("content")
    if name.endswith("_token") and isinstance(value, str):
      texts[name] = value
  return texts


def chat_template(files: dict[str, str], config: dict, where: str) -> Any:
  """Jinja source, or None where there is none."""
  if TEMPLATE in files:
    return files[TEMPLATE]
  found = config.get("chat_template")
  if isinstance(found, list):  # several, by name
    named = [one for one in found if isinstance(one, dict)]
    found = next(
      (one.get("template") for one in named if one.get("name") == "default"),
      None,
    )
  if found is not None and not isinstance(found, str):
    raise DataError(
      f"{where}/{CONFIG}: 'chat_template' must be a string, found "
      f"{kind_of(found)}"
    )
  return found


def ids_of(value: Any) -> list[int]:
  """`eos_token_id` and the like: a number, several, or null."""
  listed = value if isinstance(value, list) else [value]
  return [one for one in listed if type(one) is int]


def fingerprint(*parts: Any) -> str:
  payload = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(payload.encode()).hexdigest()


@contextlib.contextmanager
def library(file: str) -> Iterator[None]:
  """Turns what the library raises over a damaged file into a DataError."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit, DataError):
    raise
  # A panic inside the library is not an Exception.
  except BaseException as error:
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    raise DataError(
      f"{file}: not a usable tokenizer ({reason[:200]})"
    ) from None
