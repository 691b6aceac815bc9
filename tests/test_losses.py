"""Every registered loss: arithmetic, limits, gradients, and the registry."""

import functools
import itertools
import math
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import base

NAMES = losses.names()
# Every registered loss at its defaults, and ours at other settings too.
CASES = [(name, {}) for name in NAMES] + [
  ("dpo", {"beta": 0.7, "label_smoothing": 0.2}),
  ("ipo", {"beta": 0.3, "average": "tokens"}),
  ("kto", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6}),
  ("orpo", {"lam": 1.5}),
]
every_loss = pytest.mark.parametrize(
  ("name", "options"), CASES, ids=[f"{n}{list(o)}" for n, o in CASES]
)
LOG2 = math.log(2)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def random_inputs(n=7, seed=0):
  """Every input a loss can ask for, float64 numpy; lengths 1 to 30."""
  rng = np.random.default_rng(seed)
  lengths = {
    "chosen_lengths": rng.integers(1, 30, n),
    "rejected_lengths": rng.integers(1, 30, n),
  }
  out = {
    key: -rng.gamma(2.0, 0.6, n) * lengths["chosen_lengths"]
    for key in base.INPUTS
    if key.endswith("logps")
  }
  out |= {key: x.astype(np.float64) for key, x in lengths.items()}
  out["desirable"] = np.arange(n) % 3 != 0
  out["weights"] = np.ones(n)
  return out


def as_jax(inputs, dtype=jnp.float32):
  return {
    key: jnp.asarray(x, bool if key == "desirable" else dtype)
    for key, x in inputs.items()
  }


def policy_keys(loss):
  return [key for key in loss.needs if key.startswith("policy_")]


def mean_loss(loss, inputs):
  return losses.reduce(loss(**inputs), inputs["weights"])["loss"].mean()


# Most programs here run once or twice; optimising them would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.lru_cache
def compiled(loss):
  return quick_jit(lambda x: loss(**x))


@functools.lru_cache
def summed(loss):
  return quick_jit(lambda x: losses.reduce(loss(**x), x["weights"]))


@functools.lru_cache
def value_and_grad(loss):
  """Compiled once a loss: (policy arrays, the rest) -> mean loss, gradients."""

  def mean(policy, rest):
    return mean_loss(loss, {**rest, **policy})

  return quick_jit(jax.value_and_grad(mean))


def differentiate(loss, inputs):
  policy = {key: inputs[key] for key in policy_keys(loss)}
  return value_and_grad(loss)(policy, inputs)


# Values by arithmetic


def test_sft_is_the_mean_over_all_tokens_of_the_batch():
  # 6 nats over 3 tokens, 8 over 1: 2 and 8 a token, 14 over 4 together.
  out = losses.sft(jnp.array([-6.0, -8.0]), jnp.array([3.0, 1.0]))
  np.testing.assert_allclose(out.loss, [2, 8])
  assert losses.reduce(out)["loss"].mean() == (6 + 8) / (3 + 1)


def test_dpo_of_log_ratios_2_and_minus_1():
  out = losses.dpo(*map(jnp.float32, (-3, -6, -5, -5)), beta=0.5)
  margin = 0.5 * (2 - -1)
  np.testing.assert_allclose(
    out.loss, math.log(1 + math.exp(-margin)), rtol=1e-6
  )
  expected = {
    "rewards/chosen": 0.5 * 2,
    "rewards/rejected": 0.5 * -1,
    "rewards/margins": margin,
    "rewards/accuracies": 1,
    "logps/chosen": -3,
    "logps/rejected": -6,
  }
  assert {k: float(v) for k, v in out.metrics.items()} == expected


def test_smoothed_dpo_is_the_cross_entropy_with_flipped_labels():
  out = losses.dpo(
    *map(jnp.float32, (-3, -6, -5, -5)), beta=0.5, label_smoothing=0.25
  )
  right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
  np.testing.assert_allclose(out.loss, 0.75 * right + 0.25 * wrong, rtol=1e-6)


def test_smoothed_dpo_is_least_at_the_log_odds_of_a_right_label():
  best = math.log((1 - 0.2) / 0.2)  # margin, at beta 1

  def slope(chosen):
    f = lambda x: losses.dpo(x, 0.0, 0.0, 0.0, beta=1, label_smoothing=0.2).loss
    return float(jax.grad(f)(chosen))

  assert abs(slope(best)) < 1e-6
  assert slope(best - 0.1) < 0 < slope(best + 0.1)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_at_the_reference_is_log_2_with_a_gradient_of_half_beta(beta):
  loss = lambda w: losses.dpo(w, -9.0, -7.0, -9.0, beta=beta).loss
  value, slope = jax.value_and_grad(loss)(jnp.float32(-7))
  assert value == np.float32(LOG2)
  np.testing.assert_allclose(slope, -beta / 2, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.5])
def test_swapping_a_pair_swaps_the_smoothing_of_its_labels(smoothing):
  x = as_jax(random_inputs())
  w, y, rw, ry = (x[k] for k in losses.make("dpo").needs)
  plain, swapped = losses.dpo(w, y, rw, ry).loss, losses.dpo(y, w, ry, rw).loss
  smooth = losses.dpo(w, y, rw, ry, label_smoothing=smoothing).loss
  mirror = losses.dpo(y, w, ry, rw, label_smoothing=smoothing).loss
  np.testing.assert_allclose(
    smooth, (1 - smoothing) * plain + smoothing * swapped, rtol=1e-6
  )
  np.testing.assert_allclose(smooth + mirror, plain + swapped, rtol=1e-6)
  if smoothing == 0.5:  # a coin's labels: no side is preferred
    np.testing.assert_allclose(smooth, mirror, rtol=1e-6)


def test_ipo_squares_the_distance_of_the_gap_to_half_over_beta():
  args = map(jnp.float32, (-2, -6, -5, -5, 3, 2))  # h_w = 3, h_l = -1
  out = losses.ipo(*args, beta=0.25)
  assert out.loss == (3 - -1 - 1 / (2 * 0.25)) ** 2
  assert out.metrics["rewards/margins"] == 0.25 * (3 - -1)


def test_ipo_per_token_divides_each_side_by_its_own_length():
  args = map(jnp.float32, (-2, -6, -5, -5, 3, 2))
  out = losses.ipo(*args, beta=0.25, average="tokens")
  assert out.loss == (3 / 3 - -1 / 2 - 1 / (2 * 0.25)) ** 2
  assert out.metrics["rewards/chosen"] == 0.25 * 3  # not normalised, as in TRL


def test_ipo_has_no_slope_at_its_target_gap():
  loss = lambda w: losses.ipo(w, 0.0, 0.0, 0.0, beta=0.25).loss
  assert jax.grad(loss)(jnp.float32(2)) == 0
  assert jax.grad(loss)(jnp.float32(3)) == 2 * (3 - 2)


KTO = {
  "policy_logps": jnp.array([-1.0, -7.0]),
  "reference_logps": jnp.array([-5.0, -5.0]),  # h = 4 and -2
  "policy_kl_logps": jnp.array([-4.0, -2.0]),
  "reference_kl_logps": jnp.array([-5.0, -5.0]),  # mean of 1 and 3: z0 = 2
  "desirable": jnp.array([True, False]),
}


def test_kto_measures_log_ratios_from_the_kl_with_beta_on_both():
  out = losses.kto(**KTO, beta=0.5, desirable_weight=2, undesirable_weight=3)
  expected = [
    2 * (1 - sigmoid(0.5 * (4 - 2))),
    3 * (1 - sigmoid(0.5 * (2 - -2))),
  ]
  np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
  sums = losses.reduce(out)
  # The mean is over examples, not over class weights.
  np.testing.assert_allclose(sums["loss"].mean(), sum(expected) / 2, rtol=1e-6)
  means = {k: float(v.mean()) for k, v in sums.items() if k != "loss"}
  assert means == {
    "rewards/chosen": 0.5 * 4,
    "rewards/rejected": 0.5 * -2,
    "logps/chosen": -1,
    "logps/rejected": -7,
    "kl": 2,
  }


def test_kto_takes_a_negative_kl_estimate_for_zero():
  swapped = KTO | {
    "policy_kl_logps": KTO["reference_kl_logps"],
    "reference_kl_logps": KTO["policy_kl_logps"],
  }
  out = losses.kto(**swapped, beta=0.5)
  np.testing.assert_array_equal(out.metrics["kl"], [0, 0])
  np.testing.assert_allclose(out.loss, [sigmoid(-2), sigmoid(-1)], rtol=1e-6)


def test_kto_sends_no_gradient_through_the_kl():
  def loss(kl_logps):
    return losses.kto(**KTO | {"policy_kl_logps": kl_logps}).loss.sum()

  kl_logps = KTO["policy_kl_logps"]
  np.testing.assert_array_equal(jax.grad(loss)(kl_logps), [0, 0])
  assert loss(kl_logps) != loss(kl_logps + 1)  # but it is read


def test_kto_leaves_empty_places_out_of_the_kl():
  def more(key, x):
    return jnp.concatenate([KTO[key], jnp.asarray([x], KTO[key].dtype)])

  padded = {key: more(key, 0) for key in KTO}
  padded["policy_kl_logps"] = more("policy_kl_logps", 30)
  out = losses.kto(**padded, weights=jnp.array([1.0, 1.0, 0.0]))
  np.testing.assert_array_equal(out.metrics["kl"], [2, 2, 2])
  nobody = losses.kto(**padded, weights=jnp.zeros(3))
  np.testing.assert_array_equal(nobody.metrics["kl"], [0, 0, 0])


@pytest.mark.parametrize("liked", [True, False])
def test_kto_of_one_class_has_its_loss_and_an_empty_mean_of_the_other(liked):
  both = as_jax(random_inputs()) | {"desirable": jnp.full(7, liked)}
  value, grads = differentiate(losses.make("kto"), both)
  sums = losses.reduce(losses.make("kto")(**both))
  present, absent = ("chosen", "rejected")[:: 1 if liked else -1]
  assert np.isfinite(value)
  # Gradient descent raises what was liked and lowers what was not.
  assert (np.sign(grads["policy_logps"]) == (-1 if liked else 1)).all()
  assert sums[f"rewards/{present}"].count == 7
  assert sums[f"rewards/{absent}"] == (0, 0)
  assert sums[f"rewards/{absent}"].mean() == 0


def test_orpo_adds_minus_log_sigmoid_of_the_log_odds_ratio():
  # P of 1/2 and 1/4 a token: odds 1 and 1/3, their ratio 3, sigmoid 3/4.
  out = losses.orpo(
    *map(jnp.float32, (-2 * LOG2, -3 * math.log(4), 2, 3)), lam=0.5
  )
  np.testing.assert_allclose(out.loss, LOG2 + 0.5 * math.log(4 / 3), rtol=1e-6)
  expected = {
    "nll_loss": LOG2,
    "log_odds_chosen": math.log(3),
    "log_odds_ratio": math.log(3 / 4),
    "rewards/chosen": 0.5 * -LOG2,
    "rewards/rejected": 0.5 * -math.log(4),
  }
  for key, value in expected.items():
    np.testing.assert_allclose(out.metrics[key], value, rtol=1e-6)


def test_orpo_loses_when_the_chosen_response_gets_likelier():
  x = as_jax(random_inputs())
  _, grads = differentiate(losses.make("orpo", lam=1.0), x)
  assert (grads["policy_chosen_logps"] < 0).all()
  assert (grads["policy_rejected_logps"] > 0).all()


def test_log_odds_are_exact_in_float32_on_both_sides_of_one_half():
  m = np.array([-1e-6, -1e-3, -0.5, -0.6931, -0.6932, -1, -20, -80, -200.0])
  exact = m - np.log(-np.expm1(m))
  got = losses.log_odds(jnp.asarray(m, jnp.float32))
  np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)
  slope = jax.vmap(jax.grad(losses.log_odds))(jnp.asarray(m, jnp.float32))
  m32 = m.astype(np.float32).astype(np.float64)
  np.testing.assert_allclose(slope, -1 / np.expm1(m32), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orpo_at_probability_one_is_finite_with_a_finite_gradient(dtype):
  logps = jnp.array([0.0, -1.0, 0.0, 0.01, -1e-30], dtype)
  x = {
    "policy_chosen_logps": logps,
    "policy_rejected_logps": logps[::-1],
    "chosen_lengths": jnp.ones(5),
    "rejected_lengths": jnp.ones(5),
    "weights": jnp.ones(5),
  }
  value, grads = differentiate(losses.make("orpo"), x)
  assert np.isfinite(value)
  assert all(np.isfinite(np.float32(g)).all() for g in grads.values())
  assert losses.log_odds(jnp.float32(0)) > losses.log_odds(jnp.float32(-1e-6))


def test_a_tie_counts_one_half():
  out = losses.dpo(jnp.array([0.0, 1, -1, 0]), *jnp.zeros((3, 4)))
  np.testing.assert_array_equal(
    out.metrics["rewards/accuracies"], [0.5, 1, 0, 0.5]
  )
  assert losses.reduce(out)["rewards/accuracies"].mean() == (0.5 + 1 + 0.5) / 4


# A second writing of every loss, float64 numpy


def log_sigmoid(x):
  return -np.logaddexp(0, -x)


def twin_sft(x):
  return (-x["policy_chosen_logps"].sum() / x["chosen_lengths"].sum()), -x[
    "policy_chosen_logps"
  ] / x["chosen_lengths"]


def gap(x, per_token=False):
  n = (x["chosen_lengths"], x["rejected_lengths"]) if per_token else (1, 1)
  first, second = (
    (x[f"policy_{side}_logps"] - x[f"reference_{side}_logps"]) / n
    for side, n in zip(("chosen", "rejected"), n, strict=True)
  )
  return first - second


def twin_dpo(x, beta=0.1, label_smoothing=0.0):
  d = beta * gap(x)
  each = -(1 - label_smoothing) * log_sigmoid(d)
  each -= label_smoothing * log_sigmoid(-d)
  return each.mean(), each


def twin_ipo(x, beta=0.1, average="sum"):
  each = (gap(x, average == "tokens") - 0.5 / beta) ** 2
  return each.mean(), each


def twin_kto(x, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
  z0 = max(0.0, (x["policy_kl_logps"] - x["reference_kl_logps"]).mean())
  h = x["policy_logps"] - x["reference_logps"]
  value = np.where(
    x["desirable"],
    desirable_weight * np.exp(log_sigmoid(beta * (h - z0))),
    undesirable_weight * np.exp(log_sigmoid(beta * (z0 - h))),
  )
  most = np.where(x["desirable"], desirable_weight, undesirable_weight)
  each = most - value
  return each.mean(), each


def twin_orpo(x, lam=0.1):
  m = {
    s: x[f"policy_{s}_logps"] / x[f"{s}_lengths"]
    for s in ("chosen", "rejected")
  }
  p = {s: np.exp(v) for s, v in m.items()}
  odds = {s: v / (1 - v) for s, v in p.items()}
  ratio = odds["chosen"] / odds["rejected"]
  each = -m["chosen"] - lam * np.log(ratio / (1 + ratio))
  return each.mean(), each


TWINS = {
  "dpo": twin_dpo,
  "ipo": twin_ipo,
  "kto": twin_kto,
  "orpo": twin_orpo,
  "sft": twin_sft,
}


def test_every_registered_loss_is_written_a_second_time_here():
  ours = {n for n in NAMES if losses.make(n).function.__module__ != __name__}
  assert ours == set(TWINS)


@every_loss
@pytest.mark.parametrize(
  ("x64", "rtol"), [(True, 1e-12), (False, 3e-5)], ids=["f64", "f32"]
)
def test_a_loss_agrees_with_its_twin_in_numpy(name, options, x64, rtol):
  loss = losses.make(name, **options)
  for seed in range(3):
    inputs = random_inputs(seed=seed)
    mean, each = TWINS[name](inputs, **options)
    with jax.enable_x64(x64):
      dtype = jnp.float64 if x64 else jnp.float32
      x = as_jax(inputs, dtype)
      out = compiled(loss)(x)
      assert out.loss.dtype == dtype
      np.testing.assert_allclose(out.loss, each, rtol=rtol, atol=rtol)
      got = summed(loss)(x)["loss"]
      np.testing.assert_allclose(got.total / got.count, mean, rtol=rtol)


@every_loss
def test_gradients_are_those_of_finite_differences(name, options):
  loss = losses.make(name, **options)
  with jax.enable_x64(True):
    x = as_jax(random_inputs(), jnp.float64)
    _, grads = differentiate(loss, x)
    for key, grad in grads.items():
      if "kl" in key:  # behind stop_gradient, by design
        np.testing.assert_array_equal(grad, 0)
        continue
      step = 1e-5
      for i in range(len(grad)):
        up, down = (
          differentiate(loss, x | {key: x[key].at[i].add(s * step)})[0]
          for s in (1, -1)
        )
        np.testing.assert_allclose(
          grad[i], (up - down) / (2 * step), rtol=1e-6, atol=1e-9
        )


# What holds for all of them


@every_loss
def test_a_compiled_loss_is_the_eager_one(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.jit(lambda x: loss(**x))(x),
    loss(**x),
  )


@every_loss
def test_a_batch_is_its_examples_one_by_one(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  each = quick_jit(jax.vmap(lambda x: loss(**x)))(x)
  assert each.loss.shape == (7,)
  same = np.allclose(each.loss, compiled(loss)(x).loss, rtol=1e-6)
  assert same != loss.batch_coupled


@every_loss
def test_examples_may_have_any_leading_shape(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  out = compiled(loss)({key: v.reshape(1, 7, 1) for key, v in x.items()})
  np.testing.assert_allclose(
    out.loss.reshape(-1), compiled(loss)(x).loss, rtol=1e-6, atol=1e-6
  )
  assert {
    v.shape
    for m in out.metrics.values()
    for v in (m if isinstance(m, losses.Weighted) else [m])
  } == {(1, 7, 1)}


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ten_thousand_nats_give_finite_values_and_gradients(
  name, options, dtype
):
  loss = losses.make(name, **options)
  logps = [key for key in loss.needs if key.endswith("logps")]
  corners = np.array(list(itertools.product((-1e4, 0, 1e4), repeat=len(logps))))
  n = len(corners)
  x = {"weights": np.ones(n), "desirable": np.arange(n) % 2 == 0}
  for length in (1, 1000):
    x |= dict.fromkeys(
      ("chosen_lengths", "rejected_lengths"), np.full(n, length)
    )
    x |= dict(zip(logps, corners.T, strict=True))
    value, grads = differentiate(loss, as_jax(x, dtype))
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    for grad in grads.values():
      assert np.isfinite(np.float32(grad)).all()
  out = compiled(loss)(as_jax(x, dtype))
  assert all(np.isfinite(v).all() for v in jax.tree.leaves(out))


@every_loss
def test_sums_of_bfloat16_log_probs_are_taken_in_float32(name, options):
  # 1024 and 1032 are neighbours in bfloat16: 1031 = 1032 - 1 is not one.
  loss = losses.make(name, **options)
  x = random_inputs(2)
  x |= {key: np.array([-1024.0, -1032]) for key in loss.needs if "logps" in key}
  x |= {
    key: np.array([-1.0, -1]) for key in loss.needs if key.startswith("refer")
  }
  x |= {
    "chosen_lengths": np.full(2, 512.0),
    "rejected_lengths": np.ones(2) * 99,
  }
  exact = compiled(loss)(as_jax(x)).loss
  rounded = compiled(loss)(as_jax(x, jnp.bfloat16)).loss
  np.testing.assert_array_equal(rounded, exact)


@every_loss
def test_entries_of_weight_zero_change_no_number(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  there = np.array([1, 1, 0, 1, 0, 1, 1.0], np.float32)
  few = {key: v[there > 0] for key, v in x.items()}
  noisy = {
    key: v if key == "desirable" else jnp.where(there > 0, v, -1e30)
    for key, v in x.items()
  } | {"weights": jnp.asarray(there)}
  expected, got = summed(loss)(few), summed(loss)(noisy)
  assert got.keys() == expected.keys()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected
  )


def test_reduce_ignores_whatever_an_empty_entry_holds():
  hole = jnp.array([2.0, jnp.nan, jnp.inf])
  out = losses.LossOutput(
    hole,
    {"plain": -hole, "some": losses.Weighted(hole, jnp.array([0.5, 1, 1]))},
  )
  sums = losses.reduce(out, jnp.array([1.0, 0, 0]))
  assert sums == {"loss": (2, 1), "plain": (-2, 1), "some": (1, 0.5)}
  assert sums["some"].mean() == 2


def test_reduce_counts_every_entry_once_without_weights():
  out = losses.LossOutput(jnp.array([1.0, 2, 6]), {})
  assert losses.reduce(out)["loss"] == (9, 3)
  own = out._replace(weights=jnp.array([1.0, 0, 3]))
  assert losses.reduce(own)["loss"] == (1 * 1 + 3 * 6, 1 + 3)


@every_loss
def test_a_response_without_tokens_is_finite(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  for empty in ("chosen", "rejected"):
    zero = {key: x[key].at[0].set(0) for key in x if empty in key}
    value, grads = differentiate(loss, x | zero)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads.values())


# The registry


def test_needs_are_the_positional_parameters_of_the_signature():
  pair = ("policy_chosen_logps", "policy_rejected_logps")
  reference = ("reference_chosen_logps", "reference_rejected_logps")
  lengths = ("chosen_lengths", "rejected_lengths")
  expected = {
    "dpo": (pair + reference, "paired", True, False),
    "ipo": (pair + reference + lengths, "paired", True, False),
    "kto": (
      (
        "policy_logps", "reference_logps", "policy_kl_logps",
        "reference_kl_logps", "desirable", "weights",
      ),
      "unpaired", True, True,
    ),
    "orpo": (pair + lengths, "paired", False, False),
    "sft": (("policy_chosen_logps", "chosen_lengths"), "sft", False, False),
  }  # fmt: skip
  for name, facts in expected.items():
    x = losses.make(name)
    assert (x.needs, x.kind, x.needs_reference, x.batch_coupled) == facts


def test_a_made_loss_is_the_function_with_its_options_and_hashable():
  x = as_jax(random_inputs())
  made = losses.make("dpo", beta=0.3)
  plain = losses.dpo(*(x[key] for key in made.needs), beta=0.3)
  np.testing.assert_array_equal(made(**x).loss, plain.loss)
  assert made == losses.make("dpo", beta=0.3, label_smoothing=0.0)
  assert hash(made) == hash(losses.make("dpo", beta=0.3))
  assert made != losses.make("dpo")
  assert losses.make("dpo") == losses.make("dpo", beta=0.1)
  with pytest.raises(AttributeError):
    made.name = "ipo"


def test_defaults_are_those_of_the_signature():
  assert losses.defaults("dpo") == {"beta": 0.1, "label_smoothing": 0.0}
  assert losses.defaults("ipo") == {"beta": 0.1, "average": "sum"}
  assert losses.defaults("orpo") == {"lam": 0.1}
  assert losses.defaults("sft") == {}
  assert dict(losses.make("orpo").options) == {"lam": 0.1}


def test_a_whole_number_is_a_fine_float():
  made = losses.make("dpo", beta=1)
  assert made == losses.make("dpo", beta=1.0)
  assert isinstance(dict(made.options)["beta"], float)


def test_an_unknown_loss_is_refused_naming_the_known_ones():
  with pytest.raises(ValueError, match="unknown loss 'dop'") as e:
    losses.make("dop")
  assert "did you mean 'dpo'?" in str(e.value)
  assert all(name in str(e.value) for name in NAMES)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("dpo", {"bet": 0.1}, ["'dpo'", "'bet'", "'beta'", "label_smoothing"]),
    ("sft", {"beta": 0.1}, ["'sft'", "'beta'", "none"]),
    ("orpo", {"beta": 0.1}, ["'orpo'", "'beta'", "lam"]),
    ("dpo", {"beta": "0.1"}, ["'dpo'", "beta='0.1'", "float"]),
    ("dpo", {"beta": True}, ["beta=True", "float"]),
    ("dpo", {"beta": None}, ["beta=None", "float"]),
    ("ipo", {"average": 1}, ["average=1", "str"]),
    ("ipo", {"average": "mean"}, ["average='mean'", "'sum'", "'tokens'"]),
    ("dpo", {"beta": -0.1}, ["beta=-0.1"]),
    ("dpo", {"beta": float("nan")}, ["beta=nan"]),
    ("dpo", {"label_smoothing": 0.6}, ["label_smoothing=0.6", "0.5"]),
    ("dpo", {"label_smoothing": -0.1}, ["label_smoothing=-0.1", "0.0"]),
    ("ipo", {"beta": 0}, ["beta=0"]),
    ("kto", {"beta": -1}, ["beta=-1"]),
    ("orpo", {"lam": -1}, ["lam=-1"]),
  ],
)
def test_a_wrong_hyper_parameter_is_refused_in_one_line(name, options, words):
  with pytest.raises(ValueError) as e:
    losses.make(name, **options)
  assert all(word in str(e.value) for word in words)
  assert "\n" not in str(e.value)


def test_a_missing_input_is_named():
  with pytest.raises(TypeError, match="reference_rejected_logps"):
    losses.make("dpo")(
      policy_chosen_logps=0.0,
      policy_rejected_logps=0.0,
      reference_chosen_logps=0.0,
    )


@pytest.fixture
def registry(monkeypatch):
  """A registry that forgets what a test adds."""
  monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def test_a_loss_of_ones_own_is_made_by_name(registry):
  @losses.register
  def hinge(policy_chosen_logps, policy_rejected_logps, *, margin: float = 1.0):
    gap = policy_chosen_logps - policy_rejected_logps
    return losses.LossOutput(jnp.maximum(0.0, margin - gap), {})

  made = losses.make("hinge", margin=2.0)
  assert "hinge" in losses.names()
  assert made.kind == "paired"
  assert not made.needs_reference
  assert not made.batch_coupled
  x = as_jax(random_inputs()) | {
    "policy_chosen_logps": jnp.array([-3.0]),
    "policy_rejected_logps": jnp.array([-3.5]),
  }
  assert made(**x).loss == 2 - (-3 - -3.5)
  # Integers and halves are computed in float32 there too.
  assert hinge(jnp.array([1]), jnp.array([2], jnp.int8)).loss.dtype == "float32"


def test_a_loss_that_asks_for_what_nobody_has_is_refused(registry):
  def greedy(policy_chosen_logits):
    pass

  with pytest.raises(TypeError, match="'policy_chosen_logits'") as e:
    losses.register(greedy)
  assert "policy_chosen_logps" in str(e.value)
  assert "greedy" not in losses.names()


def test_a_hyper_parameter_without_a_default_is_refused(registry):
  def bare(policy_chosen_logps, *, beta):
    pass

  with pytest.raises(TypeError, match="'beta' needs a default"):
    losses.register(bare)


def test_open_ended_signatures_are_refused(registry):
  def anything(*args, **kwargs):
    pass

  with pytest.raises(TypeError, match="'args'"):
    losses.register(anything)


def test_a_name_is_not_taken_from_another_module(registry):
  def dpo(policy_chosen_logps):
    pass

  with pytest.raises(
    ValueError, match=r"already registered by dpo_jax\.losses"
  ):
    losses.register(dpo)
  assert losses.make("dpo").kind == "paired"


@pytest.mark.parametrize("wall", ["walled", "open"])
def test_the_losses_need_jax_and_nothing_else(wall):
  """With all else out of reach, and in reach but left alone."""
  script = """
    import sys

    FINE = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy"}
    FINE |= {"dpo_jax"} | set(sys.stdlib_module_names)

    class Wall:
      # Finds what is allowed; the rest is as if it were not installed.

      def __init__(self, finders):
        self.finders = finders

      def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in FINE or top.startswith("_sysconfigdata"):
          for finder in self.finders:
            if found := finder.find_spec(name, path, target):
              return found

    heavy = {"flax", "optax", "orbax", "tensorflow", "safetensors", "grain"}
    heavy |= {"absl", "ml_collections", "torch", "tokenizers", "jinja2"}
    if sys.argv[1] == "walled":
      sys.meta_path[:] = [Wall(sys.meta_path[:])]
      for absent in heavy:
        try:
          __import__(absent)
        except ModuleNotFoundError:
          continue
        raise SystemExit(f"the wall lets {absent} through")
    import jax
    from dpo_jax import losses
    assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    ours = {m for m in sys.modules if m.startswith("dpo_jax.")}
    assert all(m.startswith("dpo_jax.losses") for m in ours), ours
    for name in losses.names():
      loss = losses.make(name)
      def total(inputs):
        return loss(**inputs).loss.sum()
      inputs = dict.fromkeys(losses.INPUTS, jax.numpy.full(2, -1.0))
      jax.jit(jax.grad(total))(inputs)
    print("fine", *losses.names())
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script), wall],
    capture_output=True,
    text=True,
    cwd=base.__file__.partition("dpo_jax")[0],
  )
  assert out.stdout.split() == ["fine", *NAMES], out.stderr


def test_what_an_empty_place_holds_never_reaches_z0():
  nan = float("nan")
  out = losses.kto(
    *(jnp.array(x) for x in 2 * ([-1.0, nan], [-2.0, 0.0])),
    jnp.array([True, False]),
    jnp.array([1.0, 0.0]),
    beta=1.0,
  )  # fmt: skip
  sums = losses.reduce(out, jnp.array([1.0, 0.0]))
  assert float(sums["kl"].mean()) == 1.0
  assert float(sums["loss"].mean()) == pytest.approx(1 / 2)


def test_hyper_parameters_may_be_numpy_numbers_but_not_infinite():
  assert losses.make("dpo", beta=np.float32(0.5)) == losses.make(
    "dpo", beta=0.5
  )
  with pytest.raises(ValueError, match="beta=inf"):
    losses.make("dpo", beta=float("inf"))


def test_a_made_loss_takes_arrays_by_position_too():
  arrays = [jnp.array([float(i)]) for i in range(4)]
  ours = losses.make("dpo", beta=0.5)(*arrays)
  assert float(ours.loss[0]) == float(losses.dpo(*arrays, beta=0.5).loss[0])


def test_a_loss_that_returns_no_output_is_refused_when_made(registry):
  @losses.register
  def returns_an_array(policy_chosen_logps):
    return -policy_chosen_logps

  with pytest.raises(ValueError, match="LossOutput"):
    losses.make("returns_an_array")


def test_per_token_ipo_says_that_it_needs_lengths():
  one = jnp.ones(1)
  with pytest.raises(ValueError, match="chosen_lengths"):
    losses.ipo(one, one, one, one, average="tokens")
