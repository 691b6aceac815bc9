"""Answers prompts with a checkpoint.

  python scripts/sample.py --config=configs/dpo.py \
    --config.model.path=runs/dpo/model --prompt="Once upon a time"

Without --prompt, prompts are read from standard input, one a line; --chat puts
each into the tokenizer's chat template as a user's turn, after --system if that
is given. JSON lines come out, one an answer: prompt, response, logp, tokens.

With --chat in a terminal and no --prompt, it is a conversation. In all cases
`--config.sample.*` sets temperature, top_k, top_p and max_tokens.
"""

import json
import sys

from absl import flags

from dpo_jax import main
from dpo_jax.errors import ConfigError

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are turns of a user.")
_SYSTEM = flags.DEFINE_string("system", "", "What comes before, with --chat.")


def _main(config):
  if _SYSTEM.value and not _CHAT.value:
    raise ConfigError("--system is a turn of a chat; add --chat")
  if _CHAT.value and not _PROMPT.value and sys.stdin.isatty():
    _talk(config)
    return
  from dpo_jax.asking import answer_texts

  prompts = _PROMPT.value or [line.rstrip("\n") for line in sys.stdin]
  for row in answer_texts(
    config, prompts, chat=_CHAT.value, system=_SYSTEM.value
  ):
    print(json.dumps(row, ensure_ascii=False))


def _talk(config):
  import contextlib

  from dpo_jax.talking import open_conversation, talk

  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  `input` then has a history and line editing

  talk(
    open_conversation(config, _SYSTEM.value),
    lambda: input("> "),
    lambda text: print(text, end="", flush=True),
  )


if __name__ == "__main__":
  main.run(_main)
