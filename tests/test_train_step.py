"""The step: parts, devices and failures change no number.

`python test_train_step.py` is the part that runs on eight devices.
"""

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import run_on_eight

from dpo_jax import losses, optim, score, sharding
from dpo_jax.batch import Scores
from dpo_jax.data.pack import Example, RowShape, empty_batch, fill_row
from dpo_jax.losses import registry
from dpo_jax.models import llama
from dpo_jax.train_step import evaluate_step, loss_inputs, train_step
from dpo_jax.update import TrainState, update

VOCABULARY = 32
CONFIG = llama.Config(
  vocab_size=VOCABULARY, width=16, ffn=24, layers=2, heads=4, kv_heads=2,
  head_dim=4,
)  # fmt: skip
ROWS, SHAPE = 8, RowShape(tokens=48, scored=32, examples=3)
# Each way a loss can be reduced, coupled, carried on and modified.
LOSSES = {
  "dpo": losses.make("dpo"),
  "orpo": losses.make("orpo"),
  "sft": losses.make("sft"),
  "kto": losses.make("kto"),
  "aot": losses.make("aot"),
  "bco": losses.make("bco"),
  "tpo": losses.make("tpo", beta=0.3),
  "plackett_luce": losses.make("plackett_luce"),
  "mixture": losses.make("dpo+0.5*sft"),
  "ranked mixture": losses.make("plackett_luce+0.5*sft"),
  "ld_wpo": losses.make("ipo", ld_alpha=0.3, wpo=True),
  "divergence": losses.make("dpo", divergence="js"),
}
# These programs run a few times; optimising them would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class Toy:
  """The least that reads all of a batch: each token sees the mean of its keys.
  Compiles in a fraction of a Llama's time."""

  def apply(
    self, variables, tokens, positions, key_start, key_end, queries=None
  ):
    params = variables["params"]
    x = params["embed"][tokens]
    x += jnp.sin(positions[..., None] * params["pace"])
    keys = jnp.arange(tokens.shape[1])
    seen = (keys >= key_start[..., None]) & (keys < key_end[..., None])
    seen = seen / jnp.maximum(seen.sum(axis=-1, keepdims=True), 1)
    x = jnp.tanh(jnp.einsum("btu,bud->btd", seen, x) @ params["mix"] + x)
    if queries is None:
      return x
    return jnp.take_along_axis(
      x, queries[..., None], axis=1, mode="fill", fill_value=0
    )

  def unembed(self, variables):
    return variables["params"]["unembed"]


TOY_SHAPES = {
  "params": {
    "embed": (VOCABULARY, 16),
    "mix": (16, 16),
    "pace": (16,),
    "unembed": (VOCABULARY, 16),
  }
}


@functools.cache
def make_batch(kind="paired", rows=ROWS, seed=0, branches=3):
  """Rows of one to three examples of uneven lengths, so with empty places; one
  row is empty."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, VOCABULARY, n).astype(np.int32)
  shape = SHAPE
  if kind == "ranked":  # a prompt twice, three responses
    shape = RowShape(tokens=90, scored=60, examples=3, branches=branches)
  batch = empty_batch(rows, shape)
  for row in range(rows - 1):
    some = []
    for place in range(1 + row % 3):
      p, r, q = rng.integers(1, 7), rng.integers(1, 6), rng.integers(1, 6)
      q = 0 if kind == "sft" else q
      rest = tuple(ids(rng.integers(1, 6)) for _ in range(shape.branches - 2))
      liked = (row + place) % 3 == 0
      some.append(Example(ids(p), ids(r), ids(q), liked, rest))
    fill_row(batch, row, some)
  return batch


def make_params(seed, shapes=TOY_SHAPES):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def make_state(tx, seed=0, shapes=TOY_SHAPES, loss=None):
  params = make_params(seed, shapes)
  zero = jnp.int32(0)
  carried = None if loss is None else loss.initial_state()
  return TrainState(zero, params, tx.init(params), zero, carried)


TX = optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(0.02, eps=1e-3))


SCORE = score.Score(Toy(), tile=64)


def make_step(loss, *, microbatches=1, tx=TX, score=SCORE):
  return functools.partial(
    train_step, score=score, loss=loss, tx=tx, microbatches=microbatches
  )


@functools.cache
def compiled(loss, microbatches=1):
  return quick_jit(make_step(loss, microbatches=microbatches))


def reference_for(loss):
  return make_params(1) if loss.needs_reference else None


def assert_same(a, b, tolerance=1e-6):
  def one(a, b):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, a, b)


# Parts


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_give_the_whole_batchs_numbers(name):
  loss = LOSSES[name]
  batch = make_batch(loss.kind)
  assert 0 < (batch.weights == 0).mean() < 0.6
  results = {}
  for parts in (1, 2, 4):
    step, state = compiled(loss, parts), make_state(TX, loss=loss)
    for _ in range(2):  # the second also sees what the first one did
      state, sums = step(state, reference_for(loss), batch)
    results[parts] = state, sums
  assert results[1][1]["grad_norm"].total > 1e-3
  for parts in (2, 4):
    state, sums = results[parts]
    means = {k: v.mean() for k, v in sums.items()}
    whole = {k: v.mean() for k, v in results[1][1].items()}
    assert means.keys() == whole.keys()
    assert_same(means, whole, 5e-6)
    # Adam divides by the square root of tiny second moments.
    assert_same(state, results[1][0], 2e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_keeps_the_dtypes_of_its_state(name, parts):
  loss, tx = losses.make(name), optax.adamw(1e-3)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(1))
  state = make_state(tx)._replace(params=params, opt_state=tx.init(params))
  after, _ = jax.eval_shape(
    make_step(loss, microbatches=parts, tx=tx),
    state,
    params,
    make_batch(loss.kind),
  )
  kept = jax.tree.map(lambda new, old: new.dtype == old.dtype, after, state)
  assert all(jax.tree.leaves(kept))


def test_bco_carries_its_rewards_from_step_to_step():
  """A float64 account of two steps at rate 0, whatever the parts."""
  loss, batches = (
    losses.make("bco"),
    [make_batch("unpaired", seed=s) for s in (0, 1)],
  )
  rewards, liked = [], []
  for batch in batches:
    policy, reference = (
      np.asarray(quick_jit(SCORE)(make_params(s), batch).logps, np.float64)
      for s in (1, 0)
    )
    there = batch.weights > 0
    rewards.append(0.1 * (policy - reference)[there][:, 0])
    liked.append(batch.desirable[there])
  for parts in (1, 4):
    tx = optax.sgd(0.0)
    step = quick_jit(make_step(loss, microbatches=parts, tx=tx))
    state = make_state(tx, 1, loss=loss)
    for s, batch in enumerate(batches):
      state, sums = step(state, make_params(0), batch)
      r, d = (np.concatenate(x[: s + 1]) for x in (rewards, liked))
      delta = (r[d].mean() + r[~d].mean()) / 2
      np.testing.assert_allclose(sums["delta"].mean(), delta, rtol=1e-5)
    assert state.loss_state.desirable.count == np.concatenate(liked).sum()


def test_a_state_of_ones_own_is_never_none_in_a_step(monkeypatch):
  monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

  @losses.register(state=lambda: jnp.zeros(()))
  def counting(policy_chosen_logps, weights, state):
    seen = state + weights.sum()
    return losses.LossOutput(
      -policy_chosen_logps, {"seen": 0 * weights + seen}, state=seen
    )

  loss, batch, there = losses.make("counting"), make_batch(), 0
  state, step = make_state(TX, loss=loss), quick_jit(make_step(loss))
  for _ in range(2):
    state, sums = step(state, None, batch)
    there += batch.weights.sum()
    assert sums["seen"].mean() == state.loss_state == there
  fresh, *_ = evaluate_step(state.params, None, batch, score=SCORE, loss=loss)
  assert fresh["seen"].mean() == batch.weights.sum()


def test_an_update_that_is_not_finite_leaves_the_state_of_the_loss():
  loss, batch = losses.make("bco"), make_batch("unpaired")
  known = np.full(batch.lengths.shape, np.inf, np.float32)
  state = make_state(TX, loss=loss)
  after, _ = compiled(loss)(
    state, None, batch._replace(reference=Scores(known))
  )
  assert after.skipped == 1
  assert_same(after.loss_state, state.loss_state, 0)


@pytest.mark.parametrize("mixup", [1.0, 0.25])
def test_a_reference_that_follows_is_mixed_every_so_many_steps(mixup):
  loss, batch, start = losses.make("dpo"), make_batch(), make_params(1)
  step = quick_jit(
    functools.partial(make_step(loss), sync_every=2, sync_mixup=mixup)
  )
  state = make_state(TX)._replace(reference=start)
  expected = start
  for s in range(1, 5):
    state, sums = step(state, None, batch)
    if s % 2 == 0:
      expected = jax.tree.map(
        lambda r, p: (1 - mixup) * r + mixup * p, expected, state.params
      )
    assert_same(state.reference, expected, 1e-6)
    # A hard update makes them equal, and the next step begins at log 2.
    if mixup == 1 and s == 3:
      np.testing.assert_allclose(sums["loss"].mean(), np.log(2), rtol=1e-6)


def test_tails_and_confidences_are_those_of_the_responses_tokens():
  batch, params = make_batch(), make_params(1)
  scores = quick_jit(functools.partial(SCORE, tails=True, confidence=True))(
    params, batch
  )
  toy = Toy()
  hidden = toy.apply(params, *batch[:4])
  log_p = jax.nn.log_softmax(hidden @ toy.unembed(params).T)
  log_p = np.asarray(log_p, np.float64)
  for row, place in np.argwhere(batch.weights > 0):
    tokens, squares = [], []
    for branch in (0, 1):
      mine = batch.slot[row] == 2 * place + branch
      at, ids = batch.source[row][mine], batch.target[row][mine]
      tokens.append(log_p[row, at, ids])
      squares.append(np.log((np.exp(log_p[row, at]) ** 2).sum(axis=-1)))
    shorter = min(map(len, tokens))
    for branch in (0, 1):
      here = row, place, branch
      np.testing.assert_allclose(
        scores.tails[here], tokens[branch][shorter:].sum(), atol=1e-5
      )
      np.testing.assert_allclose(
        scores.confidence[here], (tokens[branch] - squares[branch]).mean(),
        rtol=1e-4,
      )  # fmt: skip


def test_of_rankings_the_best_is_the_chosen_one_but_beside_a_gold_one():
  batch = make_batch("ranked")
  scores = Scores(jnp.arange(batch.lengths.size).reshape(batch.lengths.shape))
  plain = loss_inputs(scores, None, batch)
  assert "policy_gold_logps" not in plain
  three = loss_inputs(scores, None, batch, gold=True)
  for i, (a, b) in enumerate(
    [(plain["policy_chosen_logps"], three["policy_gold_logps"]),
     (plain["policy_rejected_logps"], three["policy_chosen_logps"]),
     (scores.logps[..., 2], three["policy_rejected_logps"])]
  ):  # fmt: skip
    np.testing.assert_array_equal(a, scores.logps[..., i])
    np.testing.assert_array_equal(a, b)


def test_a_mixture_has_the_gradient_of_the_sum_of_its_terms():
  batch, reference, tx = make_batch(), make_params(1), optax.sgd(1.0)
  moved = {}
  for name in ("dpo", "sft", "dpo+0.5*sft"):
    loss, state = losses.make(name), make_state(tx)
    new, _ = quick_jit(make_step(loss, tx=tx))(state, reference, batch)
    moved[name] = jax.tree.map(jnp.subtract, state.params, new.params)
  assert_same(
    moved["dpo+0.5*sft"],
    jax.tree.map(lambda a, b: a + 0.5 * b, moved["dpo"], moved["sft"]),
    2e-6,
  )


def test_the_kl_of_kto_is_that_of_the_global_batch_in_every_part():
  loss = losses.make("kto", beta=0.3)
  batch = make_batch("unpaired")
  policy, reference = (
    np.asarray(quick_jit(SCORE)(make_params(seed), batch).logps, np.float64)
    for seed in (1, 0)
  )
  there = batch.weights > 0
  kl = max(0.0, (policy - reference)[there][:, 1].mean())
  h = (policy - reference)[there][:, 0]
  sign = np.where(batch.desirable[there], 1, -1)
  expected = (1 - 1 / (1 + np.exp(-0.3 * sign * (h - kl)))).mean()
  assert kl > 0.1
  for parts in (1, 4):
    _, sums = compiled(loss, parts)(make_state(TX, 1), make_params(0), batch)
    np.testing.assert_allclose(sums["kl"].mean(), kl, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"].mean(), expected, rtol=1e-5)


def test_the_margin_of_a_pair_comes_to_the_loss_with_it():
  """Of a loss of scores, as which the toy's log-probs will do here."""
  batch = make_batch()
  margins = np.random.default_rng(0).exponential(3, batch.weights.shape)
  batch = batch._replace(margins=(margins * batch.weights).astype(np.float32))
  there = batch.weights > 0
  scores = np.asarray(quick_jit(SCORE)(make_params(1), batch).logps)[there]
  gaps = scores[:, 0] - scores[:, 1] - batch.margins[there]
  expected = np.logaddexp(0, -np.float64(gaps)).mean()
  for parts in (1, 4):
    step = compiled(losses.make("reward"), parts)
    _, sums = step(make_state(TX, 1), None, batch)
    np.testing.assert_allclose(sums["loss"].mean(), expected, rtol=1e-5)


def test_the_gradient_is_that_of_the_mean_loss():
  """One step of sgd at rate 1 against jax.grad of the written-out mean."""
  loss, batch, tx = losses.make("sft"), make_batch("sft"), optax.sgd(1.0)
  n = batch.slot[batch.slot < 6].size

  def mean(params):
    return -SCORE(params, batch).logps[batch.weights > 0][:, 0].sum() / n

  state = make_state(tx)
  new, sums = quick_jit(make_step(loss, tx=tx))(state, None, batch)
  value, grads = quick_jit(jax.value_and_grad(mean))(state.params)
  np.testing.assert_allclose(sums["loss"].mean(), value, rtol=1e-6)
  assert sums["loss"].count == n
  squares = sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads))
  np.testing.assert_allclose(
    sums["grad_norm"].mean(), np.sqrt(squares), rtol=1e-6
  )
  moved = jax.tree.map(jnp.subtract, state.params, new.params)
  assert_same(moved, grads, 2e-6)


# References


def test_a_loss_without_reference_never_scores_one():
  loss = losses.make("orpo")
  scored = []

  class Spy(score.Score):
    def _hidden(self, variables, *rest):
      scored.append(variables)
      return super()._hidden(variables, *rest)

  spy = Spy(Toy(), tile=64)

  batch, state = make_batch(), make_state(TX)
  poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), make_params(1))
  results = [
    quick_jit(functools.partial(train_step, score=spy, loss=loss, tx=TX))(
      state, reference, batch
    )
    for reference in (None, poison)
  ]
  assert_same(*results, 0)
  assert np.isfinite(results[0][1]["loss"].total)
  assert len(scored) == 2  # the policy, once a program


def test_known_reference_log_probs_give_the_update_of_scoring_them():
  loss, batch, reference = losses.make("dpo"), make_batch(), make_params(1)
  scored = quick_jit(SCORE)(reference, batch)
  known = batch._replace(reference=scored)
  for parts in (1, 2):
    step = compiled(loss, parts)
    online = step(make_state(TX), reference, batch)
    assert_same(step(make_state(TX), None, known), online, 2e-6)


def test_known_log_probs_are_used_even_with_a_reference_at_hand():
  loss, batch, reference = losses.make("dpo"), make_batch(), make_params(1)
  known = batch._replace(reference=Scores(jnp.zeros(batch.lengths.shape)))
  _, sums = compiled(loss)(make_state(TX), reference, known)
  np.testing.assert_allclose(
    sums["rewards/chosen"].mean(),
    0.1 * sums["logps/chosen"].mean(),
    rtol=1e-6,
  )


def test_the_trained_collection_stands_over_the_references():
  """A policy is the reference with the trained arrays in their place."""
  loss, batch, reference = losses.make("dpo"), make_batch(), make_params(1)
  _, sums = compiled(loss)(make_state(TX, seed=1), reference, batch)
  np.testing.assert_allclose(sums["rewards/margins"].total, 0, atol=1e-5)
  _, sums = compiled(loss)(make_state(TX, seed=0), reference, batch)
  assert abs(sums["rewards/margins"].total) > 0.1


# Steps that are not finite


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad, parts):
  loss, reference = losses.make("dpo"), make_params(1)
  batch = make_batch()
  known = np.zeros(batch.lengths.shape, np.float32)
  known[1, 0, 0] = bad
  poisoned = batch._replace(reference=Scores(known))
  step = compiled(loss, parts)
  state, sums = step(make_state(TX), reference, batch)
  assert sums["skipped"].total == 0
  after, sums = step(state, reference, poisoned)
  assert (after.step, after.skipped) == (2, 1)
  assert sums["skipped"].total == 1
  for new, old in zip(
    jax.tree.leaves((after.params, after.opt_state)),
    jax.tree.leaves((state.params, state.opt_state)),
    strict=True,
  ):
    assert new.dtype == old.dtype
    assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
  # And on it goes as if that batch had not been.
  later, _ = step(after, reference, batch)
  clean, _ = step(state, reference, batch)
  assert_same(later.params, clean.params, 0)
  assert (later.step, later.skipped) == (3, 1)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(
  monkeypatch,
):
  @jax.custom_vjp
  def broken(x):
    return x

  broken.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))

  monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

  @losses.register
  def no_gradient(policy_chosen_logps):
    return losses.LossOutput(broken(policy_chosen_logps), {})

  step = quick_jit(make_step(losses.make("no_gradient")))
  state = make_state(TX)
  after, sums = step(state, None, make_batch())
  assert np.isfinite(sums["loss"].total)
  assert after.skipped == 1
  assert_same(after.params, state.params, 0)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_accelerators_select_what_a_cpu_branches_to(monkeypatch, bad):
  state = make_state(TX, loss=losses.make("bco"))
  grads = jax.tree.map(lambda x: 0.1 * x + bad, make_params(1))
  carried = jax.tree.map(lambda x: x + 1, state.loss_state)

  def run():
    return jax.jit(
      lambda state, grads: update(state, grads, jnp.float32(1), carried, TX)
    )(state, grads)

  by_branch, _ = run()
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *, cpu, default: default()
  )
  by_selection, _ = run()
  jax.tree.map(np.testing.assert_array_equal, by_branch, by_selection)
  assert int(by_branch.skipped) == (bad != 0)
  kept = jax.tree.map(np.array_equal, by_branch.params, state.params)
  assert all(jax.tree.leaves(kept)) == (bad != 0)


def test_an_update_needs_no_copy_of_what_it_is_written_over():
  params = {name: jnp.ones((512, 256)) for name in "abcd"}
  tx = optim.make(optax.constant_schedule(1e-3), weight_decay=0.1)
  state = TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))

  def step(state, grads):
    return update(state, grads, jnp.float32(1), None, tx)[0]

  compiled = jax.jit(step, donate_argnums=0).lower(state, params).compile()
  held = compiled.memory_analysis()
  one = params["a"].nbytes
  assert held.alias_size_in_bytes >= 12 * one  # weights and both moments
  # Whether all is finite is known after all gradients are, and it may be that
  # nothing is written; still no more is there than the update of every weight.
  assert held.temp_size_in_bytes <= 4.1 * one


def test_a_batch_of_padding_is_no_error():
  loss = losses.make("dpo")
  empty = empty_batch(ROWS, SHAPE)
  state = make_state(optax.sgd(1.0))
  after, sums = quick_jit(make_step(loss, tx=optax.sgd(1.0)))(
    state, make_params(1), empty
  )
  assert sums["loss"] == (0, 0)
  assert after.skipped == 0
  assert_same(after.params, state.params, 0)


def test_evaluation_gives_the_numbers_of_the_step_before_its_update():
  loss, batch, reference = losses.make("dpo"), make_batch(), make_params(1)
  state = make_state(TX)
  step = functools.partial(evaluate_step, score=SCORE, loss=loss)
  sums, policy, known = quick_jit(step)(state.params, reference, batch)
  _, trained = compiled(loss)(state, reference, batch)
  assert_same(sums, {k: trained[k] for k in sums}, 2e-6)
  assert policy.logps.shape == known.logps.shape == batch.lengths.shape
  np.testing.assert_array_equal(policy.logps[batch.weights == 0], 0)


# Devices

ON_MESHES = [
  ("dpo", (8, 1, 1)),
  ("dpo", (1, 8, 1)),
  ("dpo", (2, 2, 2)),
  ("dpo", (1, 2, 4)),
  ("kto", (2, 2, 2)),  # its z0 is a mean over all devices
  ("aot", (2, 2, 2)),  # and its ranks are those of all devices
]
SHAPES = jax.tree.map(
  lambda x: x.shape,
  jax.eval_shape(llama.Model(CONFIG).init_variables, jax.random.key(0)),
)


def three_steps(name, mesh=None):
  """Means of loss and gradient norm of three steps, and the weights after.

  On a mesh of three axes also that no token moves to another device: weights
  are gathered and gradients reduced, and that is all.
  """
  loss = losses.make(name)
  # Plain descent: Adam would blow rounding up where gradients are near 0.
  tx = optax.sgd(0.3)
  state, reference = make_state(tx, 1, SHAPES), make_params(0, SHAPES)
  compute, places = llama.Compute(), {}
  batches = [make_batch(loss.kind, seed=s) for s in (0, 1)]
  if mesh is not None:
    state = jax.device_put(state, sharding.shard_tree(state, mesh))
    reference = jax.device_put(reference, sharding.shard_tree(reference, mesh))
    batches = [sharding.put_batch(b, mesh) for b in batches]
    pins = sharding.Pins(mesh)
    places = {"place_head": pins.head, "place_sweep": pins.sweep}
    compute = llama.Compute(**pins.for_model())
  run = score.Score(llama.Model(CONFIG, compute), tile=64, **places)
  step = quick_jit(make_step(loss, tx=tx, score=run))
  if mesh is not None and all(size > 1 for size in mesh.shape.values()):
    program = step.lower(state, reference, batches[0]).compile().as_text()
    assert not re.findall("collective-permute|all-to-all", program)
  means = []
  for i in range(3):
    state, sums = step(state, reference, batches[i % 2])
    means.append([float(sums[k].mean()) for k in ("loss", "grad_norm")])
  flat = np.concatenate(
    [np.asarray(x).ravel() for x in jax.tree.leaves(state.params)]
  )
  return means, flat


def on_eight_devices(out):
  assert jax.device_count() == 8
  means, weights = {}, {}
  for name, sizes in ON_MESHES:
    key, mesh = f"{name} {sizes}", sharding.make_mesh(*sizes)
    means[key], weights[key] = three_steps(name, mesh)
  np.savez(out / "weights.npz", **weights)
  (out / "means.json").write_text(json.dumps(means))


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
  """What the meshes gave, computed by one process that has eight devices."""
  out = tmp_path_factory.mktemp("eight")
  run_on_eight(__file__, str(out))
  means = json.loads((out / "means.json").read_text())
  return means, dict(np.load(out / "weights.npz"))


@functools.cache
def on_one_device(name):
  return three_steps(name)


@pytest.mark.parametrize(("name", "sizes"), ON_MESHES, ids=str)
def test_eight_devices_give_the_numbers_of_one(eight_devices, name, sizes):
  means, weights = eight_devices
  expected, expected_weights = on_one_device(name)
  np.testing.assert_allclose(means[f"{name} {sizes}"], expected, rtol=1e-5)
  np.testing.assert_allclose(
    weights[f"{name} {sizes}"], expected_weights, rtol=1e-6, atol=1e-6
  )


def test_the_three_steps_do_move_the_weights():
  means, weights = on_one_device("dpo")
  start = jax.tree.leaves(make_params(1, SHAPES))
  start = np.concatenate([np.asarray(x).ravel() for x in start])
  assert np.abs(weights - start).max() > 1e-2
  assert means[2][0] < means[0][0]  # the first batch, seen again


if __name__ == "__main__":
  on_eight_devices(pathlib.Path(sys.argv[1]))
