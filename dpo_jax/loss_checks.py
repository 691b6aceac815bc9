"""What a config asks of its loss, and the loss does not have."""

from dpo_jax import losses
from dpo_jax.config import Config
from dpo_jax.errors import ConfigError


def check_loss(config: Config, loss: losses.Loss) -> None:
  """Refuses settings that the loss gives no meaning; reads nothing.

  Raises:
    ConfigError: the first of them.
  """
  if loss.needs_scores:
    _check_reward(config, loss)
  if config.reference.precompute and loss.mismatches:
    raise ConfigError(
      f"config.reference.precompute does not go with {loss.name!r}, whose"
      " mismatched completions change from step to step"
    )
  if config.reference.sync_every and not loss.needs_reference:
    raise ConfigError(
      f"config.reference.sync_every: loss {loss.name!r} reads no reference that"
      " could follow the policy"
    )
  if config.offload.reference and not loss.needs_reference:
    raise ConfigError(
      f"config.offload.reference: loss {loss.name!r} reads no reference that"
      " could lie on the host"
    )
  if config.reference.sync_every and (config.lora.rank or config.lora.path):
    raise ConfigError(
      "config.reference.sync_every does not go with config.lora: a mean of"
      " adapters is not the adapter of the mean"
    )
  if config.reference.sync_every and config.reference.precompute:
    raise ConfigError(
      "config.reference.sync_every moves the reference, so its log-probs cannot"
      " be precomputed; leave config.reference.precompute off"
    )


def _check_reward(config: Config, loss: losses.Loss) -> None:
  """What a reward model cannot do."""
  name = f"loss {loss.name!r}"
  if config.sample.prompts:
    raise ConfigError(
      f"config.sample.prompts={config.sample.prompts}: {name} trains a reward"
      " model, which answers nothing; set it to 0"
    )
  if config.model.quantize:
    raise ConfigError(
      f"config.model.quantize={config.model.quantize!r}: {name} trains a scalar"
      " head beside the adapters, and weights in few bits are not exported"
      " with it"
    )
