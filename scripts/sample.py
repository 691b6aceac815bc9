"""Answers prompts with a checkpoint.

  python scripts/sample.py --config=configs/dpo.py \
    --config.model.path=runs/dpo/model --prompt="Once upon a time"

Without --prompt, prompts are read from standard input, one a line; --chat puts
each into the tokenizer's chat template as a user's turn. `--config.sample.*`
sets temperature, top_k, top_p and max_tokens. JSON lines come out, one an
answer: prompt, response, logp, tokens.
"""

import json
import sys

from absl import flags

from dpo_jax import main

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are turns of a user.")


def _main(config):
  from dpo_jax.answers import answer_texts

  prompts = _PROMPT.value or [line.rstrip("\n") for line in sys.stdin]
  for row in answer_texts(config, prompts, chat=_CHAT.value):
    print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
  main.run(_main)
