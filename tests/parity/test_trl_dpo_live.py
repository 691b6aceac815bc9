"""Every loss of TRL's DPOTrainer against its own code, drawn anew at each run.

  pip install -r requirements-parity.txt
  pytest -m parity tests/parity

PARITY_SEED repeats a run; it is printed with a failure. TRL's `_compute_loss`
is given models that answer with log-probs drawn here, and is compared in the
loss, its gradient by every token's log-prob, and the rewards and log-probs it
logs. At the edge TRL's numbers are not all finite (discopop, forward_kl): ours
must be, and are compared where TRL's are.
"""

import types

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

# TRL's names and ours.
NAMES = {
  "sigmoid": "dpo",
  "hinge": "hinge",
  "ipo": "ipo",
  "exo_pair": "exo",
  "nca_pair": "nca",
  "robust": "robust",
  "bco_pair": "bco_pair",
  "sppo_hard": "sppo",
  "aot": "aot",
  "aot_unpaired": "aot_unpaired",
  "apo_zero": "apo_zero",
  "apo_down": "apo_down",
  "discopop": "discopop",
  "sft": "sft",
  "sigmoid_norm": "sigmoid_norm",
}
DIVERGENCES = {
  "forward_kl": "forward_kl",
  "js_divergence": "js",
  "alpha_divergence": "alpha",
}
DIVERGENT = [
  ["sigmoid"], ["sigmoid_norm"], ["hinge"], ["ipo"], ["exo_pair"], ["robust"],
  ["discopop"], ["sigmoid", "sft"],
]  # fmt: skip
MIXTURES = [
  ["sigmoid", "sft"],
  ["sigmoid", "bco_pair", "sft"],
  ["apo_zero", "ipo", "hinge"],
  ["aot", "robust", "sigmoid_norm"],
  ["discopop", "nca_pair", "exo_pair"],
]
DESENSITISED = [
  [name] for name in NAMES if name not in ("sft", "sigmoid_norm")
] + MIXTURES[:2]
WEIGHTED = [
  [name]
  for name in NAMES
  if name not in ("hinge", "sft", "aot", "aot_unpaired")
] + [["sigmoid", "ipo", "apo_down"]]


def _ids(types):
  return "+".join(types)


def _draw_options(rng):
  """Hyper-parameters under TRL's names, where they differ from ours."""
  return {
    "beta": float(10 ** rng.uniform(-2, 0)),
    "label_smoothing": float(rng.uniform(0.01, 0.4)),
    "discopop_tau": float(10 ** rng.uniform(-1.5, -0.5)),
  }


def _ours(loss_types, weights, drawn, **modifiers):
  """Our loss for TRL's options."""
  values = {
    "beta": drawn["beta"],
    "tau": drawn["discopop_tau"],
    "label_smoothing": drawn["label_smoothing"],
    "average": "tokens",
  }
  parts = []
  for name in map(NAMES.get, loss_types):
    options = {k: v for k, v in values.items() if k in losses.defaults(name)}
    if name == "dpo":  # TRL takes it and ignores it
      options.pop("label_smoothing")
    if len(loss_types) == 1:
      return losses.make(name, **options, **modifiers)
    parts.append(losses.make(name, **options))
  return losses.mix(*zip(weights, parts, strict=True), **modifiers)


def _theirs(loss_types, weights, drawn, tokens, x64, **modifiers):
  """TRL's loss, its gradient by token, and what it logs."""
  trainer = trl_trainer(
    trl.DPOTrainer,
    **drawn
    | {
      "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
      "ld_alpha": None, "use_weighting": False, "precompute_ref_logps": False,
      "loss_types": loss_types, "loss_weights": weights,
    }
    | modifiers,
  )  # fmt: skip
  trainer.args = types.SimpleNamespace(
    discopop_tau=drawn["discopop_tau"], gradient_checkpointing_kwargs=None
  )
  leaf = tensor(tokens.policy, x64, requires_grad=True)
  squares = tensor(tokens.squares, x64)
  known = tensor(tokens.reference, x64)
  trainer.ref_model = lambda **_: trl_outputs(known)
  ids = torch.zeros(tokens.mask.shape, dtype=torch.long)
  loss = trainer._compute_loss(
    lambda **_: trl_outputs(leaf, squares),
    {
      "input_ids": ids, "attention_mask": ids + 1,
      "completion_mask": torch.tensor(tokens.mask),
    },
    return_outputs=False,
  )  # fmt: skip
  loss.backward()
  grad = np.where(tokens.mask[:, 1:], leaf.grad.numpy(), 0)
  return loss.item(), grad, trl_metrics(trainer)


def _differentiate(loss, tokens, x64):
  """Our loss, its gradient by token, and its output."""
  with jax.enable_x64(x64):
    mask, lengths = jnp.asarray(tokens.mask[:, 1:]), tokens.lengths
    other = jnp.asarray(np.roll(lengths, len(lengths) // 2))
    squares = array(tokens.squares, x64)

    def objective(policy):
      columns = {
        "{}_lengths": array(lengths, x64),
        "{}_confidence": losses.confidence(policy, squares, mask),
      }
      reference = array(tokens.reference, x64)
      for model, each in (("policy", policy), ("reference", reference)):
        columns[model + "_{}_logps"] = each.sum(axis=1)
        columns[model + "_{}_tail_logps"] = losses.tail_logps(each, mask, other)
      inputs = {}
      for name, column in columns.items():
        for side, x in zip(("chosen", "rejected"), jnp.split(column, 2)):
          inputs[name.format(side)] = x
      out = loss(**inputs)
      return losses.reduce(out)["loss"].mean(), out

    (value, out), grad = jax.value_and_grad(objective, has_aux=True)(
      array(tokens.policy, x64)
    )
    assert value.dtype == grad.dtype == (np.float64 if x64 else np.float32)
    return value, grad * mask, out


def _compare(ours, theirs, rtol, where=None):
  """`where`: pairs on which both are meant to be the same; None is all."""
  value, grad, out = ours
  their_value, their_grad, logged = theirs
  if where is None or where.all():
    check(value, their_value, rtol, np.abs(out.loss).mean())
  rows = None if where is None else np.tile(where, 2)
  check(grad, their_grad, rtol, where=rows)
  check_metrics(out, logged, rtol)


def _rtol(loss_types, x64, edge):
  rtol = tolerance(x64, edge)
  if "discopop" in loss_types:  # it divides rewards by tau
    rtol *= 10
  # TRL makes epsilon a float32 tensor.
  return max(rtol, 1e-6) if "exo_pair" in loss_types else rtol


def test_no_loss_of_trl_is_left_out(rng):
  with pytest.raises(ValueError, match="Unknown loss type") as error:
    tokens = draw_tokens(rng, 2 * PAIRS, False)
    _theirs(["?"], [1.0], _draw_options(rng), tokens, True)
  known = str(error.value).split("one of")[1]
  assert {name.strip("[] '") for name in known.split(",")} == NAMES.keys()


@random_and_edge
@both_precisions
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_has_trls_value_gradient_and_metrics(rng, name, x64, edge):
  """By design: sft logs no rewards here, and a mean over tokens of its own;
  aot's losses are at their pairs here and sorted in TRL, so the means count."""
  drawn = _draw_options(rng)
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  _compare(
    _differentiate(_ours([name], [1.0], drawn), tokens, x64),
    _theirs([name], [1.0], drawn, tokens, x64),
    _rtol([name], x64, edge),
  )


@random_and_edge
@both_precisions
@pytest.mark.parametrize("loss_types", MIXTURES, ids=_ids)
def test_mixtures_are_trls_lists_of_losses(rng, loss_types, x64, edge):
  drawn = _draw_options(rng)
  weights = [float(w) for w in rng.uniform(0.1, 2, len(loss_types))]
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  loss = _ours(loss_types, weights, drawn)
  _compare(
    _differentiate(loss, tokens, x64),
    _theirs(loss_types, weights, drawn, tokens, x64),
    _rtol(loss_types, x64, edge),
  )


def test_a_mixture_by_its_name_is_trls_list_of_losses(rng):
  drawn = _draw_options(rng)
  tokens = draw_tokens(rng, 2 * PAIRS, False)
  loss = losses.make("0.8*dpo + 0.2*bco_pair + sft", beta=drawn["beta"])
  names = ["sigmoid", "bco_pair", "sft"]
  _compare(
    _differentiate(loss, tokens, True),
    _theirs(names, [0.8, 0.2, 1.0], drawn, tokens, True),
    tolerance(True, False),
  )


@random_and_edge
@both_precisions
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_types", DIVERGENT, ids=_ids)
def test_divergences_are_trls(rng, loss_types, divergence, x64, edge):
  """By design powers of u go on linearly beyond e^30 in float32 and e^300 in
  float64, where TRL has the power up to e^80 (alpha) or up to infinity; pairs
  beyond are only finite here. TRL's alpha has no float64."""
  alpha = float(rng.choice([rng.uniform(-1, 0.8), rng.uniform(1.2, 2)]))
  if divergence == "alpha_divergence" and x64:
    alpha = 1.0  # reverse_kl, the one that TRL has in float64
  drawn = _draw_options(rng)
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  modifiers = {"divergence": DIVERGENCES[divergence]}
  if divergence == "alpha_divergence":
    modifiers["divergence_alpha"] = alpha
  weights = [1.0, 0.5][: len(loss_types)]
  loss = _ours(loss_types, weights, drawn, **modifiers)
  logratios = (tokens.policy - tokens.reference).sum(axis=1)
  power = {"forward_kl": -1.0, "js_divergence": 0.0}.get(divergence, alpha - 1)
  within = power * logratios <= (300 if x64 else 30)
  _compare(
    _differentiate(loss, tokens, x64),
    _theirs(
      loss_types, weights, drawn, tokens, x64,
      f_divergence_type=divergence, f_alpha_divergence_coef=alpha,
    ),
    _rtol(loss_types, x64, edge),
    where=within.reshape(2, -1).all(axis=0),
  )  # fmt: skip


@random_and_edge
@both_precisions
@pytest.mark.parametrize("loss_types", DESENSITISED, ids=_ids)
def test_ld_is_trls_on_policy_and_reference(rng, loss_types, x64, edge):
  """By design `logps/*` are of whole responses here, and in TRL what is
  compared; and sigmoid_norm, which divides by length, is refused with it."""
  drawn, alpha = _draw_options(rng), float(rng.uniform(0, 0.95))
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  weights = [1.0] * len(loss_types)
  loss = _ours(loss_types, weights, drawn, ld_alpha=alpha)
  _compare(
    _differentiate(loss, tokens, x64),
    _whole(_theirs(loss_types, weights, drawn, tokens, x64, ld_alpha=alpha)),
    _rtol(loss_types, x64, edge),
  )


def _whole(theirs):
  """Without the log-probs that TRL logs."""
  value, grad, logged = theirs
  return value, grad, {k: x for k, x in logged.items() if "logps" not in k}


@random_and_edge
@both_precisions
@pytest.mark.parametrize("loss_types", WEIGHTED, ids=_ids)
def test_wpo_is_trls_weighting(rng, loss_types, x64, edge):
  """TRL refuses aot, as we do, and its own hinge and sft raise under weights (a
  product in place on what autograd keeps, or on an expanded tensor)."""
  drawn = _draw_options(rng)
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  weights = [0.7] * len(loss_types) if len(loss_types) > 1 else [1.0]
  loss = _ours(loss_types, weights, drawn, wpo=True)
  _compare(
    _differentiate(loss, tokens, x64),
    _theirs(loss_types, weights, drawn, tokens, x64, use_weighting=True),
    _rtol(loss_types, x64, edge),
  )


@random_and_edge
@both_precisions
def test_all_modifiers_at_once_are_trls(rng, x64, edge):
  drawn, alpha = _draw_options(rng), float(rng.uniform(0, 0.95))
  tokens = draw_tokens(rng, 2 * PAIRS, edge)
  names, weights = ["sigmoid", "robust", "discopop"], [0.5, 1.5, 0.25]
  loss = _ours(names, weights, drawn, ld_alpha=alpha, wpo=True, divergence="js")
  theirs = _theirs(
    names, weights, drawn, tokens, x64, ld_alpha=alpha, use_weighting=True,
    f_divergence_type="js_divergence",
  )  # fmt: skip
  ours = _differentiate(loss, tokens, x64)
  _compare(ours, _whole(theirs), _rtol(names, x64, edge))


@both_precisions
def test_a_reference_that_follows_the_policy_is_trls(rng, x64):
  """TR-DPO: the callback after every step, over several steps."""
  from accelerate import Accelerator
  from trl.trainer.callbacks import SyncRefModelCallback

  Accelerator(cpu=True)  # the callback asks its state
  mixup, every = float(rng.uniform(0.1, 1)), int(rng.integers(1, 4))
  kind = torch.float64 if x64 else torch.float32
  policy, reference = (torch.nn.Linear(3, 5, dtype=kind) for _ in range(2))
  with jax.enable_x64(x64):
    ours = [array(p.detach(), x64) for p in reference.parameters()]
    args = types.SimpleNamespace(
      ref_model_sync_steps=every, ref_model_mixup_alpha=mixup
    )
    callback = SyncRefModelCallback(reference, None)
    for step in range(1, 7):
      with torch.no_grad():
        for p in policy.parameters():
          p.copy_(tensor(rng.normal(size=p.shape), x64))
      state = types.SimpleNamespace(global_step=step)
      callback.on_step_end(args, state, None, model=policy)
      if step % every == 0:
        now = [array(p.detach(), x64) for p in policy.parameters()]
        ours = losses.mix_reference(ours, now, mixup)
      for a, b in zip(ours, reference.parameters(), strict=True):
        check(a, b.detach(), tolerance(x64, False))
