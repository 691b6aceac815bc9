"""GRPO's advantages and losses against TRL's own code, drawn anew at each run.

`_compute_loss` is given a model that answers with log-probs drawn here;
advantages come from the statements of `_generate_and_score_completions`.
"""

import inspect
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

from .live import (
  PAIRS,
  WHY,
  WIDTH,
  array,
  both_precisions,
  check,
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

MAX_TOKENS = 64


@both_precisions
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_advantages_are_trls(rng, scale, size, x64):
  """By design those of equal rewards are 0 here, and rounding in TRL, whose
  deviation has a factor in float32."""
  module = inspect.getmodule(trl.GRPOTrainer)
  code = inspect.getsource(
    trl.GRPOTrainer._generate_and_score_completions
  ).splitlines()
  lines = [line.strip() for line in code]
  start = lines.index(
    'if self.multi_objective_aggregation == "sum_then_normalize":'
  )
  end = next(
    i for i in range(start, len(code)) if lines[i].startswith("elif self.multi")
  )
  rewards = rng.normal(size=(PAIRS, size))
  rewards[0] = 1.0
  known = vars(module) | {
    "num_generations": size, "device": "cpu",
    "rewards_per_func": tensor(rewards.reshape(-1, 1), x64),
    "unscorable_mask": torch.zeros(PAIRS * size, dtype=bool),
    "self": types.SimpleNamespace(
      multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
      reward_weights=tensor([1.0], x64),
    ),
  }  # fmt: skip
  exec(textwrap.dedent("\n".join(code[start:end])), known)
  with jax.enable_x64(x64):
    ours = losses.group_advantages(array(rewards, x64), scale)
  theirs = known["advantages"].reshape(PAIRS, size)
  check(ours, theirs, max(tolerance(x64, False), 1e-6), scale=1.0)


@both_precisions
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
  "level, reduction",
  [("sequence", "grpo")]
  + [("token", name) for name in ("grpo", "bnpo", "dapo", "dr_grpo")],
)
def test_losses_and_gradients_are_trls(rng, level, reduction, beta, x64):
  """TRL warns of level "sequence" with other reductions, which are of
  tokens."""
  rows = 2 * PAIRS
  lengths = rng.integers(1, WIDTH + 1, rows)
  mask = np.arange(WIDTH) < lengths[:, None]
  old = -rng.exponential(1.0, mask.shape)
  logps = old + rng.normal(0, 0.3, mask.shape)
  reference = old + rng.normal(0, 0.3, mask.shape)
  advantages = rng.normal(size=rows)
  low, high = (float(c) for c in rng.uniform(0.05, 0.5, 2))

  leaf = tensor(logps, x64, requires_grad=True)
  trainer = trl_trainer(
    trl.GRPOTrainer,
    args=types.SimpleNamespace(
      use_bias_correction_kl=False, delta=None, steps_per_generation=1
    ),
    beta=beta, epsilon_low=low, epsilon_high=high, loss_type=reduction,
    importance_sampling_level=level, max_completion_length=MAX_TOKENS,
    top_entropy_quantile=1.0, off_policy_mask_threshold=None, tools=None,
    use_vllm=False, vllm_importance_sampling_correction=False,
    current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
    environments=None, env_mask=None,
  )  # fmt: skip
  trainer.accelerator.num_processes = 1
  trainer.accelerator.reduce = lambda x, reduction: x
  trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
    leaf, torch.zeros_like(leaf.detach()), None
  )  # fmt: skip
  ids = torch.zeros(mask.shape, dtype=torch.long)
  loss = trainer._compute_loss(
    trainer.model,
    {
      "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1,
      "completion_ids": ids, "completion_mask": torch.tensor(mask).long(),
      "advantages": tensor(advantages, x64),
      "old_per_token_logps": tensor(old, x64),
      "ref_per_token_logps": tensor(reference, x64),
      "num_items_in_batch": torch.tensor(mask.sum()),
    },
  )  # fmt: skip
  loss.backward()

  with jax.enable_x64(x64):

    def objective(logps):
      out = losses.grpo(
        logps, array(old, x64), array(reference, x64),
        array(advantages, x64)[:, None], beta=beta, clip_low=low,
        clip_high=high, level=level, mask=jnp.asarray(mask),
      )  # fmt: skip
      sums = losses.token_sums(
        out.loss, mask, lengths[:, None], reduction=reduction,
        max_tokens=MAX_TOKENS,
      )  # fmt: skip
      return sums.mean(), losses.reduce(out, array(mask, x64))

    (value, sums), slope = jax.value_and_grad(objective, has_aux=True)(
      array(logps, x64)
    )
    means = {k: float(s.mean()) for k, s in sums.items()}
  rtol = tolerance(x64, False)
  check(value, loss.item(), rtol, scale=np.abs(advantages).mean())
  check(slope, leaf.grad, rtol)
  logged = trl_metrics(trainer)
  if beta:
    check(means["kl"], logged["kl"], rtol)
  if level == "token":
    for name in ("low_mean", "high_mean", "region_mean"):
      name = f"clip_ratio/{name}"
      check(means[name], logged[name], 1e-6)  # counted in float32
