"""Texts and chats to prompts in token ids, and their answers as rows."""

from collections.abc import Sequence
from typing import Any

from dpo_jax.answers import Answerer
from dpo_jax.build import build
from dpo_jax.config import Config
from dpo_jax.data import chat as chat_template
from dpo_jax.data.tokenizer import HFTokenizer
from dpo_jax.errors import ConfigError
from dpo_jax.weights import load_policy, refuse_new_adapters


def answer_texts(
  config: Config,
  prompts: Sequence[str],
  *,
  chat: bool = False,
  system: str = "",
) -> list[dict[str, Any]]:
  """Answers texts with `config.model.path`, as `config.sample` says.

  Args:
    config: model, sampling settings, seed.
    prompts: texts; not empty.
    chat: each is the first turn of a user, in the tokenizer's template.
    system: what a system's turn before it says; "" for none.

  Returns:
    For each prompt {"prompt", "response", "logp", "tokens"}; logp is that of
    the whole response, in nats, at temperature 1.

  Raises:
    UserError: no prompts, no model, or a model without a chat template.
  """
  if not prompts:
    raise ConfigError("no prompts; give --prompt or lines on standard input")
  require_model(config)
  built = build(config)
  tokenizer = built.tokenizer
  if chat:
    ids = [chat_ids(tokenizer, first_turn(text, system)) for text in prompts]
  else:
    ids = [with_bos(tokenizer, x) for x in tokenizer.encode(prompts)]
  if not all(ids):
    raise ConfigError("an empty prompt has no token to answer from")
  answerer = Answerer(built, config.sample, ids, config.seed)
  answers = answerer(load_policy(config, built))
  return [
    {
      "prompt": prompt,
      "response": response,
      "logp": float(logps.sum()),
      "tokens": int(length),
    }
    for prompt, response, logps, length in zip(
      prompts,
      answers.responses,
      answers.sampled.logps,
      answers.sampled.lengths,
      strict=True,
    )
  ]


def require_model(config: Config) -> None:
  """Raises ConfigError where no model is named, or one with adapters that
  nobody trained."""
  if not config.model.path:
    raise ConfigError("config.model.path is empty; name the model to sample")
  refuse_new_adapters(config)


def first_turn(text: str, system: str = "") -> list[dict[str, str]]:
  """Messages of a chat that begins."""
  before = [{"role": "system", "content": system}] if system else []
  return [*before, {"role": "user", "content": text}]


def chat_ids(
  tokenizer: HFTokenizer, messages: list[dict[str, str]]
) -> list[int]:
  """Messages, then the opening of an answer, in the tokenizer's template.

  Raises:
    ConfigError: the tokenizer has none.
    DataError: the template cannot be used.
    TemplateRefused: it cannot for these messages.
  """
  if tokenizer.chat_template is None:
    raise ConfigError("this model's tokenizer has no chat template")
  text = chat_template.render(
    tokenizer.chat_template, messages, tokenizer.special_tokens, True
  )
  return with_bos(tokenizer, tokenizer.encode([text])[0])


def with_bos(tokenizer: HFTokenizer, ids: list[int]) -> list[int]:
  """Exactly one BOS, whether or not the template wrote it."""
  written = 0
  while written < len(ids) and ids[written] == tokenizer.bos_id:
    written += 1
  begins = tokenizer.adds_bos or written
  return ([tokenizer.bos_id] if begins else []) + ids[written:]
