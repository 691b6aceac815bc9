"""What an answer is worth: by a function over text, or by a reward model."""

import math
from collections.abc import Sequence

import numpy as np

from dpo_jax import processes, reward_model
from dpo_jax.answers import load_reward
from dpo_jax.build import Built
from dpo_jax.config import Online
from dpo_jax.errors import ConfigError

Ids = Sequence[int] | np.ndarray
_LARGEST = float(np.finfo(np.float32).max)


class Rewards:
  """(prompts, responses) -> f32[N], NaN where there is no reward.

  A function is called by the leading process alone, which tells the others; a
  reward model runs on the mesh.
  """

  def __init__(self, settings: Online, built: Built):
    """Imports the function, or loads the model.

    Raises:
      UserError: it cannot be had.
    """
    self._tokenizer = built.tokenizer
    self._function = self.model = None
    self._name = f"config.online.reward={settings.reward!r}"
    if settings.reward:
      self._function = load_reward(settings.reward, "online.reward")
    else:
      self._name = f"config.online.reward_model={settings.reward_model!r}"
      self.model = reward_model.load(settings.reward_model, built)

  def __call__(
    self,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    strict: bool = True,
  ) -> np.ndarray:
    """Scores answers, given as token ids.

    Raises:
      ConfigError: strict, and not one of them has a reward; says why the first
        has none.
    """
    if self.model:
      found = np.asarray(self.model(prompts, responses), np.float32)
      why = "not a number"
    else:
      values, why = processes.lead(lambda: self._ask(prompts, responses))
      found = np.array(values, np.float32)
    found = np.where(np.isfinite(found), found, np.float32(np.nan))
    if strict and np.isnan(found).all():
      raise ConfigError(
        f"{self._name} failed on all {len(found)} answers of a step; on the"
        f" first: {why}"
      )
    return found

  def _ask(self, prompts, responses) -> tuple[list[float], str]:
    """Rewards, and why the first failed one did."""
    values, why = [], ""
    for prompt, response in zip(prompts, responses, strict=True):
      texts = map(self._tokenizer.decode, (prompt, response))
      value, wrong = math.nan, ""
      try:
        value = float(self._function(*texts))
        if not abs(value) <= _LARGEST:  # NaN neither
          wrong, value = f"it gave {value}", math.nan
      except Exception as e:  # whatever it is, the run goes on
        wrong = " ".join(f"{type(e).__name__}: {e}".split())
      values.append(value)
      why = why or wrong
    return values, why
