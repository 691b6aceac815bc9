"""Every loss at log-probs of ten thousand nats: float32 and bfloat16 inputs
give what float64 gives, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import CASES, NAMES, everything, random_inputs

# What is registered, at its defaults, and of the rest what is put together.
WHAT = {name: CASES[name] for name in NAMES} | {
  name: loss for name, loss in CASES.items() if "+" in name
}
N = 512


def extremes(loss, dtype):
  """Inputs whose log-probs are 0, tiny, usual or of 1e4 nats either way, in all
  mixtures, as float64 numpy; they are numbers of `dtype`."""
  rng = np.random.default_rng(0)
  x = {
    k: v for k, v in random_inputs(N).items() if k in (*loss.needs, "weights")
  }
  for key, value in x.items():
    if key.endswith(("_logps", "_scores")):
      # Margins of 1e4 of either sign, and log-ratios of as much.
      pick = rng.choice([0.0, -1e-4, -1.0, -30.0, -1e4], size=value.shape)
      x[key] = pick * (
        1.0 if key.endswith("_logps") else rng.choice([-1, 1], value.shape)
      )
    elif key.endswith("_lengths"):
      x[key] = rng.choice([1.0, 2.0, 300.0], size=value.shape)
  for key in x:
    if key.endswith("_lengths") and "alphapo" in loss.name:
      # Beyond 30 nats a token over alpha it goes on linearly, by design: the
      # formula's own value of 1e4 nats a token is 1e133.
      x[key] = np.full(x[key].shape, 300.0)
    if key.startswith("policy_") and loss.name == "orpo":
      # The odds of a certain answer are infinite; near it is near enough.
      x[key] = np.minimum(x[key], -1e-4)
    if "_tail_" in key:
      x[key] = x[key.replace("_tail", "")] * rng.choice([0, 1.0], size=N)
  x.pop("state", None)
  return {
    k: v if k == "desirable" else np.asarray(jnp.asarray(v, dtype), np.float64)
    for k, v in x.items()
  }


def run(loss, x, dtype):
  cast = {
    k: jnp.asarray(v, bool if k == "desirable" else dtype) for k, v in x.items()
  }
  (value, out), grads = everything(loss, cast)
  return (
    np.float64(value),
    np.asarray(out.loss, np.float64),
    {k: np.asarray(g, np.float64) for k, g in grads.items()},
  )


def rounded_once(x, rng):
  """The inputs, each off by about what float32 rounds."""
  off = lambda v: v * (1 + rng.choice([-1, 0, 1], np.shape(v)) * 2.0**-23)
  return {k: off(v) if "logps" in k else v for k, v in x.items()}


@pytest.mark.parametrize("name", WHAT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_thousand_nats_are_worth_what_float64_says(name, dtype):
  """To 1e-5, or as far off as rounding each input once to float32 would be:
  a difference of two log-probs of 1e4 cannot be known better than to 1e-3."""
  loss, rng = WHAT[name], np.random.default_rng(1)
  x = extremes(loss, dtype)
  with jax.enable_x64(True):
    exact = run(loss, x, "float64")
    near = [run(loss, rounded_once(x, rng), "float64") for _ in range(12)]
  found = run(loss, x, dtype)
  shares = []

  # Which of two equal ones has a rank is not a matter of precision.
  order = np.sort if any("aot" in t.name for t in loss.terms) else np.asarray

  def check(part, rtol, atol):
    got, want = order(part(found)), order(part(exact))
    assert np.isfinite(want).all()
    spread = np.max([np.abs(order(part(one)) - want) for one in near], axis=0)
    plain = rtol * np.abs(want) + atol
    assert (np.abs(got - want) <= plain + 4 * spread).all()
    shares.append(np.mean(np.abs(got - want) <= plain))

  check(lambda r: r[0][None], 1e-5, 0)
  check(lambda r: r[1], 1e-5, 2**-22)
  # A gradient comes out in the dtype of its input.
  rtol = 1e-5 if dtype == "float32" else 2**-8
  for key in exact[2]:
    check(lambda r, key=key: r[2][key], rtol, 1e-9)
  assert min(shares[1:]) > 0.9
