"""What stands in the place of a preference loss where there is none."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dpo_jax.config import Online
from dpo_jax.online_checks import answers

_OPTIONS = {
  "ppo": (
    "kl", "kl_estimator", "kl_target", "clip", "value_clip", "value_weight",
    "gamma", "lam", "epochs", "minibatches",
  ),
  "grpo": (
    "kl", "clip", "clip_high", "scale", "reduction", "epochs", "minibatches",
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Objective:
  """Answers what a run asks of its loss, see `losses.Loss`."""

  name: str
  settings: Online
  kind = "prompts"
  responses = 0
  needs_scores = mismatches = batch_coupled = reads_tails = False

  @property
  def options(self) -> tuple[tuple[str, Any], ...]:
    """The settings that say the most of it."""
    values = vars(self.settings) | {"group": answers(self.settings)}
    names = ("group", *_OPTIONS.get(self.name, ()))
    return tuple((name, values[name]) for name in names)

  @property
  def needs_reference(self) -> bool:
    return self.name == "ppo" or self.settings.kl > 0

  def initial_state(self) -> Any:
    """The price of a nat, where it is adapted: f32[]."""
    adapted = self.name == "ppo" and self.settings.kl_target > 0
    return jnp.float32(self.settings.kl) if adapted else None
