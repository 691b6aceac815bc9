"""The routed MLP against a plain loop over tokens and their experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import grouped, moe

WIDTH, FFN = 12, 10


pytestmark = pytest.mark.usefixtures("compile_quickly")


def routed(experts=5, k=2, norm_topk=True, seed=0, dtype=jnp.float32):
  """(module, variables); weights large enough that experts differ."""
  module = moe.RoutedMLP(WIDTH, FFN, experts, k, norm_topk, param_dtype=dtype)
  shapes = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0),
      jnp.zeros((1, 1, WIDTH), dtype),
      jnp.ones((1, 1), bool),
    )
  )
  rng = np.random.default_rng(seed)
  return module, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, dtype), shapes
  )


def tokens(rows=3, length=17, seed=1, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(rows, length, WIDTH)), dtype)


def everywhere(x):
  return jnp.ones(x.shape[:2], bool)


def choices(params, x, k):
  """Router probabilities and the k likeliest experts, in double precision."""
  logits = np.float64(x) @ np.float64(params["router"]["kernel"])
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  ordered = np.sort(probs, axis=-1)[..., ::-1]
  if k < probs.shape[-1]:  # or float32 may choose another
    assert (ordered[..., k - 1] - ordered[..., k]).min() > 1e-6
  return probs, np.argsort(-probs, axis=-1, kind="stable")[..., :k]


def by_loop(variables, x, k, norm_topk):
  params = variables["params"]
  probs, chosen = choices(params, x, k)
  kernels = {n: np.float64(w["kernel"]) for n, w in params["experts"].items()}
  y = np.zeros(x.shape)
  for at in np.ndindex(x.shape[:2]):
    weights = probs[at][chosen[at]]
    if norm_topk:
      weights = weights / weights.sum()
    for weight, e in zip(weights, chosen[at]):
      gate, up = (np.float64(x[at]) @ kernels[n][e] for n in ("gate", "up"))
      y[at] += weight * (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][e]
  return y


def all_experts(variables, x, k, norm_topk):
  """Every expert on every token, and 0 for those that were not chosen."""
  params = variables["params"]
  probs = jax.nn.softmax(x @ params["router"]["kernel"])
  least = jnp.sort(probs, axis=-1)[..., -k, None]
  weights = jnp.where(probs >= least, probs, 0)
  if norm_topk:
    weights /= weights.sum(axis=-1, keepdims=True)
  gate, up, down = (
    params["experts"][n]["kernel"] for n in ("gate", "up", "down")
  )
  hidden = nn.silu(jnp.einsum("btd,edf->btef", x, gate))
  hidden *= jnp.einsum("btd,edf->btef", x, up)
  return jnp.einsum("btef,efd,bte->btd", hidden, down, weights)


SHAPES = [
  (5, 2, True),
  (5, 3, False),
  (5, 1, False),
  (4, 4, True),
  (1, 1, True),
]


@pytest.mark.parametrize(("experts", "k", "norm_topk"), SHAPES)
def test_a_token_is_the_weighted_sum_of_its_experts(experts, k, norm_topk):
  module, variables = routed(experts, k, norm_topk)
  x = tokens()
  y = module.apply(variables, x, everywhere(x))
  expected = by_loop(variables, x, k, norm_topk)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
  assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("length", [1, 200])  # one block, and many
@pytest.mark.parametrize(("experts", "k", "norm_topk"), SHAPES)
def test_gradients_are_those_of_every_expert_on_every_token(
  experts, k, norm_topk, length
):
  module, variables = routed(experts, k, norm_topk)
  x = tokens(2, length)
  g = tokens(2, length, seed=2)
  choices(variables["params"], x, k)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(run, variables, x):
    y, pull_back = jax.vjp(run, variables, x)
    return y, *pull_back(g)

  ours = gradients(lambda v, x: module.apply(v, x, everywhere(x)), variables, x)
  plain = gradients(lambda v, x: all_experts(v, x, k, norm_topk), variables, x)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6 * max(scale, 1))


def test_of_equally_likely_experts_the_first_are_chosen():
  module, variables = routed(5, 2)
  router = jnp.zeros((WIDTH, 5)).at[:, 0].set(-9.0)  # and expert 0 is unlikely
  variables["params"]["router"]["kernel"] = router
  x = jnp.abs(tokens())
  y = module.apply(variables, x, everywhere(x))
  kernels = jax.tree.map(lambda w: w[1:3], variables["params"]["experts"])
  both = {"router": {"kernel": jnp.zeros((WIDTH, 2))}, "experts": kernels}
  expected = all_experts({"params": both}, x, 2, True)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


def test_all_tokens_may_choose_one_expert_and_none_is_dropped():
  module, variables = routed(5, 1, norm_topk=True)
  router = jnp.zeros((WIDTH, 5)).at[:, 3].set(9.0)
  variables["params"]["router"]["kernel"] = router
  x = jnp.abs(tokens(4, 60))
  y = module.apply(variables, x, everywhere(x))
  np.testing.assert_allclose(
    y, by_loop(variables, x, 1, True), rtol=1e-5, atol=2e-6
  )
  assert np.abs(y).max(axis=-1).min() > 0


def test_a_token_is_what_it_is_alone():
  module, variables = routed()
  x = tokens()
  y = module.apply(variables, x, everywhere(x))
  other = x.at[:, 5:].set(tokens(seed=7)[:, 5:])
  there = everywhere(x).at[:, 5:].set(False)
  z = module.apply(variables, other, there)
  np.testing.assert_allclose(z[:, :5], y[:, :5], rtol=1e-6, atol=1e-6)
  for t in range(3):
    one = x[:1, t : t + 1]
    alone = module.apply(variables, one, everywhere(one))
    np.testing.assert_allclose(alone[0, 0], y[0, t], rtol=1e-6, atol=1e-6)


def test_bfloat16_is_near_float32_and_adds_gradients_up_in_float32():
  module, variables = routed(dtype=jnp.bfloat16)
  x, g = tokens(2, 400, dtype=jnp.bfloat16), tokens(2, 400, seed=3)

  def run(variables, x):
    y = module.apply(variables, x, everywhere(x))
    return (y * g).sum(), y

  (_, y), grads = jax.value_and_grad(run, has_aux=True)(variables, x)
  assert y.dtype == jnp.bfloat16
  wide = jax.tree.map(jnp.float32, (variables, x))
  (_, y_wide), grads_wide = jax.value_and_grad(run, has_aux=True)(*wide)
  # A token whose choice is near a tie would differ altogether.
  near = np.abs(y - y_wide).max(axis=-1) < 0.05 * np.abs(y_wide).max()
  assert near.mean() > 0.98
  for a, b in zip(
    jax.tree.leaves(grads["params"]["experts"]),
    jax.tree.leaves(grads_wide["params"]["experts"]),
  ):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("seed", range(4))
def test_a_layout_has_every_pick_once_in_a_block_of_its_group(seed):
  rng = np.random.default_rng(seed)
  rows, k, groups = rng.integers((1, 1, 4), (90, 4, 40)).tolist()
  likely = rng.dirichlet(np.full(groups, 0.3))
  chosen = np.stack(
    [rng.choice(groups, k, replace=False, p=likely / 2 + 0.5 / groups)
     for _ in range(rows)]
  )  # fmt: skip
  blocks = jax.tree.map(
    np.asarray, grouped.lay_out(jnp.asarray(chosen), groups)
  )
  size = grouped.block_size(rows * k, groups)
  assert blocks.source.size == blocks.group.size * size
  place = blocks.place.reshape(-1)
  assert len({*place}) == rows * k
  np.testing.assert_array_equal(blocks.group[place // size], chosen.reshape(-1))
  np.testing.assert_array_equal(blocks.source[place], np.arange(rows * k) // k)
  np.testing.assert_array_equal(blocks.pick[place, 0], np.arange(rows * k))
  empty = np.delete(np.arange(blocks.source.size), place)
  assert (blocks.source[empty] == rows).all()
  assert (blocks.pick[empty, 0] == rows * k).all()


@pytest.mark.parametrize(
  ("picks", "groups", "size"),
  [(1, 128, 8), (2048, 8, 64), (2**17, 128, 256), (2**20, 8, 512)],
)
def test_blocks_are_a_quarter_of_an_even_share(picks, groups, size):
  assert grouped.block_size(picks, groups) == size


def test_router_sums_count_the_tokens_that_are_there():
  module, variables = routed(5, 2)
  x = tokens()
  there = np.random.default_rng(5).random(x.shape[:2]) < 0.6
  there[2] = False
  y, sown = module.apply(variables, x, jnp.asarray(there), mutable=["router"])
  np.testing.assert_array_equal(y, module.apply(variables, x, there))
  probs, chosen = choices(variables["params"], x, 2)
  (load,), (sums,), (count,) = (
    sown["router"][name] for name in ("load", "probs", "tokens")
  )
  for row in range(3):
    votes = np.bincount(chosen[row][there[row]].reshape(-1), minlength=5)
    np.testing.assert_array_equal(load[row], votes)
  expected = (probs * there[..., None]).sum(axis=1)
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  np.testing.assert_array_equal(count, there.sum(axis=1))


def test_the_balancing_loss_is_that_of_switch_transformer():
  rng = np.random.default_rng(0)
  n, experts, k = 50, 6, 2  # tokens, in parts of 20 and 30
  probs = rng.dirichlet(np.ones(experts), n)
  chosen = np.argsort(-probs)[:, :k]
  votes = (chosen[..., None] == np.arange(experts)).sum(axis=1)
  expected = experts * sum(
    votes[:, e].mean() * probs[:, e].mean() for e in range(experts)
  )
  sums = lambda x: np.stack([x[:20].sum(0), x[20:].sum(0)]).astype(np.float32)
  load, mass = sums(votes), sums(probs)
  count = np.float32([20, 30])
  np.testing.assert_allclose(moe.balance(load, mass, count), expected, 1e-6)
  by_load, by_probs = jax.grad(moe.balance, (0, 1))(load, mass, count)
  np.testing.assert_array_equal(by_load, 0)
  share = votes.mean(axis=0) * experts / n
  np.testing.assert_allclose(by_probs, [share, share], rtol=1e-5)
  even = np.full((1, experts), 1.0)
  balanced = moe.balance(k * even, even, np.float32([experts]))
  np.testing.assert_allclose(balanced, k, rtol=1e-6)
  assert moe.balance(0 * load, 0 * mass, 0 * count) == 0
