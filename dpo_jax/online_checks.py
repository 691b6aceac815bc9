"""What a config of an online run asks for, and cannot have."""

from dpo_jax.config import Config, Online
from dpo_jax.errors import ConfigError

_ANSWERS = {"ppo": 1, "grpo": 8, "pairs": 2}


def answers(settings: Online) -> int:
  """How many are given to each prompt."""
  return settings.group or _ANSWERS[settings.method]


def check_online(config: Config) -> None:
  """Refuses settings that do not go together; reads nothing.

  Raises:
    ConfigError: the first of them.
  """
  o, method = config.online, config.online.method
  if not method:
    return
  if bool(o.reward) == bool(o.reward_model):
    raise ConfigError(
      f"config.online.method={method!r} needs a reward: either"
      " config.online.reward, a 'module:function' of prompt and response, or"
      " config.online.reward_model, the folder of a trained one"
    )
  if method != "ppo" and answers(o) < 2:
    raise ConfigError(
      f"config.online.group={o.group}: {method} compares the answers to a"
      " prompt, of which there should be at least 2"
    )
  if config.train.batch_size % o.minibatches:
    raise ConfigError(
      f"config.online.minibatches={o.minibatches} should divide"
      f" config.train.batch_size={config.train.batch_size}"
    )
  d = config.data
  room = d.max_length - (d.max_prompt_length or d.max_length // 2)
  if o.max_tokens > room:
    raise ConfigError(
      f"config.online.max_tokens={o.max_tokens}: beside the longest prompt,"
      f" config.data.max_length={d.max_length} has room for {room}; raise it or"
      " lower config.data.max_prompt_length"
    )
  for name, is_set, why in (
    ("data.row_length", d.row_length, "rows are as long as answers need"),
    ("reference.precompute", config.reference.precompute,
     "answers are not known before"),
    ("reference.sync_every", config.reference.sync_every,
     "the reference of an online run stays"),
    ("lora.dropout", config.lora.dropout,
     "the policy that learns is to be the one that answers"),
  ):  # fmt: skip
    if is_set:
      raise ConfigError(f"config.{name} does not go with online runs: {why}")
  if method == "pairs":
    _check_pairs(config)
  else:
    _check_of_tokens(config)


def _check_pairs(config: Config) -> None:
  loss = config.make_loss()
  if loss.kind != "paired" or loss.needs_scores:
    raise ConfigError(
      f"config.loss.name={loss.name!r}: config.online.method='pairs' makes"
      " pairs of answers, and needs a loss of pairs"
    )


def _check_of_tokens(config: Config) -> None:
  o, method = config.online, config.online.method
  for name in ("temperature", "top_k", "top_p"):
    if getattr(o, name) != getattr(Online(), name):
      raise ConfigError(
        f"config.online.{name}={getattr(o, name)}: {method} weighs answers by"
        " the policy's own probabilities, and they must be drawn from these"
      )
  asked = [k for k, v in config.loss.items() if k != "name" and v is not None]
  if asked:
    raise ConfigError(
      f"config.loss.{asked[0]}: {method} reads no preference loss; its settings"
      " are those of config.online"
    )
  if method == "ppo" and (config.lora.rank or config.lora.path):
    raise ConfigError(
      "config.lora does not go with config.online.method='ppo', whose value"
      " model is a whole one; grpo has none"
    )
