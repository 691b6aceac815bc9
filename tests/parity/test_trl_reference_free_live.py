"""The losses of TRL's CPO, ORPO and TPO trainers against their own code, on
logits drawn anew at each run.

Log-probs, means and likelihoods are TRL's own, from these logits; gradients are
by logits. TRL's likelihood term is a mean over all tokens of the batch, where
`cpo`, `cpo_simpo`, `tpo`, `tpo_l` and `orpo` by design let each example count
once: that term is exchanged for `sft`'s, which is TRL's, except for responses
of one length, where both are the same. By design, too, `logps/*` are sums here,
where these trainers log means if their loss takes means.
"""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
  draw_mask,
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

SIDES = ("chosen", "rejected", "gold")
VOCABULARY = 11
AVERAGE = {"hinge": {}, "ipo": {"average": "tokens"}}
both_lengths = pytest.mark.parametrize(
  "equal", [False, True], ids=["lengths", "equal"]
)


class Batch(NamedTuple):
  """Padded rows: all chosen, all rejected, and all gold ones if there are."""

  logits: np.ndarray  # f64[N T V]
  ids: np.ndarray  # i64[N T]
  mask: np.ndarray  # i64[N T], response tokens


def _draw(rng, rows, edge, equal=False):
  """Logits of scale 1; at the `edge` also of 300, and ones that leave nearly
  no doubt."""
  mask = draw_mask(rng, rows, edge)
  if equal:
    mask[:] = mask[0]
  ids = rng.integers(0, VOCABULARY, mask.shape)
  logits = rng.normal(size=(*mask.shape, VOCABULARY))
  if edge:
    kinds = np.resize(["300", "sure", "1", "1"], rows)
    rng.shuffle(kinds)
    logits[kinds == "300"] *= 300
    right = np.roll(ids, -1, axis=1)[..., None] == np.arange(VOCABULARY)
    logits += 12.0 * right * (kinds == "sure")[:, None, None]
  return Batch(logits, ids, mask)


def _rtol(x64, edge):
  """In float32 the rounding of summed log-probs counts too, times beta."""
  return tolerance(x64, edge) if x64 or edge else 1e-4


def _cpo_trainer(cls, batch, x64, **fields):
  """TRL's loss, its gradient by logits, and what it returns to be logged."""
  trainer = trl_trainer(
    cls, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **fields
  )
  leaf = tensor(batch.logits, x64, requires_grad=True)
  ids, mask = torch.tensor(batch.ids), torch.tensor(batch.mask)
  columns = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "labels": torch.where(mask == 1, ids, -100),
  }
  given = {}
  for name, column in columns.items():
    for side, x in zip(SIDES, column.chunk(2)):
      given[f"{side}_{name}"] = x
  loss, metrics = trainer.get_batch_loss_metrics(
    lambda *_, **__: types.SimpleNamespace(logits=leaf), given
  )
  loss.backward()
  return loss.item(), leaf.grad, metrics


def _differentiate(loss, batch, x64, likelihood="response"):
  """Our loss, gradient by logits, and output with TRL's likelihood in it.

  Args:
    likelihood: "response" or "all" tokens to take the mean over all of, or
      "own", that of the loss as it is.
  """
  rows = 3 if "policy_gold_logps" in loss.needs else 2
  (term,) = [t for t in loss.terms if t.name != "sft"]
  options = dict(term.options)
  weight = options.get("alpha", 1.0)

  with jax.enable_x64(x64):

    def objective(logits):
      each = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), batch.ids[:, 1:, None], axis=2
      )[..., 0]
      sums = (each * batch.mask[:, 1:]).sum(axis=1)
      lengths = array(batch.mask.sum(axis=1), x64)
      inputs = {}
      for side, total, length in zip(
        SIDES, jnp.split(sums, rows), jnp.split(lengths, rows)
      ):
        inputs[f"policy_{side}_logps"] = total
        inputs[f"{side}_lengths"] = length
        if loss.needs_reference:
          inputs[f"reference_{side}_logps"] = jnp.zeros_like(total)
      out = loss(**inputs)
      value = losses.reduce(out)["loss"].mean()
      if likelihood != "own" and "nll_loss" in out.metrics:
        nll = out.metrics["nll_loss"]
        good = "gold" if rows == 3 else "chosen"
        taken = inputs[f"policy_{good}_logps"], inputs[f"{good}_lengths"]
        if likelihood == "all":
          part = each[: len(nll)]
          taken = part.sum(axis=1), jnp.full(len(nll), part.shape[1])
        mean = losses.reduce(losses.sft(*taken))["loss"].mean()
        value += weight * (mean - nll.mean())
        out.metrics["nll_loss"] = jnp.broadcast_to(mean, nll.shape)
      return value, out

    (value, out), grad = jax.value_and_grad(objective, has_aux=True)(
      array(batch.logits, x64)
    )
    assert value.dtype == grad.dtype == (np.float64 if x64 else np.float32)
    return value, grad, out


def _compare(ours, theirs, batch, rtol, *, means=False, where=None, keys=()):
  """`means`: TRL logged log-probs a token. `where`: pairs to compare."""
  value, grad, out = ours
  their_value, their_grad, logged = theirs
  if where is None or where.all():
    check(value, their_value, rtol, np.abs(out.loss).mean())
  rows = None if where is None else np.tile(where, 2)
  check(grad, their_grad, rtol, where=rows)
  if where is not None and not where.all():
    _, _, logged = _without_rewards(theirs)
  if means:
    lengths = np.split(batch.mask.sum(axis=1), len(grad) // len(out.loss))
    for side, length in zip(SIDES[:2], lengths, strict=False):
      total = np.asarray(out.metrics[f"logps/{side}"])
      out.metrics[f"logps/{side}"] = total / length.astype(total.dtype)
  check_metrics(out, logged, rtol, keys)


def _without_rewards(theirs):
  value, grad, logged = theirs
  return value, grad, {k: x for k, x in logged.items() if "rewards" not in k}


@both_lengths
@random_and_edge
@both_precisions
@pytest.mark.parametrize("name", ["cpo", "cpo_simpo", "simpo"])
def test_cpo_and_simpo_are_trls(rng, name, x64, edge, equal):
  from trl.experimental.cpo import CPOTrainer

  options = {
    "beta": float(10 ** rng.uniform(-1.5, 1)),
    "label_smoothing": float(rng.uniform(0, 0.4)),
  }
  alpha = 0.0 if name == "simpo" else float(rng.uniform(0.1, 2))
  gamma = float(rng.uniform(0, 2))
  batch = _draw(rng, 2 * PAIRS, edge, equal)
  theirs = _cpo_trainer(
    CPOTrainer, batch, x64, alpha=0.0, cpo_alpha=alpha, simpo_gamma=gamma,
    loss_type="sigmoid" if name == "cpo" else "simpo", **options,
  )  # fmt: skip
  if name != "simpo":
    options["alpha"] = alpha
  if name != "cpo":
    options["gamma"] = gamma
  loss = losses.make(name, **options)
  ours = _differentiate(loss, batch, x64, "own" if equal else "response")
  rtol = _rtol(x64, edge)
  keys = ["nll_loss"]
  _compare(ours, theirs, batch, rtol, means=name != "cpo", keys=keys)


@random_and_edge
@both_precisions
@pytest.mark.parametrize("name", ["hinge", "ipo"])
def test_cpos_hinge_and_ipo_are_ours_without_a_reference(rng, name, x64, edge):
  """By design the rewards of ipo are sums here, of means in this trainer."""
  from trl.experimental.cpo import CPOTrainer

  beta, alpha = float(10 ** rng.uniform(-2, 0)), float(rng.uniform(0.1, 2))
  batch = _draw(rng, 2 * PAIRS, edge)
  theirs = _cpo_trainer(
    CPOTrainer, batch, x64, alpha=0.0, cpo_alpha=alpha, loss_type=name,
    beta=beta, label_smoothing=0.0,
  )  # fmt: skip
  first = losses.make(name, beta=beta, **AVERAGE[name])
  loss = losses.mix((1.0, first), (alpha, losses.make("sft")))
  ours = _differentiate(loss, batch, x64)
  ipo = name == "ipo"
  if ipo:
    theirs = _without_rewards(theirs)
  _compare(ours, theirs, batch, _rtol(x64, edge), means=ipo)


@random_and_edge
@both_precisions
def test_alphapo_is_trls(rng, x64, edge):
  """By design the exponent ends at 80 here; in TRL the probability underflows
  below e^-87 in float32 and e^-708 in float64. Pairs beyond are only finite."""
  from trl.experimental.cpo import CPOTrainer

  alpha = float(rng.choice([-1, 1]) * rng.uniform(0.1, 0.9))
  beta, gamma = float(10 ** rng.uniform(-1, 0.5)), float(rng.uniform(0, 2))
  batch = _draw(rng, 2 * PAIRS, edge)
  theirs = _cpo_trainer(
    CPOTrainer, batch, x64, alpha=alpha, cpo_alpha=0.0, simpo_gamma=gamma,
    loss_type="simpo", beta=beta, label_smoothing=0.0,
  )  # fmt: skip
  loss = losses.make("alphapo", beta=beta, gamma=gamma, alpha=alpha)
  ours = _differentiate(loss, batch, x64)
  lengths = batch.mask.sum(axis=1)
  summed = np.concatenate([ours[2].metrics[f"logps/{s}"] for s in SIDES[:2]])
  means = summed / lengths
  within = (means > (-700 if x64 else -85)) & (-alpha * means < 80)
  within = within.reshape(2, -1).all(axis=0)
  # The power of a probability of 1e-30 has a relative error of 1e-5.
  rtol = _rtol(x64, edge)
  _compare(ours, theirs, batch, rtol, means=True, where=within)


@pytest.mark.parametrize(
  ("x64", "edge"),
  [(True, False), (False, False), (True, True)],
  ids=["float64-random", "float32-random", "float64-edge"],
)
def test_orpo_is_trls(rng, x64, edge):
  """By design the likelihood is of the response here and in TRL also of the
  prompt: it is exchanged. TRL computes the odds in float32 alone, and they are
  infinite in TRL where a response is certain; there float32 logits decide
  nothing, see the next test instead."""
  from trl.experimental.orpo import ORPOTrainer

  lam = float(rng.uniform(0.05, 1))
  batch = _draw(rng, 2 * PAIRS, edge)
  theirs = _cpo_trainer(ORPOTrainer, batch, x64, beta=lam)
  ours = _differentiate(losses.make("orpo", lam=lam), batch, x64, "all")
  rtol = 1e-3 if edge else 1e-4
  keys = ["nll_loss", "log_odds_ratio", "log_odds_chosen"]
  _compare(ours, theirs, batch, rtol, means=True, keys=keys)


@random_and_edge
def test_orpos_odds_ratio_of_means_is_trls(rng, edge):
  from trl.experimental.orpo import ORPOTrainer

  lam = float(rng.uniform(0.05, 1))
  lengths = rng.integers(1, 50, (2, PAIRS)).astype(np.float32)
  low, high = (-6, 4) if edge else (-1, 1)
  means = -(10.0 ** rng.uniform(low, high, (2, PAIRS))).astype(np.float32)
  trainer = trl_trainer(ORPOTrainer, beta=lam)
  leaf = tensor(means, False, requires_grad=True)
  theirs = -trainer.odds_ratio_loss(leaf[0], leaf[1])[0].mean()
  theirs.backward()

  def objective(means):
    out = losses.orpo(*(means * lengths), *lengths, lam=lam)
    return (out.loss - out.metrics["nll_loss"]).mean()

  value, grad = jax.value_and_grad(objective)(jnp.asarray(means))
  rtol = tolerance(False, edge, 1e-4)
  check(value, theirs.item(), rtol)
  check(grad, leaf.grad, rtol)


def _tpo(batch, x64, **fields):
  """TRL's loss, its gradient by logits, and what it logged."""
  from trl.experimental.tpo import TPOTrainer

  trainer = trl_trainer(TPOTrainer, **fields)
  leaf = tensor(batch.logits, x64, requires_grad=True)
  ids = torch.tensor(batch.ids)
  loss = trainer._compute_loss(
    lambda **_: types.SimpleNamespace(logits=leaf),
    {
      "input_ids": ids, "attention_mask": torch.ones_like(ids),
      "completion_mask": torch.tensor(batch.mask),
    },
    return_outputs=False,
  )  # fmt: skip
  loss.backward()
  return loss.item(), leaf.grad, trl_metrics(trainer)


@both_lengths
@random_and_edge
@both_precisions
@pytest.mark.parametrize("name", ["tpo", "tpo_l"])
def test_tpo_is_trls(rng, name, x64, edge, equal):
  options = {
    "beta": float(10 ** rng.uniform(-2, 1)),
    "label_smoothing": float(rng.uniform(0, 0.4)),
  }
  alpha, gamma = float(rng.uniform(0.1, 2)), float(rng.uniform(0, 2))
  batch = _draw(rng, 3 * PAIRS, edge, equal)
  theirs = _tpo(
    batch, x64, tpo_alpha=alpha, tpo_l_gamma=gamma,
    loss_type="sigmoid" if name == "tpo" else "tpo-l", **options,
  )  # fmt: skip
  if name == "tpo_l":
    options["gamma"] = gamma
  loss = losses.make(name, alpha=alpha, **options)
  ours = _differentiate(loss, batch, x64, "own" if equal else "response")
  _compare(ours, theirs, batch, _rtol(x64, edge), means=name == "tpo_l")


@random_and_edge
@both_precisions
@pytest.mark.parametrize("name", ["hinge", "ipo"])
def test_tpos_hinge_and_ipo_are_ours_without_a_reference(rng, name, x64, edge):
  """By design the rewards of ipo are sums here, of means in this trainer. The
  likelihood is that of the two others."""
  beta = float(10 ** rng.uniform(-2, 0))
  batch = _draw(rng, 2 * PAIRS, edge)
  fields = {"tpo_alpha": 0.0, "loss_type": name, "beta": beta}
  theirs = _tpo(batch, x64, **fields)
  loss = losses.make(name, beta=beta, **AVERAGE[name])
  ours = _differentiate(loss, batch, x64)
  ipo = name == "ipo"
  if ipo:
    theirs = _without_rewards(theirs)
  _compare(ours, theirs, batch, _rtol(x64, edge), means=ipo)
