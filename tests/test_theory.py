"""What is proved about the losses, on tables small enough to be exact.

docs/derivation.md walks through it; the sections here are its steps.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax, sigmoid

from dpo_jax import losses, tabular

BETA = 0.4
X, Y = 2, 4  # prompts, responses of each
# Each program here runs once or twice; optimising it would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def world(seed=0, x=X, y=Y):
  """A reference and rewards, f[x y] each."""
  rng = np.random.default_rng(seed)
  reference = log_softmax(jnp.array(rng.normal(size=(x, y))))
  return reference, jnp.array(rng.normal(size=(x, y)))


def uniform(x=X, y=Y):
  return jnp.full((x, y), -math.log(y))


def table(seed, *shape):
  return jnp.array(np.random.default_rng(seed).normal(size=shape or (X, Y)))


def minimum(function, start):
  """Where a function of a table is least; fails if the search did not end."""
  found, slope = quick_jit(lambda x: tabular.fit(function, x))(start)
  assert slope < 1e-11
  return found


@functools.lru_cache
def mean_of(loss):
  """(logits, reference, weights or labels, lengths) -> mean of a loss."""
  kinds = {
    "paired": tabular.expected_loss,
    "unpaired": tabular.expected_label_loss,
  }

  def mean(logits, *data):
    return kinds[loss.kind](loss, log_softmax(logits), *data)

  return mean


@functools.lru_cache
def compiled(loss, what):
  """A transformation of `mean_of`; tests that share it compile it once."""
  return quick_jit(what(mean_of(loss)))


def value(mean):
  return mean


def search(mean):
  def run(start, *data):
    return tabular.fit(lambda logits: mean(logits, *data), start)

  return run


def mean_loss(loss, policy, reference, weights):
  return compiled(loss, value)(policy, reference, weights)


def trained(loss, reference, weights, lengths=None, start=None):
  """Log-probs of the policy that minimises a paired loss."""
  start = reference if start is None else start
  found, slope = compiled(loss, search)(start, reference, weights, lengths)
  assert slope < 1e-11
  return log_softmax(found)


def descend(function, start, steps, rate):
  """Plain gradient descent."""
  slope = jax.grad(function)
  step = lambda _, x: x - rate * slope(x)
  return quick_jit(lambda x: jax.lax.fori_loop(0, steps, step, x))(start)


def centred(x):
  return x - x.mean(axis=-1, keepdims=True)


def off_diagonal(x):
  """f[X Y Y] -> f[X Y (Y-1)], the pairs of different responses."""
  y = x.shape[-1]
  return x[:, ~np.eye(y, dtype=bool)].reshape(-1, y, y - 1)


def near(a, b, atol=1e-9):
  np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# Steps 0 and 1: the objective and its maximiser


def test_gradient_ascent_from_any_start_ends_at_the_tilted_reference():
  reference, rewards = world()
  best = tabular.optimal_policy(reference, rewards, BETA)
  near(jnp.exp(best).sum(axis=-1), 1)
  values = jax.vmap(tabular.objective, (0, None, None, None))
  lack = lambda logits: -values(logits, reference, rewards, BETA).sum()
  starts = 2 * table(1, 6, X, Y)
  for end in log_softmax(descend(lack, starts, steps=10000, rate=3.0)):
    assert tabular.kl(best, end).max() < 1e-8


def test_a_policy_falls_short_by_beta_times_its_kl_to_the_optimum():
  reference, rewards = world()
  best = tabular.optimal_policy(reference, rewards, BETA)
  value = lambda x: tabular.objective(x, reference, rewards, BETA)
  scales = jnp.logspace(-3, 1, 500)[:, None, None]
  others = log_softmax(best + scales * table(2, 500, X, Y))
  lacking = value(best) - jax.vmap(value)(others)
  assert (lacking > 0).all()
  near(lacking, BETA * jax.vmap(tabular.kl, (0, None))(others, best).mean(-1))


def test_the_optimum_is_worth_beta_log_z():
  reference, rewards = world()
  best = tabular.optimal_policy(reference, rewards, BETA)
  z = (jnp.exp(reference) * jnp.exp(rewards / BETA)).sum(axis=-1)
  near(tabular.log_partition(reference, rewards, BETA), jnp.log(z))
  near(
    tabular.objective(best, reference, rewards, BETA),
    BETA * jnp.log(z).mean(),
  )


def test_a_larger_beta_keeps_nearer_to_the_reference_and_earns_less():
  reference, rewards = world()
  policies = [
    tabular.optimal_policy(reference, rewards, beta)
    for beta in (1e-3, 0.03, 0.1, 0.3, 1.0, 3.0, 1e6)
  ]
  distances = jnp.array([tabular.kl(p, reference) for p in policies])
  earned = jnp.array([(jnp.exp(p) * rewards).sum(axis=-1) for p in policies])
  assert (jnp.diff(distances, axis=0) < 0).all()
  assert (jnp.diff(earned, axis=0) < 0).all()
  near(earned[0], rewards.max(axis=-1))  # beta -> 0: the best response
  near(policies[-1], reference, atol=1e-5)  # beta -> infinity: nothing learnt


# Steps 2 and 3: the inversion, and preferences in which log Z cancels


def test_log_ratios_of_the_optimum_are_the_reward_less_beta_log_z():
  reference, rewards = world()
  best = tabular.optimal_policy(reference, rewards, BETA)
  missing = rewards - tabular.implicit_reward(best, reference, BETA)
  near(jnp.ptp(missing, axis=-1), 0)
  near(missing[:, 0], BETA * tabular.log_partition(reference, rewards, BETA))


def test_preferences_by_reward_and_by_log_ratio_of_the_optimum_agree():
  reference, rewards = world()
  best = tabular.optimal_policy(reference, rewards, BETA)
  implicit = tabular.implicit_reward(best, reference, BETA)
  near(
    tabular.bradley_terry(rewards), tabular.bradley_terry(implicit), atol=1e-14
  )


def test_a_bonus_for_the_prompt_changes_neither_optimum_nor_preferences():
  reference, rewards = world()
  richer = rewards + jnp.array([[7.0], [-3.0]])
  near(
    tabular.optimal_policy(reference, rewards, BETA),
    tabular.optimal_policy(reference, richer, BETA),
  )
  near(tabular.bradley_terry(rewards), tabular.bradley_terry(richer))


# Step 4: the loss and its gradient


@pytest.mark.parametrize(("seed", "beta"), [(0, BETA), (1, BETA), (2, 0.05)])
def test_dpo_on_bradley_terry_preferences_ends_at_the_optimum(seed, beta):
  reference, rewards = world(seed)
  shown = sigmoid(table(seed, Y, Y))  # some pairs more often than others
  weights = (shown + shown.T) * tabular.bradley_terry(rewards)
  loss = losses.make("dpo", beta=beta)
  policy = trained(loss, reference, weights, start=table(seed + 10))
  best = tabular.optimal_policy(reference, rewards, beta)
  assert tabular.kl(best, policy).max() < 1e-8


def test_the_gradient_of_dpo_weighs_pairs_by_how_wrong_they_are():
  reference, rewards = world()
  logits, weights = table(3), tabular.bradley_terry(rewards)
  weights = jnp.where(np.eye(Y, dtype=bool), 0.0, weights)
  loss = losses.make("dpo", beta=BETA)
  implicit = tabular.implicit_reward(log_softmax(logits), reference, BETA)
  wrongness = sigmoid(implicit[:, None, :] - implicit[:, :, None])  # r_l - r_w
  slopes = quick_jit(jax.jacobian(log_softmax))(logits)  # f[X Y, X Y]
  difference = slopes[:, :, None] - slopes[:, None, :]  # of log pi_w - log pi_l
  expected = -BETA * np.einsum(
    "xwl,xwlab->ab", weights / weights.sum() * wrongness, difference
  )
  found = compiled(loss, jax.grad)(logits, reference, weights)
  near(found, expected, atol=1e-14)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_at_the_reference_dpo_is_log_2_with_half_beta_of_the_difference(beta):
  reference, _ = world()
  weights = jnp.zeros((X, Y, Y)).at[1, 2, 0].set(1.0)  # one pair: 2 over 0
  loss = losses.make("dpo", beta=beta)
  gap = lambda logits: log_softmax(logits)[1, 2] - log_softmax(logits)[1, 0]
  near(mean_loss(loss, reference, reference, weights), math.log(2), atol=1e-15)
  slope = compiled(loss, jax.grad)(reference, reference, weights)
  near(slope, -beta / 2 * quick_jit(jax.grad(gap))(reference))


# Maximum likelihood: what DPO inherits from Bradley and Terry


def counted(seed, x=X, y=Y):
  """Finite counts f[x y y] that no rewards explain: every pair both ways."""
  rng = np.random.default_rng(seed)
  return jnp.array(rng.integers(1, 30, (x, y, y)), float)


def fitted_rewards(weights):
  loss = losses.make("reward")
  mean = lambda scores: tabular.expected_loss(loss, scores, scores, weights)
  return minimum(mean, jnp.zeros(weights.shape[:2]))


def test_a_reward_model_on_exact_preferences_finds_the_reward():
  _, rewards = world()
  found = fitted_rewards(tabular.bradley_terry(rewards))
  near(centred(found), centred(rewards))


def test_a_reward_model_and_a_policy_fit_the_same_preferences():
  reference, _ = world()
  weights = counted(4)
  scores = fitted_rewards(weights)
  policy = trained(losses.make("dpo", beta=BETA), reference, weights)
  implicit = tabular.implicit_reward(policy, reference, BETA)
  near(tabular.bradley_terry(implicit), tabular.bradley_terry(scores))


def test_a_reward_model_and_its_exact_optimum_are_dpo_in_two_stages():
  reference, _ = world()
  weights = counted(5)
  second = tabular.optimal_policy(reference, fitted_rewards(weights), BETA)
  near(second, trained(losses.make("dpo", beta=BETA), reference, weights))


def test_the_wins_expected_of_each_response_are_those_observed():
  reference, _ = world()
  wins = counted(6)
  policy = trained(losses.make("dpo", beta=BETA), reference, wins)
  fit = tabular.bradley_terry(tabular.implicit_reward(policy, reference, BETA))
  games = wins + wins.swapaxes(1, 2)
  near(off_diagonal(games * fit).sum(axis=-1), off_diagonal(wins).sum(axis=-1))


def test_the_curvature_at_the_optimum_is_the_fisher_information():
  reference, rewards = world(x=1)
  best = tabular.optimal_policy(reference, rewards, BETA)
  chances = tabular.bradley_terry(rewards)
  loss = losses.make("dpo", beta=BETA)
  curvature = compiled(loss, jax.hessian)(best, reference, chances)
  score = np.zeros((Y, Y))  # variance of the gradient of one pair's loss
  for i, j in itertools.permutations(range(Y), 2):
    side = BETA * (np.eye(Y)[i] - np.eye(Y)[j])
    p = chances[0, i, j]
    score += p * (1 - p) ** 2 * np.outer(side, side) / math.comb(Y, 2)
  near(curvature.reshape(Y, Y), score)


DATASETS = 1200


@functools.lru_cache
def estimates(sizes, seed=0):
  """Policies fitted to sampled preferences among the responses of one prompt.

  Args:
    sizes: numbers of preferences; as many of the `DATASETS` with each.
    seed: of the sampling.

  Returns:
    Errors of the implicit rewards, f[len(sizes) n Y], and the covariances that
    theory gives them, f[len(sizes) n Y Y]: the inverse of the curvature of the
    log-likelihood, each at its estimate.
  """
  reference, rewards = world(x=1)
  chances = np.where(np.eye(Y), 0.0, tabular.bradley_terry(rewards)[0])
  cells = (chances / chances.sum()).reshape(-1)
  rng = np.random.default_rng(seed)
  counts = [rng.multinomial(n, cells, DATASETS // len(sizes)) for n in sizes]
  counts = np.concatenate(counts).reshape(DATASETS, 1, Y, Y)
  error, covariance, slope = sampler()(counts.astype(float), reference, rewards)
  assert slope.max() < 1e-9
  shape = (len(sizes), -1, Y)
  return error.reshape(shape), covariance.reshape(*shape, Y)


@functools.lru_cache
def sampler():
  loss = losses.make("dpo", beta=BETA)

  def estimate(wins, reference, rewards):
    mean = lambda logits: tabular.expected_loss(
      loss, log_softmax(logits), reference, wins
    )
    logits, slope = tabular.fit(mean, reference, tolerance=1e-9)
    # Curvature in the rewards, which are beta times the logits.
    information = wins.sum() * jax.hessian(mean)(logits).reshape(Y, Y) / BETA**2
    implicit = tabular.implicit_reward(logits, reference, BETA)
    error = centred(implicit) - centred(rewards)
    # Only differences of rewards are known, so this is the inverse on tables
    # that add up to 0.
    one = jnp.ones((Y, Y)) / Y
    return error[0], jnp.linalg.inv(information + one) - one, slope

  return quick_jit(jax.vmap(estimate, (0, None, None)))


def test_the_error_falls_like_one_over_the_root_of_the_pairs():
  sizes = (400, 1600, 6400, 25600)
  error, _ = estimates(sizes)
  rms = np.sqrt((error**2).mean(axis=(1, 2)))
  slope, _ = np.polyfit(np.log(sizes), np.log(rms), 1)
  # Each size has about 900 independent squares: its root mean is known to 2.5 %
  # and the slope, over a factor of 64, to about 0.01.
  assert abs(slope + 0.5) < 0.04


def test_errors_are_normal_with_the_inverse_information_as_covariance():
  error, covariance = (x[0] for x in estimates((3000,)))
  tolerance = 4 * math.sqrt(0.95 * 0.05 / DATASETS)
  for i, j in itertools.combinations(range(Y), 2):
    side = np.eye(Y)[i] - np.eye(Y)[j]
    z = error @ side / np.sqrt(covariance @ side @ side)
    assert abs((abs(z) < 1.959964).mean() - 0.95) < tolerance
    assert abs(z.mean()) < 4 / math.sqrt(DATASETS) + 0.02  # biased by 1/root n
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * DATASETS)
  # All at once: chi-squared of Y - 1 = 3, 95 % of it below 7.8147.
  precision = np.linalg.inv(covariance + np.ones((Y, Y)) / Y)
  square = np.einsum("di,dij,dj->d", error, precision, error)
  assert abs((square < 7.814728).mean() - 0.95) < tolerance


# What Bradley-Terry cannot say


def cycle(p):
  """Rock, paper, scissors: each beats the next with probability p."""
  beats = jnp.array([[0.5, p, 1 - p], [1 - p, 0.5, p], [p, 1 - p, 0.5]])
  return beats[None]


@pytest.mark.parametrize("p", [0.6, 0.9, 1.0])
def test_a_cycle_leaves_dpo_at_the_reference_with_a_loss_of_log_2(p):
  reference, _ = world(x=1, y=3)
  loss = losses.make("dpo", beta=BETA)
  policy = trained(loss, reference, cycle(p), start=table(8, 1, 3))
  near(policy, reference)
  near(mean_loss(loss, policy, reference, cycle(p)), math.log(2), atol=1e-15)


def test_what_no_reward_explains_is_left_over_as_a_kl():
  # The fit is a projection: the KL of a tournament to any Bradley-Terry model
  # is its KL to the fit and that of the fit to the model, added.
  reference, _ = world()
  wins = counted(9)
  games = wins + wins.swapaxes(1, 2)
  observed = wins / games
  loss = losses.make("dpo", beta=BETA)
  policy = trained(loss, reference, wins)
  implicit = tabular.implicit_reward(policy, reference, BETA)
  fit = tabular.bradley_terry(implicit)
  share = off_diagonal(games / 2)
  share /= share.sum()

  def distance(p, q):
    p, q = off_diagonal(p), off_diagonal(q)
    bits = p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
    return (share * bits).sum()

  p = off_diagonal(observed)
  entropy = -(share * (p * jnp.log(p) + (1 - p) * jnp.log(1 - p))).sum()
  residual = mean_loss(loss, policy, reference, wins) - entropy
  near(residual, distance(observed, fit))
  assert residual > 0.01
  for seed in range(20):
    other = tabular.bradley_terry(implicit + table(seed))
    near(distance(observed, other), residual + distance(fit, other))


def test_flipped_labels_bias_dpo_and_robust_undoes_them():
  reference, rewards = world()
  rate = 0.2
  clean = tabular.bradley_terry(rewards)
  flipped = (1 - rate) * clean + rate * clean.swapaxes(1, 2)
  dpo = losses.make("dpo", beta=BETA)
  robust = losses.make("robust", beta=BETA, label_smoothing=rate)
  best = tabular.optimal_policy(reference, rewards, BETA)
  for seed in range(5):  # unbiased at every policy, not at the optimum alone
    policy = log_softmax(table(seed))
    near(
      mean_loss(robust, policy, reference, flipped),
      mean_loss(dpo, policy, reference, clean),
    )
  near(trained(robust, reference, flipped), best)
  misled = trained(dpo, reference, flipped)
  assert (tabular.kl(misled, reference) < tabular.kl(best, reference)).all()
  assert tabular.kl(misled, best).min() > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_smoothing_is_training_on_labels_flipped_at_that_rate(rate):
  reference, rewards = world()
  clean = tabular.bradley_terry(rewards)
  flipped = (1 - rate) * clean + rate * clean.swapaxes(1, 2)
  dpo = losses.make("dpo", beta=BETA)
  smoothed = losses.make("dpo", beta=BETA, label_smoothing=rate)
  for seed in range(5):
    policy = log_softmax(table(seed))
    near(
      mean_loss(smoothed, policy, reference, clean),
      mean_loss(dpo, policy, reference, flipped),
    )


def sure():
  """Two responses, the first always preferred."""
  return jnp.array([[[0.0, 1.0], [0.0, 0.0]]])


def gap(policy, reference):
  """Difference of the log-ratios of two responses, f[1 2] -> f[]."""
  return (policy - reference)[0] @ np.array([1.0, -1.0])


def test_smoothing_stops_a_sure_pair_at_the_log_odds_of_its_label():
  reference, rate = world(x=1, y=2)[0], 0.2
  smoothed = losses.make("dpo", beta=BETA, label_smoothing=rate)
  policy = trained(smoothed, reference, sure())
  near(gap(policy, reference), math.log((1 - rate) / rate) / BETA)


# IPO, and the win rate


def sure_pair_loss(name, reference):
  mean = mean_of(losses.make(name, beta=BETA))
  return lambda logits: mean(logits, reference, sure())


def test_dpo_on_a_sure_pair_grows_by_log_ten_in_ten_times_the_steps():
  reference, _ = world(x=1, y=2)
  mean = sure_pair_loss("dpo", reference)
  margins = []
  logits = reference
  for steps in (1000, 9000, 90000):  # up to 1e3, 1e4, 1e5
    logits = descend(mean, logits, steps, rate=5.0)
    margins.append(BETA * gap(log_softmax(logits), reference))
  near(jnp.diff(jnp.array(margins)), math.log(10), atol=0.01)


def test_ipo_on_a_sure_pair_stops_at_half_over_beta():
  reference, _ = world(x=1, y=2)
  mean = sure_pair_loss("ipo", reference)
  for steps in (100, 10000):
    end = descend(mean, reference, steps, rate=0.1)
    near(gap(log_softmax(end), reference), 1 / (2 * BETA))


def win_rate(chances):
  """Probability to be preferred to a uniformly drawn response, f[X Y]."""
  return chances.mean(axis=-1)  # the diagonal is one half


def test_ipo_maximises_the_win_rate_under_the_kl():
  # Whatever the preferences: these come from no reward.
  reference, _ = world()
  wins = counted(10)
  chances = jnp.where(np.eye(Y), 0.5, wins / (wins + wins.swapaxes(1, 2)))
  policy = trained(losses.make("ipo", beta=BETA), reference, chances)
  best = tabular.optimal_policy(reference, win_rate(chances), BETA)
  assert tabular.kl(best, policy).max() < 1e-8


def test_sppo_pulls_each_log_ratio_to_its_win_rate_less_one_half():
  # Free log-ratios: the paper takes log Z to be 1 / (2 beta) and leaves it out.
  _, rewards = world()
  chances = tabular.bradley_terry(rewards)
  mean = lambda h: tabular.expected_loss(
    losses.make("sppo", beta=BETA), h, jnp.zeros_like(h), chances
  )
  found = minimum(mean, jnp.zeros((X, Y)))
  against_others = off_diagonal(chances).mean(axis=-1)
  near(found, (against_others - 0.5) / BETA)


# Other divergences


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_scores_are_the_derivatives_of_their_divergence(divergence):
  reference, alpha = world()[0], 0.3
  policy = log_softmax(table(11))
  # By the policy's probability, not its logarithm: d/dp of ref f(p / ref).
  total = lambda p: tabular.f_divergence(
    jnp.log(p), reference, divergence, alpha
  ).sum()
  slope = quick_jit(jax.grad(total))(jnp.exp(policy))
  score = losses.divergence_score(policy - reference, divergence, alpha)
  near(jnp.ptp(slope - score, axis=-1), 0)
  assert (tabular.f_divergence(policy, reference, divergence, alpha) > 0).all()
  near(tabular.f_divergence(reference, reference, divergence, alpha), 0)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES[1:])
def test_dpo_under_a_divergence_maximises_the_reward_under_it(divergence):
  reference, rewards = world()
  lack = lambda logits: (
    -tabular.objective(logits, reference, rewards, BETA, divergence)
  )
  best = log_softmax(minimum(lack, table(12)))
  loss = losses.make("dpo", beta=BETA, divergence=divergence)
  policy = trained(loss, reference, tabular.bradley_terry(rewards))
  assert tabular.kl(best, policy).max() < 1e-8
  score = BETA * losses.divergence_score(policy - reference, divergence)
  near(jnp.ptp(rewards - score, axis=-1), 0)


# Rankings


def orders(y=Y):
  return jnp.array(list(itertools.permutations(range(y))))


def test_pairs_within_drawn_rankings_are_bradley_terry():
  _, rewards = world()
  chances = jnp.exp(tabular.plackett_luce(rewards, orders()))
  near(chances.sum(axis=-1), 1)
  place = jnp.argsort(orders(), axis=-1)
  before = place[:, :, None] < place[:, None, :]  # [R Y Y]
  found = jnp.einsum("xr,rij->xij", chances, before.astype(float))
  near(off_diagonal(found), off_diagonal(tabular.bradley_terry(rewards)))


def test_a_ranking_of_two_is_a_pair():
  policy, reference = table(13), table(14)
  two = quick_jit(losses.make("plackett_luce", beta=BETA))(
    policy[:, :2], reference[:, :2], jnp.ones((X, 2))
  )
  pair = quick_jit(losses.make("dpo", beta=BETA))(
    *policy[:, :2].T, *reference[:, :2].T
  )
  near(two.loss, pair.loss, atol=1e-14)


def test_rankings_drawn_by_the_reward_end_at_the_optimum():
  reference, rewards = world()
  chances = jnp.exp(tabular.plackett_luce(rewards, orders()))

  def mean(logits):
    out = losses.plackett_luce(
      log_softmax(logits)[:, orders()],
      reference[:, orders()],
      jnp.ones((X, len(orders()), Y)),
      beta=BETA,
    )
    return (chances * out.loss).sum()

  best = tabular.optimal_policy(reference, rewards, BETA)
  policy = log_softmax(minimum(mean, reference))
  assert tabular.kl(best, policy).max() < 1e-8


# Length


def test_r_dpo_finds_the_optimum_of_a_reward_that_length_lowers():
  reference, rewards = world()
  lengths = jnp.array([[3.0, 9.0, 1.0, 6.0], [2.0, 2.0, 8.0, 5.0]])
  weights = tabular.bradley_terry(rewards)  # people like what they like
  loss = losses.make("r_dpo", beta=BETA, alpha=0.1)
  policy = trained(loss, reference, weights, lengths=lengths)
  best = tabular.optimal_policy(reference, rewards - 0.1 * lengths, BETA)
  assert tabular.kl(best, policy).max() < 1e-8
  plain = tabular.optimal_policy(reference, rewards, BETA)
  mean_length = lambda p: (jnp.exp(p) * lengths).sum(axis=-1)
  assert (mean_length(policy) < mean_length(plain)).all()


# KTO, ORPO and the rest: the right way


def test_from_a_uniform_reference_all_but_discopop_start_up_the_reward():
  _, rewards = world()
  reference = uniform()
  data = {
    "paired": tabular.bradley_terry(rewards),
    "unpaired": sigmoid(rewards),
  }
  wrong, checked = set(), set()
  uphill = centred(rewards)  # the slope of E[r], up to a factor
  for name in losses.names():
    loss = losses.make(name)
    ours = loss.terms[0].entry.function.__module__.startswith("dpo_jax.")
    if not ours or loss.kind not in data or loss.needs_scores:
      continue
    checked.add(name)
    slope = compiled(loss, jax.grad)(reference, reference, data[loss.kind])
    if (slope * uphill).sum() >= 0:
      wrong.add(name)
  assert checked >= {"dpo", "ipo", "kto", "orpo", "simpo", "apo_zero", "nca"}
  # Its slope at a margin of 0 is upward by construction (2406.08414).
  assert wrong == {"discopop"}


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "apo_zero", "nca"])
def test_a_step_raises_the_chosen_and_lowers_the_rejected(name):
  reference, _ = world()
  weights = jnp.zeros((X, Y, Y)).at[1, 2, 0].set(1.0)
  loss = losses.make(name)
  slope = compiled(loss, jax.grad)(reference, reference, weights)
  moved = log_softmax(reference - 0.01 * slope / jnp.abs(slope).max())
  assert moved[1, 2] > reference[1, 2]
  assert moved[1, 0] < reference[1, 0]
  near(moved[0], reference[0])  # another prompt


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
@pytest.mark.parametrize("liked", [True, False])
def test_a_step_raises_what_is_liked_and_lowers_what_is_not(name, liked):
  reference, _ = world()
  # The others are as often liked as not, and pull nowhere.
  labels = jnp.full((X, Y), 0.5).at[1, 2].set(float(liked))
  slope = compiled(losses.make(name), jax.grad)(reference, reference, labels)
  moved = log_softmax(reference - 0.1 * slope)
  assert (moved[1, 2] > reference[1, 2]) == liked


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_kto_counts_a_log_ratio_equal_to_the_kl_as_one_half(beta):
  kl = jnp.full(2, 1.5)  # so beta multiplies z0 as it does h
  out = losses.kto(kl, 0 * kl, kl, 0 * kl, jnp.array([True, False]), beta=beta)
  near(out.loss, 0.5)


def test_kto_keeps_what_most_people_like_and_drops_the_rest():
  reference, _ = world()
  liked = jnp.array([[0.55, 0.9, 0.45, 0.1], [0.9, 0.55, 0.6, 0.4]])
  kto = mean_of(losses.make("kto", beta=BETA))
  mean = lambda logits: kto(logits, reference, liked)
  few, many = (
    log_softmax(descend(mean, reference, steps, rate=2.0))
    for steps in (1000, 10000)
  )
  drop = liked < 0.5
  assert (many - few < math.log(0.2))[drop].all()  # as one over the steps
  assert many[drop].max() < math.log(1e-3)
  assert many[~drop].min() > math.log(1e-2)
  # What is kept is not in order: here 0.55 rises above 0.6.
  ratio = many - reference
  assert ratio[1, 1] > ratio[1, 2]


def test_orpo_ends_with_probabilities_in_the_order_of_the_rewards():
  for seed in range(3):
    reference, rewards = world(seed)
    weights = tabular.bradley_terry(rewards)
    policy = trained(losses.make("orpo", lam=0.5), reference, weights)
    assert (jnp.argsort(policy) == jnp.argsort(rewards)).all()


def test_the_odds_ratio_of_orpo_alone_is_bradley_terry_on_log_odds():
  reference, rewards = world()
  weights = tabular.bradley_terry(rewards)
  both, likelihood = (
    mean_of(losses.make("orpo", lam=lam)) for lam in (1.0, 0.0)
  )
  ratio = lambda logits: (
    both(logits, reference, weights) - likelihood(logits, reference, weights)
  )
  policy = log_softmax(minimum(ratio, reference))
  log_odds = policy - jnp.log1p(-jnp.exp(policy))
  near(jnp.ptp(log_odds - rewards, axis=-1), 0)
