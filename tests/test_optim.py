"""Schedules, weight decay and clipping, against steps computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import optim, sharding
from dpo_jax.errors import ConfigError
from dpo_jax.models import llama


def rates(steps, **settings):
  schedule = optim.make_schedule(2.0, steps, **settings)
  return np.array([float(schedule(s)) for s in range(steps + 1)])


def test_constant_is_the_peak_from_the_first_step():
  np.testing.assert_array_equal(rates(5), 2.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_moves_at_once_and_reaches_the_peak_in_its_share(schedule):
  got = rates(20, schedule=schedule, warmup=0.25)
  np.testing.assert_allclose(got[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
  assert got.max() == pytest.approx(2.0)
  assert got[5] == pytest.approx(2.0)  # decay begins after the warm-up


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_linear_falls_by_equal_parts_to_its_end(warmup):
  got = rates(20, schedule="linear", warmup=warmup, final=0.1)
  falling = got[round(20 * warmup) :]
  np.testing.assert_allclose(
    falling, np.linspace(2.0, 0.2, len(falling)), rtol=1e-5
  )


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_cosine_falls_as_half_a_cosine_to_its_end(warmup):
  got = rates(20, schedule="cosine", warmup=warmup, final=0.1)
  falling = got[round(20 * warmup) :]
  turn = np.linspace(0, np.pi, len(falling))
  np.testing.assert_allclose(
    falling, 0.2 + 1.8 * (1 + np.cos(turn)) / 2, rtol=1e-5
  )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.99])
def test_a_run_of_one_step_moves(schedule, warmup):
  assert rates(1, schedule=schedule, warmup=warmup)[0] > 0


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"schedule": "cosin"}, ["'cosin'", "constant, linear, cosine"]),
    ({"warmup": 1.0}, ["optim.warmup=1.0", "[0, 1)"]),
    ({"warmup": -0.1}, ["optim.warmup=-0.1"]),
    ({"warmup": float("nan")}, ["optim.warmup=nan"]),
  ],
  ids=str,
)
def test_unknown_schedules_are_refused(settings, words):
  with pytest.raises(ConfigError) as error:
    optim.make_schedule(1.0, 10, **settings)
  assert all(word in str(error.value) for word in words)


def test_unknown_optimizers_are_refused():
  with pytest.raises(ConfigError, match="'adam' should be one of adamw, sgd"):
    optim.make(optax.constant_schedule(1.0), name="adam")


PARAMS = {
  "layers": {
    "mlp": {"up": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.ones(2)}},
    "mlp_norm": {"scale": jnp.array([3.0])},
  },
  "embed": jnp.array([[0.5, 4.0]]),
}


def run(tx, params, grads):
  """The parameters after one update for each gradient."""
  state = tx.init(params)
  for g in grads:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def close(left, right, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right
  )


def test_decay_pulls_matrices_and_leaves_scales_and_biases():
  tx = optim.make(optax.constant_schedule(0.1), weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  after = run(tx, PARAMS, [zeros])
  shrunk = 1 - 0.1 * 0.5
  wanted = {
    "layers": {
      "mlp": {
        "up": {
          "kernel": shrunk * PARAMS["layers"]["mlp"]["up"]["kernel"],
          "bias": PARAMS["layers"]["mlp"]["up"]["bias"],
        }
      },
      "mlp_norm": PARAMS["layers"]["mlp_norm"],
    },
    "embed": shrunk * PARAMS["embed"],
  }
  close(after, wanted, rtol=1e-6)


def test_decay_of_a_real_model_spares_what_is_no_matrix():
  config = llama.Config(8, 4, 4, 2, 2, 1, 2, attention_bias=True, mlp_bias=True)
  init = llama.Model(config).init_variables
  shapes = jax.eval_shape(init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  tx = optim.make(optax.constant_schedule(0.1), weight_decay=0.5)
  zeros = jax.tree.map(np.zeros_like, params)
  after = jax.jit(lambda params: run(tx, params, [zeros]))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(after):
    name = path[-1].key
    moved = bool((leaf != 1).all())
    assert moved == (name in ("kernel", "embed", "unembed")), path


def adamw_by_hand(x, grads, rate, b1, b2, epsilon, decay):
  x = np.asarray(x, np.float64)
  m = v = np.zeros_like(x)
  for t, g in enumerate(grads, 1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + epsilon)
    x = x - rate(t - 1) * (step + decay * x)
  return x


def test_adamw_takes_the_steps_of_its_formula():
  schedule = optim.make_schedule(0.1, 4, schedule="linear", warmup=0.5)
  settings = {"b1": 0.8, "b2": 0.95, "epsilon": 1e-3}
  tx = optim.make(schedule, **settings, weight_decay=0.3, clip_norm=0.0)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3)).astype(np.float32)
  grads = rng.normal(size=(4, 2, 3)).astype(np.float32) * 10
  after = run(tx, {"kernel": jnp.asarray(x)}, [{"kernel": g} for g in grads])
  wanted = adamw_by_hand(x, grads, schedule, **settings, decay=0.3)
  np.testing.assert_allclose(after["kernel"], wanted, rtol=1e-5)


def test_defaults_are_those_of_the_hugging_face_trainer():
  grads = [jax.tree.map(lambda x: 0.01 * x, PARAMS)] * 3
  mine = run(optim.make(optax.constant_schedule(0.1)), PARAMS, grads)
  theirs = run(
    optax.adamw(0.1, 0.9, 0.999, 1e-8, weight_decay=0.0), PARAMS, grads
  )
  close(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize(
  "clip, factor", [(1.0, 1 / 5), (10.0, 1.0), (0.0, 1.0)]
)
def test_the_global_gradient_norm_is_bounded(clip, factor):
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  grads = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}  # norm 5
  tx = optim.make(optax.constant_schedule(1.0), name="sgd", clip_norm=clip)
  after = run(tx, params, [grads])
  np.testing.assert_allclose(after["a"], -3.0 * factor, rtol=1e-6)
  np.testing.assert_allclose(after["b"], 4.0 * factor, rtol=1e-6)


def test_sgd_keeps_momentum_when_asked_to():
  tx = optim.make(
    optax.constant_schedule(1.0), name="sgd", momentum=0.5, clip_norm=0.0
  )
  after = run(tx, {"a": jnp.zeros(1)}, [{"a": jnp.ones(1)}] * 2)
  np.testing.assert_allclose(after["a"], -(1 + 1.5), rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "rmsprop"])
def test_every_optimizer_goes_down_and_reads_the_schedule(name):
  grads = [{"kernel": jnp.array([[1.0, -1.0]])}] * 2
  params = {"kernel": jnp.zeros((1, 2))}
  still = run(optim.make(lambda step: 0.0 * step, name=name), params, grads)
  close(still, params)
  after = run(optim.make(lambda step: 0.1 + 0 * step, name=name), params, grads)
  assert (np.sign(after["kernel"]) == [[-1, 1]]).all()


def test_rmsprop_adds_epsilon_to_the_root_as_torch_does():
  tx = optim.make(
    optax.constant_schedule(1.0),
    name="rmsprop", b2=0.99, epsilon=1e-8, clip_norm=0.0,
  )  # fmt: skip
  after = run(tx, {"a": jnp.zeros(1)}, [{"a": jnp.full(1, 1e-6)}])
  np.testing.assert_allclose(after["a"], -1e-6 / (1e-7 + 1e-8), rtol=1e-5)


@pytest.mark.parametrize("width", [16, 128])  # adafactor factors from 128 on
@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adafactor"])
def test_every_state_of_an_optimizer_has_a_place_on_the_mesh(name, width):
  config = llama.Config(
    vocab_size=width, width=width, ffn=width, layers=2, heads=2, kv_heads=1,
    head_dim=8, mlp_bias=True,
  )  # fmt: skip
  params = jax.eval_shape(llama.Model(config).init_variables, jax.random.key(0))
  tx = optim.make(optax.constant_schedule(0.1), name=name)
  state = jax.eval_shape(tx.init, params)
  placed = sharding.shard_tree(state, sharding.make_mesh())
  for leaf, place in zip(
    jax.tree.leaves(state), jax.tree.leaves(placed), strict=True
  ):
    assert len(place.spec) <= len(leaf.shape)


def test_adafactor_goes_down():
  params = {"kernel": jnp.ones((1, 2))}
  tx = optim.make(optax.constant_schedule(0.1), name="adafactor")
  after = run(tx, params, [{"kernel": jnp.array([[1.0, -1.0]])}])
  assert (np.sign(after["kernel"] - 1) == [[-1, 1]]).all()
