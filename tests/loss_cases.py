"""Every loss as the tests run it: settings, random inputs, compiled forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

NAMES = losses.names()
# Every registered loss at its defaults; then other settings; then what is put
# together. A loss registered later is here from that day.
CASES = {name: losses.make(name) for name in NAMES}
_OTHERS = [
  ("dpo", {"beta": 0.7, "label_smoothing": 0.2}),
  ("robust", {"beta": 0.3, "label_smoothing": 0.4}),
  ("hinge", {"beta": 0.5}),
  ("ipo", {"beta": 0.3, "average": "tokens"}),
  ("exo", {"beta": 0.4, "label_smoothing": 0.3}),
  ("aot", {"beta": 0.3, "label_smoothing": 0.1}),
  ("aot_unpaired", {"beta": 0.3}),
  ("discopop", {"beta": 0.3, "tau": 1.5}),
  ("dpop", {"beta": 0.2, "lam": 0.7}),
  ("r_dpo", {"beta": 0.2, "alpha": 0.3}),
  ("sppo", {"beta": 0.2}),
  ("kto", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6}),
  ("apo_zero_unpaired", {"beta": 0.4, "desirable_weight": 1.3}),
  ("bco", {"beta": 0.3, "shift": "pooled"}),
  ("orpo", {"lam": 1.5}),
  ("simpo", {"beta": 3.0, "gamma": 1.0, "label_smoothing": 0.1}),
  ("cpo", {"beta": 0.3, "alpha": 0.2, "label_smoothing": 0.1}),
  ("alphapo", {"alpha": -0.5}),
  ("alphapo", {"alpha": 0.0}),
  ("slic", {"delta": 3.0, "lam": 0.5}),
  ("tpo", {"beta": 0.4, "alpha": 0.3, "label_smoothing": 0.1}),
  ("reward", {"centering": 0.01}),
  ("dpo", {"beta": 0.3, "divergence": "forward_kl"}),
  ("dpo", {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 0.3}),
  ("dpo", {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 2.0}),
  ("sigmoid_norm", {"divergence": "js"}),
  ("exo", {"divergence": "js", "label_smoothing": 0.01}),
  ("ipo", {"ld_alpha": 0.4}),
  ("apo_zero", {"ld_alpha": 0.0, "beta": 0.3}),
  ("simpo", {"wpo": True}),
  ("0.5*dpo", {}),
  ("dpo+0.3*sft", {"beta": 0.2}),
  ("plackett_luce+0.2*sft", {}),
  ("0.8*dpo+0.2*bco_pair+sft", {"beta": 0.3}),
  ("dpo+0.5*ipo+sft", {"wpo": True, "ld_alpha": 0.5, "divergence": "js"}),
]
CASES |= {f"{n}{list(o)}": losses.make(n, **o) for n, o in _OTHERS}
every_loss = pytest.mark.parametrize(
  "loss", list(CASES.values()), ids=list(CASES)
)
every_pair = pytest.mark.parametrize(
  "loss",
  [x for x in CASES.values() if x.kind == "paired"],
  ids=[n for n, x in CASES.items() if x.kind == "paired"],
)


def random_inputs(n=7, seed=0):
  """Every array a loss can ask for, float64 numpy; lengths 1 to 30."""
  rng = np.random.default_rng(seed)
  out = {}
  for key in losses.INPUTS:
    shape = (n, 3) if "ranked" in key else n
    if key.endswith("_lengths"):
      out[key] = rng.integers(1, 30, shape).astype(np.float64)
    elif key.endswith("_logps"):
      out[key] = -rng.gamma(2.0, 4.0, shape)
    elif key.endswith(("_scores", "_confidence")):
      out[key] = rng.normal(size=shape)
    elif key in ("preference_margins", "density_ratios"):
      out[key] = rng.uniform(0.5, 2.0, shape)
  for key in out:
    if "_tail_" in key:  # a part of the whole
      out[key] = rng.uniform(0, 0.9, n) * out[key.replace("_tail", "")]
  # A token has a chance well below 1: odds of a certain one are infinite.
  for side in ("chosen", "rejected", "gold"):
    most = -0.05 * out[f"{side}_lengths"]
    key = f"policy_{side}_logps"
    out[key] = np.minimum(out[key], most)
  out["ranked_lengths"][-1, -1] = 0  # a ranking of two among those of three
  out["desirable"] = np.arange(n) % 3 != 0
  out["weights"] = np.ones(n)
  return out


def as_jax(inputs, dtype=jnp.float32):
  return {
    key: jnp.asarray(x, bool if key == "desirable" else dtype)
    for key, x in inputs.items()
  }


def trained_keys(loss):
  """The inputs that depend on what is trained."""
  return [
    key
    for key in loss.needs
    if key.startswith("policy_") or key.endswith("_scores")
  ]


# Most programs here run once or twice; optimising them would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def compiled(loss):
  return quick_jit(lambda x: loss(**x))


@functools.cache
def summed(loss):
  return quick_jit(lambda x: losses.reduce(loss(**x), x["weights"]))


@functools.cache
def value_and_grad(loss):
  """Compiled once: (trained arrays, the rest) -> (mean loss, output),
  gradients."""

  def mean(trained, rest):
    inputs = {**rest, **trained}
    out = loss(**inputs)
    return losses.reduce(out, inputs["weights"])["loss"].mean(), out

  return quick_jit(jax.value_and_grad(mean, has_aux=True))


def differentiate(loss, inputs):
  """Mean loss, and its gradients by what is trained."""
  (value, _), grads = everything(loss, inputs)
  return value, grads


def everything(loss, inputs):
  trained = {key: inputs[key] for key in trained_keys(loss)}
  return value_and_grad(loss)(trained, inputs)
