"""The method on a table: few responses, exact expectations, no sampling.

A policy is a table of log-probs f[X Y], one row for each of X prompts, which
count alike in means, over the same number Y of responses; so are a reference
and rewards. What is proved about the losses is tested on such tables
(tests/test_theory.py, docs/derivation.md). Use float64: `jax.enable_x64(True)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax import losses


def kl(p_logps: jax.Array, q_logps: jax.Array) -> jax.Array:
  """KL(p || q) of each row, f[X Y] -> f[X]."""
  return (jnp.exp(p_logps) * (p_logps - q_logps)).sum(axis=-1)


def f_divergence(
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  divergence: str = "reverse_kl",
  alpha: float = 0.5,
) -> jax.Array:
  """D_f(pi || ref) = sum_y ref f(pi / ref), f[X Y] -> f[X].

  f is that of Wang et al. 2023 (2309.16240), and f(1) = 0;
  `losses.divergence_score` is its derivative. alpha lies in (0, 1).

  Raises:
    KeyError: no divergence of that name.
  """
  log_u = policy_logps - reference_logps
  u = jnp.exp(log_u)
  f = {
    "reverse_kl": u * log_u,
    "forward_kl": -log_u,
    "js": u * log_u - (1 + u) * jnp.log((1 + u) / 2),
    "alpha": (jnp.exp(alpha * log_u) / alpha - u) / (alpha - 1) + 1 / alpha,
  }
  return (jnp.exp(reference_logps) * f[divergence]).sum(axis=-1)


def objective(
  logits: jax.Array,
  reference_logps: jax.Array,
  rewards: jax.Array,
  beta: float,
  divergence: str = "reverse_kl",
) -> jax.Array:
  """What alignment maximises, Rafailov et al. 2023 (2305.18290), eq. 3.

      E_x [ E_{y ~ pi}[r(x, y)] - beta * D(pi(.|x) || ref(.|x)) ]

  Tables f[X Y] -> f[]; pi = softmax(logits); KL(pi || ref) is "reverse_kl".
  """
  policy = jax.nn.log_softmax(logits)
  distance = f_divergence(policy, reference_logps, divergence)
  return ((jnp.exp(policy) * rewards).sum(axis=-1) - beta * distance).mean()


def log_partition(
  reference_logps: jax.Array, rewards: jax.Array, beta: float
) -> jax.Array:
  """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta), f[X Y] -> f[X]."""
  return jax.nn.logsumexp(reference_logps + rewards / beta, axis=-1)


def optimal_policy(
  reference_logps: jax.Array, rewards: jax.Array, beta: float
) -> jax.Array:
  """log pi* = log ref + r / beta - log Z, f[X Y]; 2305.18290, eq. 4."""
  z = log_partition(reference_logps, rewards, beta)
  return reference_logps + rewards / beta - z[:, None]


def implicit_reward(
  policy_logps: jax.Array, reference_logps: jax.Array, beta: float
) -> jax.Array:
  """beta log(pi / ref), f[X Y]: r - beta log Z at pi*; 2305.18290, eq. 5."""
  return beta * (policy_logps - reference_logps)


def bradley_terry(rewards: jax.Array) -> jax.Array:
  """P(i is preferred to j) = sigmoid(r_i - r_j), f[X Y] -> f[X Y Y]."""
  return jax.nn.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def plackett_luce(rewards: jax.Array, orders: jax.Array) -> jax.Array:
  """Log-prob of rankings i[R Y], best first, each place drawn by softmax of the
  rewards f[X Y] from those left; f[X R]."""
  ranked = rewards[:, orders]
  left = jax.lax.cumlogsumexp(ranked, axis=2, reverse=True)
  return (ranked - left).sum(axis=-1)


def expected_loss(
  loss: losses.Loss,
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  weights: jax.Array,
  lengths: jax.Array | None = None,
) -> jax.Array:
  """Mean of a paired loss over all ordered pairs of different responses, f[].

  Args:
    loss: of pairs, or of scores.
    policy_logps: f[X Y]; of a reward model, its scores.
    reference_logps: f[X Y].
    weights: f[X Y Y], how often i is chosen and j rejected: probabilities or
      counts, of any total. The diagonal is not read.
    lengths: f[X Y], tokens of each response; None: 1 each.
  """
  tables = {
    "policy_{}_logps": policy_logps,
    "reference_{}_logps": reference_logps,
    "{}_lengths": jnp.ones_like(policy_logps) if lengths is None else lengths,
    "{}_scores": policy_logps,
  }
  inputs = {}
  for name, table in tables.items():
    sides = {"chosen": table[:, :, None], "rejected": table[:, None, :]}
    for side, values in sides.items():
      inputs[name.format(side)] = jnp.broadcast_to(values, weights.shape)
  weights = jnp.where(jnp.eye(weights.shape[-1], dtype=bool), 0.0, weights)
  return losses.reduce(loss(**inputs), weights)["loss"].mean()


def expected_label_loss(
  loss: losses.Loss,
  policy_logps: jax.Array,
  reference_logps: jax.Array,
  liked: jax.Array,
) -> jax.Array:
  """Mean of an unpaired loss, f[], every response labelled equally often.

  liked f[X Y] is the probability of the label "desirable". KTO's z0 is the mean
  of KL(pi || ref) over prompts, exact instead of estimated.
  """
  weights = jnp.stack([liked, 1 - liked])
  table = lambda x: jnp.broadcast_to(x, weights.shape)
  out = loss(
    policy_logps=table(policy_logps),
    reference_logps=table(reference_logps),
    policy_kl_logps=table(kl(policy_logps, reference_logps)[:, None]),
    reference_kl_logps=jnp.zeros_like(weights),
    desirable=table(jnp.array([True, False])[:, None, None]),
    weights=weights,
  )
  return losses.reduce(out, weights)["loss"].mean()


def fit(
  function: Callable[[jax.Array], jax.Array],
  start: jax.Array,
  *,
  tolerance: float = 1e-12,
  max_steps: int = 200,
) -> tuple[jax.Array, jax.Array]:
  """Minimises f[X Y] -> f[] by Newton's method, damped where that overshoots.

  Curvatures enter by their size, so that a saddle is left downhill; along flat
  directions, as that of a constant added to logits, nothing moves. Returns the
  table and the largest entry of the gradient there, which is above `tolerance`
  if `max_steps` came first, as when there is no minimum.
  """
  flat = lambda x: function(x.reshape(start.shape))
  slack = 4 * jnp.finfo(start.dtype).eps

  def slope_and_all(x):
    value, gradient = jax.value_and_grad(flat)(x)
    return gradient, (x, value, gradient)

  def unfinished(state):
    (_, _, gradient, _), _, _, step = state
    return (jnp.abs(gradient).max() > tolerance) & (step < max_steps)

  def newton(state):
    best, trial, damping, step = state
    hessian, known = jax.jacfwd(slope_and_all, has_aux=True)(trial)
    better = known[1] <= best[1] + slack * (1 + jnp.abs(best[1]))
    pick = lambda new, old: jnp.where(better, new, old)
    best = jax.tree.map(pick, (*known, hessian), best)
    damping = jnp.maximum(damping * jnp.where(better, 0.1, 10.0), 1e-10)
    x, _, gradient, hessian = best
    curvature, axes = jnp.linalg.eigh(hessian)
    move = axes @ ((axes.T @ gradient) / (jnp.abs(curvature) + damping))
    return best, x - move, damping, step + 1

  x = start.reshape(-1)
  inf = jnp.full_like(x, jnp.inf)
  nothing = (x, inf[0], inf, jnp.zeros((x.size, x.size), x.dtype))
  state = (nothing, x, jnp.asarray(0.1, x.dtype), 0)
  (x, _, gradient, _), *_ = jax.lax.while_loop(unfinished, newton, state)
  return x.reshape(start.shape), jnp.abs(gradient).max()
