"""Head and loss in one sweep: the numbers of two, in fewer products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import (
  LOSSES,
  TX,
  Toy,
  assert_same,
  make_batch,
  make_params,
  make_state,
  make_step,
  quick_jit,
)

from dpo_jax import logps, score
from dpo_jax.one_sweep import Given, _Packed, one_sweep
from dpo_jax.score import Score

ALONE = [name for name, loss in LOSSES.items() if not loss.batch_coupled]
TWICE = functools.partial(Score, place_sweep=None)  # scores, then gradients


class Once(Score):
  """Also where it does not pay."""

  def sweeps(self, batch):
    return True


# Pairs have 2 to 10 scored tokens, seven rows hold 13 of them. Tiles that hold
# none but the shortest, some, many, those of several rows, and all.
TILES = [(name, 8) for name in ALONE]
TILES += [(name, n) for name in ("ld_wpo", "tpo") for n in (3, 33, 100, 1024)]


@pytest.mark.parametrize(("name", "tile"), TILES)
def test_a_step_gives_the_numbers_of_scoring_first(name, tile):
  loss, reference = LOSSES[name], make_params(1)
  batch = jax.tree.map(lambda x: x[:7], make_batch(loss.kind))
  state = make_state(TX, loss=loss)
  once, twice = (
    quick_jit(make_step(loss, score=kind(Toy(), tile=tile)))(
      state, reference, batch
    )
    for kind in (Once, TWICE)
  )
  assert_same(once, twice, 2e-6)
  assert once[1]["grad_norm"].total > 1e-3


def swept(sweep, params, batch, moves):
  """Gradient of a sum of scores by what `moves` of hidden states and head."""

  def objective(scores, reference, batch, factor):
    total = (jnp.tanh(scores.logps) * batch.weights[..., None]).sum()
    weighted = scores.logps * batch.weights[..., None]
    return factor * total, {"logps": weighted.sum()}

  hidden = jax.random.normal(jax.random.key(0), (*batch.target.shape, 16))
  head = params["params"]["unembed"]

  def f(*moved):
    h, w = (
      x if here else jax.lax.stop_gradient(x)
      for x, here in zip(moved, moves, strict=True)
    )
    given = Given(batch, None, jnp.float32(2))
    return sweep(objective)(h, w, given)

  return jax.grad(f, (0, 1), has_aux=True)(hidden, head)


def summed(tokens, batch, squares):
  return score.summed(tokens, batch, squares=squares)


def head_products(moves):
  """How many products with or for the head the gradient asks for."""
  run = functools.partial(
    swept, functools.partial(one_sweep, summed=summed, tile=64), moves=moves
  )
  jaxpr = jax.make_jaxpr(run)(make_params(0), make_batch())
  return str(jaxpr).count("dot_general[")


def test_three_products_with_the_head_and_two_where_it_is_frozen():
  assert head_products((True, True)) == 3
  assert head_products((True, False)) == 2
  assert head_products((False, True)) == 2
  assert head_products((False, False)) == 1


@pytest.mark.parametrize(("cap", "tile"), [(None, 64), (3.0, 64), (3.0, 5)])
def test_gradients_are_those_of_the_tiled_log_probs(cap, tile):
  params, batch = make_params(0), make_batch()

  def in_two(objective):
    def run(hidden, head, given):
      tokens = logps.token_logps(
        hidden.reshape(-1, 16), head, batch.target.reshape(-1), cap=cap
      )
      scores = summed(tokens.reshape(batch.target.shape), batch, None)
      return objective(scores, None, *given[::2])

    return run

  in_one = functools.partial(one_sweep, summed=summed, tile=tile, cap=cap)
  once, twice = (
    quick_jit(functools.partial(swept, kind, moves=(True, True)))(params, batch)
    for kind in (in_one, in_two)
  )
  assert_same(once, twice, 1e-5)
  assert np.abs(once[0][1]).max() > 1e-2


def test_examples_that_fill_much_of_a_tile_are_scored_first():
  batch = make_batch()  # three places and 32 scored tokens a row
  assert Score(Toy(), tile=22).sweeps(batch)
  assert not Score(Toy(), tile=21).sweeps(batch)
  assert not TWICE(Toy(), tile=22).sweeps(batch)
  one = jax.tree.map(lambda x: x[:1], batch)
  assert Score(Toy(), tile=32).sweeps(one)  # a tile holds all


def test_a_tile_ends_where_an_example_would_not_fit():
  """Every example once, none in two tiles, as many in one as there is room."""
  batch = make_batch()
  tokens = batch.lengths.sum(axis=2)
  packed = _Packed(Given(batch, None, None), 32, 25)
  assert packed.size == 25
  seen, first = [], 0
  while packed.left(first):
    first = int(packed.next(first))
    begin, stop = packed.group(first)
    rows = packed.rows_of(first, stop)
    mine = np.arange(first, int(stop))
    there = tokens.reshape(-1)[mine] > 0
    assert int(rows.batch.weights.sum()) == there.sum()
    np.testing.assert_array_equal(
      rows.batch.lengths[rows.batch.weights > 0],
      batch.lengths.reshape(-1, 2)[mine[there]],
    )
    # Slots as the batch has them, at the tokens of these examples.
    flat = np.arange(int(begin), int(begin) + packed.size, dtype=np.int32)
    places = np.where(flat < batch.slot.size, flat, 0)
    slots = rows.take(rows.batch.slot, packed.size)
    inside = flat < int(packed.ends[stop - 1])
    np.testing.assert_array_equal(
      slots[inside], batch.slot.reshape(-1)[places][inside]
    )
    np.testing.assert_array_equal(
      rows.take(rows.lay(flat), packed.size)[inside], flat[inside]
    )
    end = int(packed.ends[stop - 1])
    assert end - begin <= packed.size
    later = [e for e in range(int(stop), tokens.size) if packed.short[e]]
    assert not later or packed.ends[later[0]] - begin > packed.size
    seen += [e for e in mine if tokens.reshape(-1)[e]]
    first = int(stop)
  assert seen == list(np.flatnonzero(tokens))
