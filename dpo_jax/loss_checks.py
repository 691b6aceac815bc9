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
    raise ConfigError(
      f"config.loss.name={loss.name!r} reads the scores of a reward model;"
      " training one is not part of this version, the function is:"
      " losses.reward"
    )
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
