"""Losses against TRL's own code, on inputs drawn anew at each run.

  pip install -r requirements-parity.txt
  pytest -m parity tests/parity

PARITY_SEED repeats a run; it is printed with a failure. TRL's `_compute_loss`
is given a model that answers with log-probs drawn here.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

from .live import WHY, rng

torch = pytest.importorskip("torch", reason=WHY)
trl = pytest.importorskip("trl", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]


def _trainer(cls, **fields):
  """A trainer without its constructor: only what the loss code reads."""
  trainer = cls.__new__(cls)
  same = lambda x: x
  trainer.accelerator = types.SimpleNamespace(
    device=torch.device("cpu"), gather=same, gather_for_metrics=same
  )
  trainer.model = types.SimpleNamespace(training=True)
  trainer.aux_loss_enabled = False
  trainer.precompute_ref_logps = True
  trainer._metrics = {"train": collections.defaultdict(list)}
  trainer._total_train_tokens, trainer._tp_size = 0, 1
  for name, value in fields.items():
    setattr(trainer, name, value)
  return trainer


def _outputs(token_logps):
  """What TRL's fused head returns, with log-probs of our choice."""
  zeros = torch.zeros_like(token_logps.detach())
  return types.SimpleNamespace(
    log_probs=token_logps, entropy=zeros, mean_logits=zeros,
    is_top1=zeros.bool(),
  )  # fmt: skip


def _draw_tokens(rng, rows, edge):
  """Token log-probs [rows T-1] of shifted positions, the completion mask
  [rows T], and lengths; `edge` adds extremes and one-token responses."""
  width = int(rng.integers(4, 40))
  starts = rng.integers(1, width, rows)
  if edge:
    starts[0] = width - 1
  mask = np.arange(width) >= starts[:, None]
  scale = rng.choice([1e-6, 1.0, 300.0], (rows, 1)) if edge else 1.0
  values = -rng.exponential(1.0, (rows, width - 1)) * scale
  return values * mask[:, 1:], mask.astype(int), mask.sum(axis=1)


def _dtypes(x64):
  """Precision of the test: numpy and torch types, tolerance."""
  if x64:
    return np.float64, torch.float64, {"rtol": 1e-9, "atol": 1e-9}
  return np.float32, torch.float32, {"rtol": 1e-5, "atol": 1e-5}


def _check(ours, theirs, value_ours, value_theirs, tolerance):
  np.testing.assert_allclose(value_ours, value_theirs, **tolerance)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("edge", [False, True], ids=["random", "edge"])
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_paired_losses(rng, name, x64, edge):
  pairs = int(rng.integers(2, 9))
  kind, torch_kind, tolerance = _dtypes(x64)
  logps, mask, lengths = _draw_tokens(rng, 2 * pairs, edge)
  reference = (logps.sum(axis=1) + rng.normal(0, 3, 2 * pairs)).astype(kind)
  logps, beta = logps.astype(kind), float(rng.uniform(0.01, 1))

  trainer = _trainer(
    trl.DPOTrainer, beta=beta, ld_alpha=None, f_divergence_type="reverse_kl",
    loss_types=[name], loss_weights=[1.0], use_weighting=False,
  )  # fmt: skip
  leaf = torch.tensor(logps, dtype=torch_kind, requires_grad=True)
  known = torch.tensor(reference, dtype=torch_kind).chunk(2)
  ids = torch.zeros(mask.shape, dtype=torch.long)
  loss = trainer._compute_loss(
    lambda **_: _outputs(leaf),
    {
      "input_ids": ids, "attention_mask": ids + 1,
      "completion_mask": torch.tensor(mask),
      "ref_chosen_logps": known[0], "ref_rejected_logps": known[1],
    },
    return_outputs=False,
  )  # fmt: skip
  loss.backward()

  with jax.enable_x64(x64):
    if name == "sigmoid":
      ours = losses.make("dpo", beta=beta)
    else:
      ours = losses.make("ipo", beta=beta, average="tokens")

    def objective(logps):
      chosen, rejected = jnp.split(logps.sum(axis=1), 2)
      out = ours(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        reference_chosen_logps=jnp.asarray(reference[:pairs]),
        reference_rejected_logps=jnp.asarray(reference[pairs:]),
        chosen_lengths=jnp.asarray(lengths[:pairs], kind),
        rejected_lengths=jnp.asarray(lengths[pairs:], kind),
      )
      return losses.reduce(out)["loss"].mean()

    value, grad = jax.value_and_grad(objective)(jnp.asarray(logps))
    assert value.dtype == kind
    _check([grad], [leaf.grad.numpy()], value, loss.item(), tolerance)


@pytest.mark.parametrize("edge", [False, True], ids=["random", "edge"])
@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("labels", ["mixed", "liked", "disliked"])
def test_kto(rng, labels, x64, edge):
  n = int(rng.integers(2, 9))
  kind, torch_kind, tolerance = _dtypes(x64)
  logps, mask, _ = _draw_tokens(rng, n, edge)
  kl_logps, kl_mask, _ = _draw_tokens(rng, n, edge)
  logps, kl_logps = logps.astype(kind), kl_logps.astype(kind)
  reference = (logps.sum(axis=1) + rng.normal(0, 3, n)).astype(kind)
  kl_reference = (kl_logps.sum(axis=1) + rng.normal(0, 3, n)).astype(kind)
  desirable = {
    "mixed": np.arange(n) % 2 == 0,
    "liked": np.ones(n, bool),
    "disliked": np.zeros(n, bool),
  }[labels]
  options = {
    "beta": float(rng.uniform(0.01, 1)),
    "desirable_weight": float(rng.uniform(0.5, 2)),
    "undesirable_weight": float(rng.uniform(0.5, 2)),
  }

  trainer = _trainer(
    trl.KTOTrainer, loss_type="kto", calculate_KL=True, **options
  )
  leaf = torch.tensor(logps, dtype=torch_kind, requires_grad=True)
  mismatched = torch.tensor(kl_logps, dtype=torch_kind)
  ids = torch.zeros(mask.shape, dtype=torch.long)
  kl_ids = torch.ones(kl_mask.shape, dtype=torch.long)
  loss = trainer._compute_loss(
    lambda input_ids, **_: _outputs(mismatched if input_ids[0, 0] else leaf),
    {
      "input_ids": ids, "attention_mask": ids + 1,
      "completion_mask": torch.tensor(mask),
      "KL_input_ids": kl_ids, "KL_attention_mask": kl_ids,
      "KL_completion_mask": torch.tensor(kl_mask),
      "label": torch.tensor(desirable),
      "ref_logps": torch.tensor(reference, dtype=torch_kind),
      "ref_KL_logps": torch.tensor(kl_reference, dtype=torch_kind),
    },
    return_outputs=False,
  )  # fmt: skip
  loss.backward()

  with jax.enable_x64(x64):
    ours = losses.make("kto", **options)

    def objective(logps):
      out = ours(
        policy_logps=logps.sum(axis=1),
        reference_logps=jnp.asarray(reference),
        policy_kl_logps=jnp.asarray(kl_logps).sum(axis=1),
        reference_kl_logps=jnp.asarray(kl_reference),
        desirable=jnp.asarray(desirable),
      )
      sums = losses.reduce(out)
      return sums["loss"].mean(), sums["kl"].mean()

    (value, kl), grad = jax.value_and_grad(objective, has_aux=True)(
      jnp.asarray(logps)
    )
    _check([grad], [leaf.grad.numpy()], value, loss.item(), tolerance)
    theirs = trainer._metrics["train"]["kl"][-1]
    np.testing.assert_allclose(kl, theirs, **tolerance)


@pytest.mark.parametrize("edge", [False, True], ids=["random", "edge"])
def test_orpo_odds_ratio(rng, edge):
  """TRL computes it in float32 alone; the NLL terms differ by design, see
  `losses.orpo`, and are left out of the comparison."""
  from trl.experimental.orpo import ORPOTrainer

  n, lam = int(rng.integers(2, 9)), float(rng.uniform(0.05, 1))
  lengths = rng.integers(1, 50, (2, n)).astype(np.float32)
  low, high = (-3, 2) if edge else (-1, 1)
  means = -(10.0 ** rng.uniform(low, high, (2, n))).astype(np.float32)

  trainer = _trainer(ORPOTrainer, beta=lam)
  leaf = torch.tensor(means, requires_grad=True)
  theirs = -trainer.odds_ratio_loss(leaf[0], leaf[1])[0].mean()
  theirs.backward()

  def objective(means):
    out = losses.orpo(*(means * lengths), *lengths, lam=lam)
    return (out.loss - out.metrics["nll_loss"]).mean()

  value, grad = jax.value_and_grad(objective)(jnp.asarray(means))
  tolerance = {"rtol": 1e-4, "atol": 1e-5} if edge else _dtypes(False)[2]
  _check([grad], [leaf.grad.numpy()], value, theirs.item(), tolerance)
