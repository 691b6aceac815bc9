"""What holds for every registered loss, every mixture, every modifier."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import loss_twins as twins
import numpy as np
import pytest
from loss_cases import (
  NAMES,
  as_jax,
  compiled,
  differentiate,
  every_loss,
  every_pair,
  everything,
  quick_jit,
  random_inputs,
  summed,
  trained_keys,
)

from dpo_jax import losses


def test_every_registered_loss_is_written_a_second_time_in_numpy():
  assert all(callable(getattr(twins, name, None)) for name in NAMES)


@every_loss
@pytest.mark.parametrize(
  ("x64", "rtol"), [(True, 1e-10), (False, 3e-5)], ids=["f64", "f32"]
)
def test_a_loss_agrees_with_its_twin_in_numpy(loss, x64, rtol):
  sorts = any(t.name in twins.RANKED_LOSSES for t in loss.terms)
  for seed in range(3):
    inputs = random_inputs(seed=seed)
    each, mean = twins.loss(loss, inputs)
    with jax.enable_x64(x64):
      dtype = jnp.float64 if x64 else jnp.float32
      x = as_jax(inputs, dtype)
      out = compiled(loss)(x)
      assert out.loss.dtype == dtype
      got = np.asarray(out.loss)
      if sorts:  # the twin's are in the order of ranks
        each, got = np.sort(each), np.sort(got)
      scale = max(1.0, np.abs(each).max())
      np.testing.assert_allclose(got, each, rtol=rtol, atol=rtol * scale)
      got = summed(loss)(x)["loss"].mean()
      np.testing.assert_allclose(got, mean, rtol=rtol, atol=rtol * scale)


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
  with jax.enable_x64(True):
    x = as_jax(random_inputs(), jnp.float64)
    if "state" in loss.needs:  # its shift is a constant of the step, by design
      x["training"] = False
    value, grads = differentiate(loss, x)
    rounding = 1e-7 + 1e-10 * abs(value)
    for key, grad in grads.items():
      if "kl" in key:  # behind stop_gradient, by design
        np.testing.assert_array_equal(grad, 0)
        continue
      step = 1e-5
      for i in np.ndindex(grad.shape):
        up, down = (
          differentiate(loss, x | {key: x[key].at[i].add(s * step)})[0]
          for s in (1, -1)
        )
        np.testing.assert_allclose(
          grad[i], (up - down) / (2 * step), rtol=1e-5, atol=rounding
        )


@every_loss
def test_a_compiled_loss_is_the_eager_one(loss):
  x = as_jax(random_inputs())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
    compiled(loss)(x),
    loss(**x),
  )


@every_loss
def test_a_batch_is_its_examples_one_by_one(loss):
  x = as_jax(random_inputs())
  each = quick_jit(jax.vmap(lambda x: loss(**x)))(x)
  assert each.loss.shape == (7,)
  same = np.allclose(each.loss, compiled(loss)(x).loss, rtol=1e-5, atol=1e-6)
  assert same != loss.batch_coupled


@every_loss
def test_examples_may_have_any_leading_shape(loss):
  x = as_jax(random_inputs())
  spread = {key: v.reshape(1, 7, 1, *v.shape[1:]) for key, v in x.items()}
  out = compiled(loss)(spread)
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
def test_ten_thousand_nats_give_finite_values_and_gradients(loss, dtype):
  keys = [k for k in loss.needs if k.endswith(("_logps", "_scores"))]
  ranks = 3 if loss.kind == "ranked" and len(keys) == 2 else 1
  corners = np.array(
    list(itertools.product((-1e4, 0, 1e4), repeat=ranks * len(keys)))
  )
  n = len(corners)
  x = dict.fromkeys(loss.needs, np.zeros(n))
  x |= {"weights": np.ones(n), "desirable": np.arange(n) % 2 == 0}
  x |= dict(zip(keys, np.split(corners, len(keys), axis=1), strict=True))
  x = {key: v if ranks > 1 else v.reshape(n) for key, v in x.items()}
  x.pop("state", None), x.pop("training", None)
  for length in (0, 1, 1000):
    x |= {
      key: np.full((n, 3) if ranks > 1 else n, length)
      for key in loss.needs
      if key.endswith("_lengths")
    }
    (value, out), grads = everything(loss, as_jax(x, dtype))
    assert value.dtype == jnp.float32
    for leaf in jax.tree.leaves((value, out, grads)):
      assert np.isfinite(np.float32(leaf)).all()


@every_loss
def test_sums_of_bfloat16_log_probs_are_taken_in_float32(loss):
  # 1024 and 1032 are neighbours in bfloat16: 1031 = 1032 - 1 is not one.
  x = random_inputs(2)
  shape = {key: np.shape(v)[1:] for key, v in x.items()}
  for key in x:
    if key.endswith("_logps"):
      value = [-1.0, -1] if key.startswith("reference") else [-1024.0, -1032]
      value = [0.0, 0.0] if "_tail_" in key else value
      x[key] = np.broadcast_to(
        np.array(value).reshape(2, *(1 for _ in shape[key])), (2, *shape[key])
      )
    elif key.endswith("_lengths"):
      x[key] = np.full((2, *shape[key]), 512.0 if "chosen" in key else 99.0)
    elif key != "desirable":
      x[key] = np.ones(x[key].shape)
  exact = compiled(loss)(as_jax(x)).loss
  rounded = compiled(loss)(as_jax(x, jnp.bfloat16)).loss
  np.testing.assert_array_equal(rounded, exact)


@every_loss
def test_entries_of_weight_zero_change_no_number(loss):
  x = as_jax(random_inputs())
  there = np.array([1, 1, 0, 1, 0, 1, 1.0], np.float32)
  few = {key: v[there > 0] for key, v in x.items()}

  def noisy(v):
    mask = (there > 0).reshape(7, *(1 for _ in v.shape[1:]))
    return jnp.where(mask, v, -1e30)

  full = {k: v if k == "desirable" else noisy(v) for k, v in x.items()}
  full["weights"] = jnp.asarray(there)
  expected, got = summed(loss)(few), summed(loss)(full)
  assert got.keys() == expected.keys()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, expected
  )


@every_loss
def test_what_an_empty_place_holds_never_reaches_a_gradient(loss):
  there = np.array([1, 1, 0, 1, 0, 1, 1.0]) > 0

  def junk(key, v):
    mask = there.reshape(7, *(1 for _ in v.shape[1:]))
    return v if key == "desirable" else jnp.where(mask, v, -3e4)

  x = {key: junk(key, v) for key, v in as_jax(random_inputs()).items()}
  _, grads = differentiate(loss, x | {"weights": jnp.asarray(there, float)})
  for key, grad in grads.items():
    np.testing.assert_array_equal(np.asarray(grad)[~there], 0)
    assert np.asarray(grad)[there].any() != ("kl" in key)


@every_loss
def test_a_response_without_tokens_is_finite(loss):
  x = as_jax(random_inputs())
  for empty in ("chosen", "rejected", "gold", "ranked"):
    zero = {key: x[key].at[0].set(0) for key in x if empty in key}
    value, grads = differentiate(loss, x | zero)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads.values())


def swapped(x):
  other = {"chosen": "rejected", "rejected": "chosen"}
  return {
    re.sub("chosen|rejected", lambda m: other[m[0]], key): v
    for key, v in x.items()
  }


@every_pair
def test_a_swapped_pair_has_the_opposite_margin(loss):
  x = as_jax(random_inputs())
  one, other = (compiled(loss)(y).metrics for y in (x, swapped(x)))
  np.testing.assert_allclose(
    one["rewards/margins"], -other["rewards/margins"], rtol=1e-6
  )
  np.testing.assert_array_equal(
    one["rewards/accuracies"] + other["rewards/accuracies"], 1
  )
  np.testing.assert_array_equal(
    one["rewards/chosen"], other["rewards/rejected"]
  )


@every_pair
def test_at_the_reference_every_loss_of_pairs_widens_the_margin(loss):
  # Equal lengths, or a margin a token is one of the whole with another scale.
  x = as_jax(random_inputs())
  for side in ("chosen", "rejected"):
    x[f"{side}_lengths"] = jnp.full(7, 9.0)
    x[f"reference_{side}_logps"] = x[f"policy_{side}_logps"]
    x[f"reference_{side}_tail_logps"] = x[f"policy_{side}_tail_logps"]
  x["preference_margins"] = jnp.zeros(7)
  _, grads = differentiate(loss, x)
  chosen, rejected = (
    next(g for k, g in grads.items() if re.search(rf"_?{side}_(logps|s)", k))
    for side in ("chosen", "rejected")
  )
  if loss.name == "discopop" and dict(loss.options)["tau"] == 0.05:
    # Not this one: by its paper's formula it first narrows them, towards its
    # local optimum at a slightly negative margin.
    slope = (np.log(2) - 1) / (4 * 0.05) + 0.75
    np.testing.assert_allclose(7 * chosen, -0.05 * slope, rtol=1e-5)
    return
  assert (chosen - rejected <= 0).all()
  assert (chosen - rejected).sum() < 0  # a hinge is content with some


# Two outcomes of one comparison: their probabilities add up to one.
BRADLEY_TERRY = [
  ("dpo", {}),
  ("sigmoid_norm", {}),
  ("r_dpo", {"alpha": 0.3}),
  ("simpo", {"gamma": 0.0}),
  ("cpo", {"alpha": 0.0}),
  ("reward", {}),
  ("dpo", {"divergence": "js"}),
]


@pytest.mark.parametrize(("name", "options"), BRADLEY_TERRY)
def test_the_two_orders_of_a_pair_are_all_there_is(name, options):
  loss, x = losses.make(name, **options), as_jax(random_inputs())
  x["preference_margins"] = jnp.zeros(7)
  both = sum(np.exp(-compiled(loss)(y).loss) for y in (x, swapped(x)))
  np.testing.assert_allclose(both, 1, rtol=1e-5)


def test_the_orders_of_a_ranking_are_all_there_is():
  loss, x = losses.make("plackett_luce"), as_jax(random_inputs())
  x["ranked_lengths"] = jnp.ones((7, 3))
  total = 0.0
  for order in itertools.permutations(range(3)):
    y = {k: v[:, list(order)] if "ranked" in k else v for k, v in x.items()}
    total += np.exp(-compiled(loss)(y).loss)
  np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "combine"),
  [
    ("kto", lambda a, b: a + b),
    ("apo_zero_unpaired", lambda a, b: a + b),
    ("bco", lambda a, b: np.exp(-a) + np.exp(-b)),
  ],
)
def test_a_thumb_is_up_or_down(name, combine):
  loss, x = losses.make(name), as_jax(random_inputs())
  x |= {"density_ratios": jnp.ones(7), "training": False}
  other = x | {"desirable": ~x["desirable"]}
  a, b = (compiled(loss)(y).loss for y in (x, other))
  np.testing.assert_allclose(combine(a, b), 1, rtol=1e-5)


def test_apo_zero_of_both_orders_is_two_and_sppo_and_ipo_part_by_the_gap():
  x = as_jax(random_inputs())
  gap = twins.both(random_inputs())
  gap = gap[0] - gap[1]

  def orders(name, **options):
    loss = losses.make(name, **options)
    return [np.asarray(compiled(loss)(y).loss) for y in (x, swapped(x))]

  np.testing.assert_allclose(sum(orders("apo_zero")), 2, rtol=1e-5)
  for name in ("ipo", "sppo"):
    a, b = orders(name, beta=0.2)
    np.testing.assert_allclose(b - a, 4 * gap * 0.5 / 0.2, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_the_paper_and_every_parameter(name):
  function = losses.make(name).terms[0].entry.function
  text, entry = inspect.getdoc(function), losses.make(name).terms[0].entry
  for paper in filter(None, entry.paper.split(", ")):
    assert re.fullmatch(r"\d{4}\.\d{5}", paper) and paper in text
  for parameter in inspect.signature(function).parameters.values():
    line = re.search(rf"^ +{parameter.name}: (.+)", text, re.M)
    assert line, parameter.name
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
      continue
    if isinstance(parameter.default, float):  # what it does when it grows
      said = " ".join(text[line.start() :].split("\n  ", 3)[:3])
      assert re.search("larger|as in `", said, re.I), (parameter.name, said)


def test_trained_inputs_are_found():
  assert trained_keys(losses.make("dpo")) == [
    "policy_chosen_logps",
    "policy_rejected_logps",
  ]
  assert trained_keys(losses.make("reward")) == [
    "chosen_scores",
    "rejected_scores",
  ]
