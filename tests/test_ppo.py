"""PPO's and GRPO's pieces: by hand, and what must hold whatever the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

INF = float("inf")


def near(ours, expected, atol=1e-6):
  np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=atol)


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "f4")


@pytest.fixture(scope="module")
def episode():
  """Rewards and values of responses of 5, 3 and 1 tokens; 9s lie beyond."""
  mask = jnp.arange(5) < jnp.array([[5], [3], [1]])
  fill = lambda x: jnp.where(mask, x, 9.0)
  return fill(draw(0, 3, 5)), fill(draw(1, 3, 5)), mask


# Advantages


def test_advantages_by_hand():
  # Two tokens. d_2 = 4 - 2; d_1 = 1 + 0.5 * 2 - 3, A_1 = d_1 + 0.5 * 0.5 * d_2.
  advantages, returns = losses.gae(
    jnp.array([[1.0, 4.0]]), jnp.array([[3.0, 2.0]]), True, gamma=0.5, lam=0.5
  )
  near(advantages, [[-0.5, 2.0]])
  near(returns, [[2.5, 4.0]])


def test_with_lambda_one_returns_are_what_is_still_to_come(episode):
  rewards, values, mask = episode
  advantages, returns = losses.gae(rewards, values, mask, lam=1.0)
  kept = np.where(mask, rewards, 0.0)
  to_come = np.cumsum(kept[:, ::-1], axis=1)[:, ::-1]
  near(returns, np.where(mask, to_come, 0.0))
  near(advantages, np.where(mask, to_come - values, 0.0))


def test_with_lambda_zero_advantages_are_errors_of_one_step(episode):
  rewards, values, mask = episode
  advantages, _ = losses.gae(rewards, values, mask, gamma=0.9, lam=0.0)
  known = np.pad(np.where(mask, values, 0.0), ((0, 0), (0, 1)))
  error = rewards + 0.9 * known[:, 1:] - known[:, :-1]
  near(advantages, np.where(mask, error, 0.0))


def test_tokens_that_the_mask_leaves_out_have_no_part():
  rewards, values = draw(2, 1, 4), draw(3, 1, 4)
  gap = jnp.array([[1, 1, 0, 0, 1, 1, 0]])
  spread = lambda x: jnp.full((1, 7), jnp.nan).at[:, (0, 1, 4, 5)].set(x)
  alone = losses.gae(rewards, values, True)
  among = losses.gae(spread(rewards), spread(values), gap)
  for one, other in zip(alone, among, strict=True):
    near(other[:, (0, 1, 4, 5)], one)
    near(other[:, (2, 3, 6)], 0)


def test_no_gradient_flows_through_advantages(episode):
  rewards, values, mask = episode
  total = lambda v: sum(x.sum() for x in losses.gae(rewards, v, mask))
  near(jax.grad(total)(values), 0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_white_numbers_have_variance_one_within_the_mask(episode, shift_mean):
  x, _, mask = episode
  white = losses.whiten(x, mask, shift_mean)
  within = np.asarray(white)[np.asarray(mask)]
  mean = 0.0 if shift_mean else np.asarray(x)[np.asarray(mask)].mean()
  near(within.mean(), mean)
  near(within.std(ddof=1), 1, atol=1e-5)
  near(white[~mask], 0)


def test_one_number_and_none_are_white_without_a_nan():
  near(losses.whiten(jnp.array([3.0, 5.0]), jnp.array([1, 0])), [0, 0])
  near(losses.whiten(jnp.array([3.0]), jnp.array([1]), False), [3])
  near(losses.whiten(jnp.array([3.0, 5.0]), jnp.array([0, 0])), [0, 0])


# KL


def test_kl_estimators_by_hand():
  half, third = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([1 / 3]))
  gap = np.log(1.5)
  near(losses.kl_estimate(half, third), gap)
  near(losses.kl_estimate(half, third, "k2"), gap**2 / 2)
  near(losses.kl_estimate(half, third, "k3"), 2 / 3 - 1 + gap)


def test_kl_estimators_far_off_are_finite_and_so_are_gradients():
  for kind in ("k1", "k2", "k3"):
    for gap in (-500.0, 0.0, 500.0):
      of = lambda x, k=kind: losses.kl_estimate(x, jnp.float32(0), k)
      assert jnp.isfinite(jnp.array(jax.value_and_grad(of)(gap))).all()


def test_an_unknown_estimator_is_refused_by_name():
  with pytest.raises(ValueError, match="kind='k4' should be 'k1' or"):
    losses.kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")


def test_the_coefficient_follows_the_kl_by_a_fifth_at_most():
  new = lambda kl: losses.adapt(0.2, kl, target=6.0, horizon=100, n=10)
  near(new(6.0), 0.2)
  near(new(6.6), 0.2 * 1.01)
  near(new(100.0), 0.2 * 1.02)
  near(new(0.0), 0.2 * 0.98)


def test_the_price_is_paid_by_token_and_the_score_comes_last():
  logps = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
  reference = jnp.array([[-2.0, -2.0, -1.0], [-3.0, 0.0, 5.0]])
  rewards = losses.shaped_rewards(
    jnp.array([10.0, 20.0]), logps, reference, jnp.array([3, 1]), 0.5
  )
  near(rewards, [[-0.5, 0.0, 11.0], [19.0, 0.0, 0.0]])


def test_a_response_without_tokens_is_given_nothing():
  rewards = losses.shaped_rewards(
    jnp.array([7.0]), draw(4, 1, 3), draw(5, 1, 3), jnp.array([0]), 0.1
  )
  near(rewards, 0)


# The clipped surrogate


def test_the_surrogate_by_hand():
  # Ratios of 1.5 and 0.5; a gain is held at 1.2 and 0.8, a loss is not.
  ratios = np.array([1.5, 1.5, 0.5, 0.5], "f4")
  logps, advantages = jnp.log(ratios), jnp.array([2.0, -2.0, 2.0, -2.0])
  out = losses.ppo_policy(logps, jnp.zeros(4), advantages)
  near(out.loss, [-2.4, 3.0, -1.0, 1.6])
  near(out.metrics["policy/clipfrac_avg"], [1, 0, 0, 1])
  near(out.metrics["val/ratio"], [1.5, 1.5, 0.5, 0.5])
  near(
    out.metrics["policy/approxkl_avg"], np.log([1.5, 1.5, 0.5, 0.5]) ** 2 / 2
  )


def test_where_policies_agree_the_gradient_is_the_policy_gradient():
  logps, advantages = draw(6, 8), draw(7, 8)
  slope = jax.grad(
    lambda x: losses.ppo_policy(x, logps, advantages).loss.sum()
  )(logps)
  near(slope, -advantages)
  near(losses.ppo_policy(logps, logps, advantages).metrics["val/ratio"], 1)


def test_what_is_clipped_has_no_gradient():
  logps = jnp.log(jnp.array([1.5, 0.5]))
  slope = jax.grad(
    lambda x: losses.ppo_policy(
      x, jnp.zeros(2), jnp.array([1.0, -1.0])
    ).loss.sum()
  )(logps)
  near(slope, 0)


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_one_token_far_off_leaves_loss_and_gradient_finite(gap):
  of = lambda x: losses.ppo_policy(x, jnp.float32(0), jnp.float32(-1)).loss
  assert jnp.isfinite(jnp.array(jax.value_and_grad(of)(gap))).all()


def test_the_value_loss_by_hand():
  # Old values of 1, clip 0.2. Beyond the clip the worse of both counts.
  out = losses.ppo_value(
    jnp.array([1.1, 2.0, 2.0]), jnp.ones(3), jnp.array([2.0, 2.0, 0.0])
  )
  near(out.loss, [0.405, 0.32, 2.0])
  near(out.metrics["val/clipfrac_avg"], [0, 1, 0])
  free = losses.ppo_value(jnp.array([2.0]), jnp.ones(1), jnp.ones(1), clip=INF)
  near(free.loss, 0.5)


@pytest.mark.parametrize("clip", [-0.1, float("nan")])
def test_clips_below_zero_are_refused(clip):
  zero = jnp.zeros(1)
  for loss in (losses.ppo_policy, losses.ppo_value):
    with pytest.raises(ValueError, match="clip="):
      loss(zero, zero, zero, clip=clip)


# Groups


def test_group_advantages_by_hand():
  rewards = jnp.array([[1.0, 3.0], [0.0, 0.0]])
  root = np.sqrt(2)
  near(losses.group_advantages(rewards, "none"), [[-1, 1], [0, 0]])
  near(
    losses.group_advantages(rewards),
    np.array([[-1, 1], [0, 0]]) / (root + 1e-4),
  )
  near(
    losses.group_advantages(rewards, "batch"),
    np.array([[-1, 1], [0, 0]]) / (root + 1e-4),
  )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_groups_of_one_have_no_advantage(scale):
  equal = jnp.full((2, 3), 0.1)  # whose mean in float32 is another number
  assert (losses.group_advantages(equal, scale) == 0).all()
  assert (losses.group_advantages(draw(8, 4, 1), scale) == 0).all()


def test_grpo_by_hand():
  logps = jnp.log(jnp.array([1.5, 0.5]))
  args = (logps, jnp.zeros(2), jnp.zeros(2), jnp.array([2.0, -2.0]))
  out = losses.grpo(*args, clip_high=0.3)
  near(out.loss, [-2.6, 1.6])
  near(out.metrics["clip_ratio/high_mean"], [1, 0])
  near(out.metrics["clip_ratio/low_mean"], [0, 1])
  k3 = np.array([1 / 1.5, 2.0]) - 1 + np.log([1.5, 0.5])
  near(losses.grpo(*args, beta=0.5).loss, np.array([-2.4, 1.6]) + 0.5 * k3)


def test_without_kl_grpo_is_ppo_and_needs_no_reference():
  logps, old, advantages = draw(9, 6), draw(10, 6), draw(11, 6)
  near(
    losses.grpo(logps, old, None, advantages).loss,
    losses.ppo_policy(logps, old, advantages).loss,
  )
  with pytest.raises(ValueError, match="needs reference_logps"):
    losses.grpo(logps, old, None, advantages, beta=0.1)


def test_the_ratio_of_a_sequence_is_that_of_its_mean_log_prob(episode):
  logps, old, mask = episode
  advantages = draw(12, 3, 1)
  by_token = losses.grpo(
    logps, old, None, advantages, level="sequence", mask=mask
  )
  mean = lambda x: jnp.where(mask, x, 0).sum(1) / mask.sum(1)
  of_means = losses.grpo(mean(logps), mean(old), None, advantages[:, 0])
  near(by_token.loss[:, 0], of_means.loss)
  near(jnp.ptp(by_token.loss, axis=1), 0)
  with pytest.raises(ValueError, match="needs mask"):
    losses.grpo(logps, old, None, advantages, level="sequence")


def test_reductions_by_hand():
  loss = jnp.array([[2.0, 4.0, 6.0], [8.0, 99.0, 99.0]])
  mask, lengths = jnp.array([[1, 1, 1], [1, 0, 0]]), jnp.array([[3], [1]])
  mean = lambda name: losses.token_sums(
    loss, mask, lengths, reduction=name, max_tokens=5
  ).mean()
  near(mean("grpo"), (4 + 8) / 2)
  near(mean("bnpo"), 20 / 4)
  near(mean("dapo"), 20 / 4)
  near(mean("dr_grpo"), 20 / (2 * 5))
  with pytest.raises(ValueError, match="needs max_tokens"):
    losses.token_sums(loss, mask, lengths, reduction="dr_grpo")


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_reductions_are_the_same_on_packed_rows_and_in_parts(name):
  # The responses of 5, 3 and 1 tokens in one row, with room to spare.
  loss, ends = draw(13, 3, 5), (5, 3, 1)
  mask = jnp.arange(5) < jnp.array(ends)[:, None]
  reduce = lambda *args: losses.token_sums(*args, reduction=name, max_tokens=5)
  padded = reduce(loss, mask, jnp.array(ends)[:, None])
  row = jnp.concatenate([loss[mask], jnp.full(3, jnp.nan)])[None]
  of_row = jnp.array([[5] * 5 + [3] * 3 + [1] + [0] * 3])
  packed = reduce(row, of_row > 0, of_row)
  near(packed.mean(), padded.mean())
  parts = [reduce(loss[i], mask[i], jnp.array(ends[i])) for i in range(3)]
  near(sum(p.total for p in parts), padded.total)
  near(sum(p.count for p in parts), padded.count)
