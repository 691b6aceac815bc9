"""What a config of an online run asks for, and cannot have."""

from dpo_jax.config import Config, Online
from dpo_jax.errors import ConfigError

_ANSWERS = {"ppo": 1, "grpo": 8, "pairs": 2}
# What not all methods read, by who does.
_READ_BY = {
  "ppo": (
    "kl", "kl_estimator", "kl_target", "kl_horizon", "clip", "gamma", "lam",
    "whiten", "whiten_rewards", "value_clip", "value_weight",
  ),
  "grpo": ("kl", "clip", "clip_high", "scale", "reduction"),
  "pairs": ("temperature", "top_k", "top_p"),
}  # fmt: skip


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
  _check_unread(o)
  if method == "ppo" and o.kl_target:
    _check_adapted(config)


def _check_unread(o: Online) -> None:
  """Settings that would be ignored."""
  for name in dict.fromkeys(
    name for names in _READ_BY.values() for name in names
  ):
    value = getattr(o, name)
    readers = [method for method, names in _READ_BY.items() if name in names]
    if o.method not in readers and value != getattr(Online(), name):
      raise ConfigError(
        f"config.online.{name}={value!r}: {o.method} does not read it, only"
        f" {' and '.join(readers)}"
      )


def _check_adapted(config: Config) -> None:
  o, asked = config.online, f"config.online.kl_target={config.online.kl_target}"
  if not o.kl:
    raise ConfigError(
      f"{asked} adapts config.online.kl, which should then start above 0"
    )
  given = config.train.batch_size * answers(o)
  if o.kl_horizon < given:
    raise ConfigError(
      f"config.online.kl_horizon={o.kl_horizon} should be at least the {given}"
      f" answers of a step: with {asked} a step moves config.online.kl by a"
      " fifth at most"
    )


def _check_pairs(config: Config) -> None:
  loss = config.make_loss()
  if loss.kind != "paired" or loss.needs_scores:
    raise ConfigError(
      f"config.loss.name={loss.name!r}: config.online.method='pairs' makes"
      " pairs of answers, and needs a loss of pairs"
    )
  if config.online.temperature == 0:
    raise ConfigError(
      "config.online.temperature=0 gives one answer over and over, and pairs"
      " are of answers that differ"
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
  if method == "grpo" and o.clip > 1:
    raise ConfigError(
      f"config.online.clip={o.clip} should lie in [0, 1]; upwards"
      " config.online.clip_high may go further"
    )
  if method == "ppo" and (config.lora.rank or config.lora.path):
    raise ConfigError(
      "config.lora does not go with config.online.method='ppo', whose value"
      " model is a whole one; grpo has none"
    )
