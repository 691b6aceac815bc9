"""Where PPO and GRPO end on a table, with exact expectations: next to DPO.

A response is two tokens of A kinds, so that a policy is a tree: f[X A] and
f[X A A] logits. All A * A responses of each prompt are laid out as [N 2].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax

from dpo_jax import losses, tabular

BETA = 0.4
X, A = 2, 3
N = X * A * A
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(seed, *shape):
  return jnp.array(np.random.default_rng(seed).normal(size=shape))


def tokens(tree):
  """Log-probs of both tokens of every response, f[N 2]."""
  first, second = map(log_softmax, tree)
  first = jnp.broadcast_to(first[:, :, None], second.shape)
  return jnp.stack([first.reshape(N), second.reshape(N)], axis=1)


def responses(tree):
  """Log-probs of responses, f[X A*A]."""
  return tokens(tree).sum(axis=1).reshape(X, A * A)


def world():
  """A reference as a tree, and rewards f[X A*A]."""
  return (draw(0, X, A), draw(1, X, A, A)), draw(2, X, A * A)


def values_of(table):
  """What a value model says before each token: f[X] and f[X A] -> f[N 2]."""
  first, second = table
  first = jnp.broadcast_to(first[:, None, None], (X, A, A))
  second = jnp.broadcast_to(second[:, :, None], (X, A, A))
  return jnp.stack([first.reshape(N), second.reshape(N)], axis=1)


def descend(loss, state, steps, rate):
  step = lambda _, x: jax.tree.map(
    lambda a, b: a - rate * b, x, jax.grad(loss)(x)
  )
  return jax.lax.fori_loop(0, steps, step, state)


def ppo(reference, rewards, *, lam, rounds=4000, epochs=4, rate=0.5):
  """PPO as it is done, but for the means, which are exact."""
  known = tokens(reference)
  lengths, mask = jnp.full(N, 2), jnp.ones((N, 2))

  def round_(_, state):
    tree, table = state
    old, old_values = tokens(tree), values_of(table)
    chances = jnp.exp(old.sum(axis=1))[:, None] / X
    shaped = losses.shaped_rewards(
      rewards.reshape(N), old, known, lengths, BETA
    )
    advantages, returns = losses.gae(shaped, old_values, mask, lam=lam)

    def loss(state):
      tree, table = state
      policy = losses.ppo_policy(tokens(tree), old, advantages)
      value = losses.ppo_value(values_of(table), old_values, returns)
      return (chances * (policy.loss + value.loss)).sum()

    return descend(loss, state, epochs, rate)

  start = (reference, (jnp.zeros(X), jnp.zeros((X, A))))
  return jax.lax.fori_loop(0, rounds, round_, start)[0]


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_ppo_ends_at_the_tilted_reference_as_dpo_does(lam):
  reference, rewards = world()
  start = responses(reference)
  best = tabular.optimal_policy(start, rewards, BETA)
  policy = responses(quick_jit(functools.partial(ppo, lam=lam))(*world()))
  assert tabular.kl(best, start).min() > 0.3  # there was a way to go
  assert tabular.kl(policy, best).max() < 1e-3
  assert tabular.kl(best, policy).max() < 1e-3

  mean = lambda logits: tabular.expected_loss(
    losses.make("dpo", beta=BETA), log_softmax(logits), start,
    tabular.bradley_terry(rewards),
  )  # fmt: skip
  found, slope = quick_jit(lambda x: tabular.fit(mean, x))(start)
  assert slope < 1e-11
  assert tabular.kl(log_softmax(found), best).max() < 1e-8


def grpo(reference, rewards, *, beta, price=0.0, rounds=3000, rate=0.5):
  """Groups that hold every response as often as it is likely; advantages
  without a scale. `price`: of k1, taken off the reward."""
  known = tokens(reference)

  def round_(_, tree):
    old = tokens(tree)
    chances = jnp.exp(old.sum(axis=1))[:, None] / X
    cost = losses.kl_estimate(old, known).sum(axis=1).reshape(X, A * A)
    shaped = rewards - price * cost
    mean = (jnp.exp(responses(tree)) * shaped).sum(axis=1, keepdims=True)
    advantages = (shaped - mean).reshape(N, 1)

    def loss(tree):
      out = losses.grpo(tokens(tree), old, known, advantages, beta=beta)
      return (chances * out.loss).sum()

    return descend(loss, tree, 2, rate)

  return jax.lax.fori_loop(0, rounds, round_, reference)


def test_with_the_kl_in_the_reward_grpo_ends_there_too():
  reference, rewards = world()
  run = functools.partial(grpo, beta=0.0, price=BETA)
  policy = responses(quick_jit(run)(reference, rewards))
  best = tabular.optimal_policy(responses(reference), rewards, BETA)
  assert tabular.kl(policy, best).max() < 1e-3


def slope_of(kind, policy, reference):
  """Mean gradient of an estimate over what the policy draws."""
  estimate = lambda logits: (
    jnp.exp(log_softmax(policy))
    * losses.kl_estimate(log_softmax(logits), log_softmax(reference), kind)
  ).sum()
  return jax.grad(estimate)(policy)


def test_as_losses_k1_does_nothing_k2_is_the_kl_and_k3_the_forward_kl():
  policy, reference = draw(3, X, A), draw(4, X, A)
  kl = lambda logits: tabular.kl(
    log_softmax(logits), log_softmax(reference)
  ).sum()
  forward = lambda logits: tabular.kl(
    log_softmax(reference), log_softmax(logits)
  ).sum()
  expected = (
    ("k1", jnp.zeros((X, A))),
    ("k2", jax.grad(kl)(policy)),
    ("k3", jax.grad(forward)(policy)),
  )
  for kind, slope in expected:
    np.testing.assert_allclose(
      slope_of(kind, policy, reference), slope, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_in_the_mean(kind):
  policy, reference = log_softmax(draw(5, X, A)), log_softmax(draw(6, X, A))
  mean = (jnp.exp(policy) * losses.kl_estimate(policy, reference, kind)).sum(1)
  np.testing.assert_allclose(mean, tabular.kl(policy, reference), atol=1e-12)


def test_with_k3_in_the_loss_grpo_ends_at_the_optimum_of_the_forward_kl():
  # One token, where the forward KL of the token is that of the response.
  reference, rewards = log_softmax(draw(7, X, A)), draw(8, X, A)

  def round_(_, logits):
    old = log_softmax(logits)
    chances = jnp.exp(old) / X
    baseline = (jnp.exp(old) * rewards).sum(axis=1, keepdims=True)

    def loss(logits):
      out = losses.grpo(
        log_softmax(logits), old, reference, rewards - baseline, beta=BETA
      )
      return (chances * out.loss).sum()

    return descend(loss, logits, 2, 0.5)

  run = lambda x: jax.lax.fori_loop(0, 3000, round_, x)
  policy = log_softmax(quick_jit(run)(reference))
  lack = lambda logits: (
    -tabular.objective(logits, reference, rewards, BETA, "forward_kl")
  )
  found, slope = quick_jit(lambda x: tabular.fit(lack, x))(reference)
  assert slope < 1e-11
  assert tabular.kl(policy, log_softmax(found)).max() < 1e-4
  tilted = tabular.optimal_policy(reference, rewards, BETA)
  assert tabular.kl(policy, tilted).max() > 1e-2  # another one
