"""Chat templates written for these tests, in the manner of model families.

Together they use what templates in common use are made of; none is a copy of
a published one. Each comes with its special tokens.
"""

import pathlib

SPECIAL = {
  "bos_token": "<|bos|>",
  "eos_token": "<|eos|>",
  "pad_token": "<|pad|>",
}
CHAT_TOKENS = [
  "<|start|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>",
  "</turn>", "<|user|>", "<|assistant|>", "<|system|>", "[Q]", "[/Q]",
]  # fmt: skip
_NO_BOS = {"bos_token": None, "eos_token": "<|end|>"}
_CHANGES = {
  "inst": {},  # the system's words in the first turn, a beginning every turn
  "headers": {"eos_token": "<|eot|>"},  # the date, tools, trimmed turns
  "last_user": {},  # namespace, selectattr, comparisons of messages
  "thinking": _NO_BOS,  # a scan from behind, thoughts cut from the past
  "chatml": _NO_BOS,
  "turns": {},  # content in parts, another name for the assistant
  "one_line": {},
  "bars": {"pad_token": "<|eos|>"},  # bare blocks that trim_blocks tidies
  "marked": _NO_BOS,  # {% generation %}
  "wide": {},  # macros, filters, tests and methods, one of each
}
_FOLDER = pathlib.Path(__file__).with_name("templates")
# Name: the template, and what differs from `SPECIAL`.
TEMPLATES = {
  name: ((_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), changes)
  for name, changes in _CHANGES.items()
}
