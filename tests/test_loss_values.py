"""Losses by hand: small numbers, worked out on paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import as_jax, differentiate, random_inputs

from dpo_jax import losses

LOG2 = math.log(2)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


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


# h_w = 2, h_l = -1.
PAIR = tuple(map(jnp.float32, (-3, -6, -5, -5)))


def test_robust_dpo_is_in_expectation_dpo_on_the_true_labels():
  e = 0.2
  right = losses.robust(*PAIR, label_smoothing=e).loss
  flipped = losses.robust(
    PAIR[1], PAIR[0], PAIR[3], PAIR[2], label_smoothing=e
  ).loss
  clean = losses.dpo(*PAIR).loss
  np.testing.assert_allclose((1 - e) * right + e * flipped, clean, rtol=1e-6)


def test_a_hinge_is_content_beyond_its_margin():
  assert losses.hinge(*PAIR, beta=0.25).loss == 1 - 0.25 * 3
  assert losses.hinge(*PAIR, beta=0.5).loss == 0  # 1.5 wide
  assert (
    jax.grad(lambda w: losses.hinge(w, *PAIR[1:], beta=0.5).loss)(-3.0) == 0
  )


def test_dpop_charges_for_a_chosen_response_below_the_reference():
  # h_w = -2, h_l = -4: a margin of 2, less 3 times the 2 nats lost.
  lowered = tuple(map(jnp.float32, (-7, -9, -5, -5)))
  out = losses.dpop(*lowered, beta=0.5, lam=3)
  np.testing.assert_allclose(
    out.loss, -math.log(sigmoid(0.5 * (2 - 6))), rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.dpop(*PAIR, beta=0.5, lam=3).loss, losses.dpo(*PAIR, beta=0.5).loss
  )


def test_r_dpo_lets_length_explain_a_preference():
  lengths = jnp.float32(9), jnp.float32(4)
  out = losses.r_dpo(*PAIR, *lengths, beta=0.5, alpha=0.1)
  expected = -math.log(sigmoid(0.5 * 3 + 0.1 * 5))
  np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
  # The longer the chosen one, the less there is to learn from it.
  slope = lambda n: jax.grad(
    lambda w: losses.r_dpo(w, *PAIR[1:], n, 4.0, alpha=0.1).loss
  )(-3.0)
  assert slope(30.0) > slope(9.0)  # nearer to 0 from below


def test_aot_compares_the_policys_margins_with_the_references_by_rank():
  policy, reference = jnp.array([5.0, 1, 3]), jnp.array([0.0, 2, 4])
  zero = jnp.zeros(3)
  out = losses.aot(policy, zero, reference, zero, beta=1.0)
  # 5 is the largest, against 4; 1 the least, against 0; 3 against 2.
  np.testing.assert_allclose(
    out.loss, np.log1p(np.exp([-1, -1, -1.0])), rtol=1e-6
  )
  # An empty place is ranked nowhere, though it holds the least of all.
  out = losses.aot(
    jnp.array([-9.0, 5, 1]),
    zero,
    reference,
    zero,
    jnp.array([0.0, 1, 1]),
    beta=1.0,
  )
  np.testing.assert_allclose(
    out.loss[1:], np.log1p(np.exp([-1, 1.0])), rtol=1e-6
  )


def test_aot_unpaired_ranks_chosen_and_rejected_rewards_apart():
  chosen, rejected = jnp.array([3.0, 1]), jnp.array([-5.0, 2])
  zero = jnp.zeros(2)
  out = losses.aot_unpaired(chosen, rejected, zero, zero, beta=1.0)
  np.testing.assert_allclose(out.loss, np.log1p(np.exp([-1.0, -6])), rtol=1e-6)


def test_bco_carries_the_mean_reward_of_each_class_from_batch_to_batch():
  one = {"reference_logps": jnp.zeros(3)}
  first = one | {
    "policy_logps": jnp.array([4.0, 2, -6]),
    "desirable": jnp.array([True, True, False]),
  }
  out = losses.bco(**first, beta=1.0)
  assert out.metrics["delta"][0] == ((4 + 2) / 2 + -6) / 2
  np.testing.assert_allclose(
    out.loss[0], math.log1p(math.exp(-(4 + 1.5))), rtol=1e-6
  )
  second = one | {
    "policy_logps": jnp.array([9.0, 0, 0]),
    "desirable": jnp.array([True, False, False]),
  }
  again = losses.bco(**second, state=out.state, beta=1.0)
  delta = ((4 + 2 + 9) / 3 + (-6 + 0 + 0) / 3) / 2
  np.testing.assert_allclose(again.metrics["delta"], delta)
  pooled = losses.bco(**second, state=out.state, beta=1.0, shift="pooled")
  np.testing.assert_allclose(pooled.metrics["delta"], (4 + 2 - 6 + 9) / 6)
  frozen = losses.bco(**second, state=out.state, training=False, beta=1.0)
  assert frozen.metrics["delta"][0] == -1.5
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool(a == b), frozen.state, out.state)
  )


def test_bco_of_one_class_so_far_shifts_by_its_mean():
  out = losses.bco(
    jnp.array([4.0, 2]), jnp.zeros(2), jnp.ones(2, bool), beta=1.0
  )
  assert out.metrics["delta"][0] == 3
  before = losses.bco(
    jnp.array([4.0]), jnp.zeros(1), jnp.ones(1, bool), training=False, beta=1.0
  )
  assert before.metrics["delta"][0] == 0


def test_simpo_asks_for_a_margin_of_gamma_a_token():
  # -6 over 3 tokens, -8 over 2: -2 and -4 a token.
  out = losses.simpo(*map(jnp.float32, (-6, -8, 3, 2)), beta=2.0, gamma=1.5)
  np.testing.assert_allclose(
    out.loss, -math.log(sigmoid(2 * 2 - 1.5)), rtol=1e-6
  )
  assert out.metrics["rewards/chosen"] == 2.0 * -2


def test_alphapo_is_simpo_where_alpha_is_nothing():
  x = as_jax(random_inputs())
  shaped = losses.make("alphapo", alpha=0.0, beta=2.0, gamma=0.5)(**x)
  plain = losses.make("simpo", beta=2.0, gamma=0.5)(**x)
  np.testing.assert_array_equal(shaped.loss, plain.loss)
  near = losses.make("alphapo", alpha=1e-4, beta=2.0, gamma=0.5)(**x)
  np.testing.assert_allclose(near.loss, plain.loss, rtol=1e-2)


def test_a_ranking_with_a_gap_and_one_of_a_single_response():
  ranked = jnp.array([[3.0, 99, 1], [5, 99, 99]])
  out = losses.plackett_luce(
    ranked, jnp.zeros((2, 3)), jnp.array([[1.0, 0, 1], [1, 0, 0]]), beta=1.0
  )
  np.testing.assert_allclose(out.loss[0], -math.log(sigmoid(2)), rtol=1e-6)
  assert out.metrics["rewards/rejected"][0] == 1
  assert out.loss[1] == 0
  # A response alone is in no order and counts for none.
  assert losses.reduce(out)["rewards/accuracies"] == (1, 1)


def test_slic_adds_the_likelihood_of_the_chosen_response():
  out = losses.slic(*map(jnp.float32, (-3, -3.5)), delta=2.0, lam=0.5)
  assert out.loss == 2 - 0.5 + 0.5 * 3


def test_a_reward_model_is_held_to_the_margin_and_the_centre():
  out = losses.reward(*map(jnp.float32, (2, -1, 1)), centering=0.1)
  expected = -math.log(sigmoid(2 - -1 - 1)) + 0.1 * (2 - 1) ** 2
  np.testing.assert_allclose(out.loss, expected, rtol=1e-6)


def test_a_ranking_of_two_is_a_pair():
  ranked = jnp.array([[-3.0, -6]]), jnp.array([[-5.0, -5]])
  out = losses.plackett_luce(*ranked, jnp.ones((1, 2)), beta=0.5)
  pair = losses.dpo(*PAIR, beta=0.5)
  np.testing.assert_allclose(out.loss[0], pair.loss, rtol=1e-6)
  for key in ("rewards/margins", "rewards/rejected"):
    assert out.metrics[key][0] == pair.metrics[key]
  assert out.metrics["rewards/accuracies"].value[0] == 1


def test_a_ranking_counts_the_pairs_that_are_in_order():
  # Rewards 3, 1, 2, and a fourth response that is not there.
  ranked = jnp.array([[3.0, 1, 2, 99]])
  out = losses.plackett_luce(
    ranked, jnp.zeros((1, 4)), jnp.array([[1.0, 1, 1, 0]]), beta=1.0
  )
  np.testing.assert_allclose(out.metrics["rewards/accuracies"].value, 2 / 3)
  assert out.metrics["rewards/rejected"][0] == 2
  e = np.exp([3.0, 1, 2])
  expected = -np.log(e[0] / e.sum() * e[1] / (e[1] + e[2]))
  np.testing.assert_allclose(out.loss[0], expected, rtol=1e-6)


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
