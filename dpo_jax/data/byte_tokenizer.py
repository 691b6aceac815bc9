"""The files of a tokenizer whose tokens are bytes, built from nothing."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_SPECIAL = {
  "pad_token": "<|pad|>",
  "bos_token": "<|bos|>",
  "eos_token": "<|eos|>",
}


def files() -> dict[str, str]:
  """Name to text. Ids: 0 pad, 1 beginning, 2 end, then byte b at 3 + b."""
  texts = list(_SPECIAL.values())
  vocabulary = {text: i for i, text in enumerate([*texts, *_letters()])}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.add_special_tokens(
    [
      tokenizers.AddedToken(text, special=True, normalized=False)
      for text in texts
    ]
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  begin = _SPECIAL["bos_token"]
  backend.post_processor = processors.TemplateProcessing(
    f"{begin} $A", f"{begin} $A {begin} $B", [(begin, texts.index(begin))]
  )
  config = _SPECIAL | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": True,
    "chat_template": _TEMPLATE,
    "clean_up_tokenization_spaces": False,
  }
  return {
    "tokenizer.json": backend.to_str(),
    "tokenizer_config.json": json.dumps(config),
  }


def _letters() -> list[str]:
  """The visible character by which byte-level vocabularies write each byte."""
  visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in visible]
  letters = {byte: chr(byte) for byte in visible}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
  return [letters[byte] for byte in range(256)]
