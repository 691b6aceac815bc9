"""What patterns freeze and slow down: gradients, optimizer state, updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import optim
from dpo_jax.errors import ConfigError
from dpo_jax.trainable import Trainable, count, join


def variables(layers=3):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "params": {
      "embed": draw(5, 4),
      "norm": {"scale": draw(4)},
      "layers": {
        "mlp": {"up": {"kernel": draw(layers, 4, 6)}},
        "attention": {"q": {"kernel": draw(layers, 4, 2, 2)}},
      },
    }
  }


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }


UP = "params/layers/mlp/up/kernel"
Q = "params/layers/attention/q/kernel"


@pytest.mark.parametrize(
  ("freeze", "frozen"),
  [
    ("", set()),
    ("embed", {"params/embed"}),
    ("^norm/|mlp", {"params/norm/scale", UP}),
    (r"layers/\d/", {UP, Q}),
    ("^(?!.*attention)", {"params/embed", "params/norm/scale", UP}),
    ("layers/1/", set()),  # of a part of each array, which stays whole
  ],
)
def test_a_pattern_says_what_is_not_trained(freeze, frozen):
  whole = variables()
  trainable = Trainable(whole, freeze)
  trained, rest = trainable.split(whole)
  assert paths(rest) == frozen
  assert paths(trained) == paths(whole) - frozen
  for joined in (trainable.join(rest, trained), join(rest, trained)):
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
  assert count(trained) + count(rest) == count(whole)


def total(tree):
  return sum((x**2).sum() for x in jax.tree.leaves(tree))


def one_update(trainable, whole, **options):
  """What two updates of AdamW move, weight decay and all."""
  trained, frozen = trainable.split(whole)
  tx = optim.make(lambda _: 0.1, factors=trainable.factors(trained), **options)
  state, params = tx.init(trained), trained
  for _ in range(2):
    grads = jax.grad(lambda t: total(trainable.join(frozen, t)))(params)
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return jax.tree.map(jnp.subtract, params, trained), grads, state


def test_frozen_layers_of_an_array_get_no_gradient_and_do_not_move():
  whole = variables()
  trainable = Trainable(whole, "layers/[02]/mlp|layers/1/attention")
  moved, grads, _ = one_update(trainable, whole, weight_decay=0.3)
  for tree in (moved, grads):
    layers = tree["params"]["layers"]
    up, q = layers["mlp"]["up"]["kernel"], layers["attention"]["q"]["kernel"]
    assert not up[0].any() and not up[2].any() and up[1].all()
    assert q[0].all() and not q[1].any() and q[2].all()
    assert tree["params"]["embed"].all()


def test_frozen_arrays_have_no_optimizer_state():
  whole = variables()
  _, _, state = one_update(Trainable(whole, "embed|mlp"), whole)
  sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
  assert sorted(sizes) == sorted([4, 48] * 2)


def test_clipping_sees_only_what_is_trained():
  whole = variables()
  whole["params"]["layers"]["mlp"]["up"]["kernel"] *= 1000.0
  held = Trainable(whole, r"layers/\d/mlp|layers/0/attention")
  norm = optax.tree.norm
  moved, grads, _ = one_update(held, whole, name="sgd", clip_norm=1e-3)
  np.testing.assert_allclose(norm(moved), 2 * 0.1 * 1e-3, rtol=1e-2)
  assert float(norm(grads)) < 100


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_rates_multiply_the_update_and_the_first_match_counts(name):
  whole = variables()
  options = {"name": name, "clip_norm": 0.0}
  rates = r"layers/1/mlp=0.25 mlp=0.5 embed=2"
  trainable = Trainable(whole, rates=rates)
  factors = trainable.factors(whole)["params"]
  assert factors["embed"] == 2 and factors["norm"]["scale"] == 1
  up = factors["layers"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(up.ravel(), [0.5, 0.25, 0.5])
  assert up.shape == (3, 1, 1)
  grads = jax.grad(total)(whole)
  first = {}
  for key, given in (("plain", None), ("rated", trainable.factors(whole))):
    tx = optim.make(lambda _: 0.1, factors=given, **options)
    first[key], _ = tx.update(grads, tx.init(whole), whole)
  jax.tree.map(
    lambda x, y, f: np.testing.assert_allclose(x, y * f, rtol=1e-6),
    first["rated"], first["plain"], trainable.factors(whole),
  )  # fmt: skip


def test_rates_keep_the_dtype_of_the_weights():
  whole = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables())
  trainable = Trainable(whole, rates="mlp=0.5")
  tx = optim.make(lambda _: 0.1, factors=trainable.factors(whole))
  updates, _ = tx.update(whole, tx.init(whole), whole)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.bfloat16.dtype}


def test_nothing_said_is_no_factor_at_all():
  assert Trainable(variables()).factors(variables()) is None


def test_with_adapters_patterns_are_about_these():
  adapters = {"up": {"a": jnp.ones((3, 4, 2)), "scale": jnp.ones(3)}}
  whole = variables() | {"lora": {"layers": {"mlp": adapters}}}
  trained, frozen = Trainable(whole).split(whole)
  assert paths(trained) == {"lora/layers/mlp/up/a"}
  assert "lora/layers/mlp/up/scale" in paths(frozen)
  with pytest.raises(ConfigError, match="embed"):
    Trainable(whole, "embed")


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"freeze": "embd"}, "optim.freeze: 'embd' matches none of embed"),
    ({"freeze": "lay(ers"}, "not a pattern"),
    ({"freeze": ""}, None),
    ({"freeze": "."}, "leaves nothing to train"),
    ({"rates": "mlp"}, "'mlp' should be pattern=factor"),
    ({"rates": "mlp=0"}, "optim.freeze is for what is not trained"),
    ({"rates": "mlp=fast"}, "'mlp=fast'"),
    ({"rates": "mlp=inf"}, "'mlp=inf'"),
    ({"rates": "=0.5"}, "'=0.5'"),
    ({"rates": "embed=0.5 head=0.1"}, "'head' matches none"),
    ({"freeze": "embed", "rates": "embed=0.5"}, "'embed' matches none"),
  ],
)
def test_patterns_that_say_nothing_are_refused(options, words):
  make = functools.partial(Trainable, variables(), **options)
  if words is None:
    make()
    return
  with pytest.raises(ConfigError) as error:
    make()
  assert words in str(error.value)
