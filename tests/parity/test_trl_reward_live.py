"""The loss of TRL's RewardTrainer against its own code, drawn anew at each
run."""

import types

import jax
import numpy as np
import pytest

from dpo_jax import losses

from .live import (
  PAIRS,
  WHY,
  array,
  both_precisions,
  check,
  random_and_edge,
  rng,
  tensor,
  tolerance,
  trl_metrics,
  trl_trainer,
)

torch = pytest.importorskip("torch", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]


@random_and_edge
@both_precisions
@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margin"])
@pytest.mark.parametrize("centred", [False, True], ids=["free", "centred"])
def test_reward_models_have_trls_loss(rng, margin, centred, x64, edge):
  """By design a tie is half a success here and a failure in TRL."""
  scale = rng.choice([0.0, 1e-6, 1.0, 1e4], (2, 1)) if edge else 1.0
  scores = rng.normal(size=(2, PAIRS)) * scale
  margins = rng.exponential(1.0, PAIRS) if margin else None
  centering = float(rng.uniform(0.001, 0.1)) if centred else 0.0

  trainer = trl_trainer(
    trl.RewardTrainer,
    args=types.SimpleNamespace(center_rewards_coefficient=centering or None),
  )
  leaf = tensor(scores.reshape(-1, 1), x64, requires_grad=True)
  inputs = {"attention_mask": torch.ones(2 * PAIRS, 3, dtype=torch.long)}
  if margin:
    inputs["margin"] = tensor(margins, x64)
  loss = trainer.compute_loss(
    lambda **_: types.SimpleNamespace(logits=leaf), inputs
  )
  loss.backward()

  with jax.enable_x64(x64):
    ours = losses.make("reward", centering=centering)

    def objective(scores):
      given = {"chosen_scores": scores[0], "rejected_scores": scores[1]}
      if margin:
        given["preference_margins"] = array(margins, x64)
      sums = losses.reduce(ours(**given))
      return sums["loss"].mean(), {k: x.mean() for k, x in sums.items()}

    (value, means), grad = jax.value_and_grad(objective, has_aux=True)(
      array(scores, x64)
    )
  rtol = tolerance(x64, edge, 1e-5)
  check(value, loss.item(), rtol)
  check(grad, leaf.grad.reshape(2, PAIRS), rtol)
  theirs = trl_metrics(trainer)
  size = np.abs(scores).max()
  check(means["rewards/margins"], theirs["margin"], rtol, size)
  ties = (scores[0] == scores[1]).mean()
  check(means["rewards/accuracies"], theirs["accuracy"] + ties / 2, 1e-6)
