"""The losses of TRL's KTOTrainer against its own code, drawn anew at each run.

BCO is not compared live: TRL 1.16 has no trainer for it any more.
"""

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
  check_metrics,
  draw_tokens,
  random_and_edge,
  rng,
  tensor,
  tolerance,
  trl_metrics,
  trl_outputs,
  trl_trainer,
)

torch = pytest.importorskip("torch", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]


def _labels(kind, n):
  if kind == "mixed":
    return np.arange(n) % 2 == 0
  return np.full(n, kind == "liked")


@random_and_edge
@both_precisions
@pytest.mark.parametrize("labels", ["mixed", "liked", "disliked"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_labelled_completions_have_trls_loss(rng, name, labels, x64, edge):
  """TRL's margin, a difference of two means it logs, is no metric here."""
  own, other = draw_tokens(rng, PAIRS, edge), draw_tokens(rng, PAIRS, edge)
  if edge and rng.random() < 0.5:  # or z0 is 0, or far above all log-ratios
    near = np.where(other.policy < -0.1, other.policy - 0.01, other.policy)
    other = other._replace(reference=near)
  desirable = _labels(labels, PAIRS)
  options = {
    "beta": float(10 ** rng.uniform(-2, 0)),
    "desirable_weight": float(rng.uniform(0.5, 2)),
    "undesirable_weight": float(rng.uniform(0.5, 2)),
  }

  trainer = trl_trainer(
    trl.KTOTrainer, loss_type=name, calculate_KL=name == "kto",
    precompute_ref_logps=True, **options,
  )  # fmt: skip
  leaf = tensor(own.policy, x64, requires_grad=True)
  mismatched = tensor(other.policy, x64)
  ids = torch.zeros(own.mask.shape, dtype=torch.long)
  kl_ids = torch.ones(other.mask.shape, dtype=torch.long)
  loss = trainer._compute_loss(
    lambda input_ids, **_: trl_outputs(
      mismatched if input_ids[0, 0] else leaf
    ),
    {
      "input_ids": ids, "attention_mask": ids + 1,
      "completion_mask": torch.tensor(own.mask),
      "KL_input_ids": kl_ids, "KL_attention_mask": kl_ids,
      "KL_completion_mask": torch.tensor(other.mask),
      "label": torch.tensor(desirable),
      "ref_logps": tensor(own.reference, x64).sum(1),
      "ref_KL_logps": tensor(other.reference, x64).sum(1),
    },
    return_outputs=False,
  )  # fmt: skip
  loss.backward()

  with jax.enable_x64(x64):
    ours = losses.make(name, **options)

    def objective(logps):
      out = ours(
        policy_logps=logps.sum(axis=1),
        reference_logps=array(own.reference, x64).sum(axis=1),
        policy_kl_logps=array(other.policy, x64).sum(axis=1),
        reference_kl_logps=array(other.reference, x64).sum(axis=1),
        desirable=desirable,
      )
      return losses.reduce(out)["loss"].mean(), out

    (value, out), grad = jax.value_and_grad(objective, has_aux=True)(
      array(own.policy, x64)
    )
    assert value.dtype == grad.dtype == (np.float64 if x64 else np.float32)
  rtol = tolerance(x64, edge)
  check(value, loss.item(), rtol)
  check(grad, leaf.grad, rtol)
  logged = trl_metrics(trainer)
  check_metrics(out, logged, rtol)
  if name == "kto":
    size = np.abs((other.policy - other.reference).sum(axis=1)).max()
    check(out.metrics["kl"], logged["kl"], rtol, size)
