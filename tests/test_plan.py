"""Plans and packing: pure functions of lengths, seed and step."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.batch import Scores
from dpo_jax.data import shapes
from dpo_jax.data.order import Order, deal
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  spread,
  token_cost,
)
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.errors import ConfigError


def make_examples(prompt, chosen, rejected=None, *rest, kind="paired"):
  """Examples of the given lengths; every token is a number of its own."""
  prompt, chosen = np.asarray(prompt), np.asarray(chosen)
  rejected = np.zeros_like(prompt) if rejected is None else np.asarray(rejected)
  lengths = np.stack([chosen, rejected, *rest], axis=1).astype(np.int32)
  offsets = np.concatenate([[0], np.cumsum(prompt + lengths.sum(axis=1))])
  n = len(prompt)
  return Examples(
    tokens=np.arange(1, offsets[-1] + 1, dtype=np.int32),
    offsets=offsets.astype(np.int64),
    prompt_lengths=prompt.astype(np.int32),
    lengths=lengths,
    desirable=np.arange(n) % 2 == 0,
    margins=np.arange(n, dtype=np.float32) / 4,
    rows=np.arange(n, dtype=np.int64) + 1000,
    subsets=np.zeros(n, np.int32),
    subset_names=("",),
    kind=kind,
    format="test",
    report={},
    fingerprint="",
  )


def pairs(n=50, seed=0, kind="paired"):
  """Small examples of mixed lengths."""
  rng = np.random.default_rng(seed)
  rejected = rng.integers(1, 12, n) if kind == "paired" else None
  prompt, chosen = rng.integers(1, 20, n), rng.integers(1, 12, n)
  return make_examples(prompt, chosen, rejected, kind=kind)


def rankings(n=50, most=4, seed=0):
  """Small rankings of 2 to `most` responses."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 12, (most, n))
  lengths[np.arange(most)[:, None] >= rng.integers(2, most + 1, n)] = 0
  lengths[:, 0] = 5  # one that has all
  return make_examples(rng.integers(1, 20, n), *lengths, kind="ranked")


def dialogues(n=1000, seed=0, kind="paired"):
  """Lengths like those of HH-RLHF: medians of 110 and 40 tokens, long tails,
  cut at 512 together."""
  rng = np.random.default_rng(seed)
  prompt = np.clip(rng.lognormal(np.log(110), 0.8, n), 8, 384).astype(int)
  chosen, rejected = (
    np.clip(rng.lognormal(np.log(40), 0.9, n), 1, 128).astype(int)
    for _ in range(2)
  )
  rejected = rejected if kind == "paired" else None
  return make_examples(prompt, chosen, rejected, kind=kind)


def members(planned):
  return planned.ids[planned.ids >= 0]


def same(a, b):
  for x, y in zip((*a.batch, a.ids), (*b.batch, b.ids), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["paired", "unpaired", "sft"])
@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_every_batch_holds_exactly_the_batch_size(kind, batch_size):
  plan = Plan(pairs(kind=kind), batch_size=batch_size, steps=9)
  for step in range(9):
    batch, ids = plan[step]
    assert (ids >= 0).sum() == batch.weights.sum() == batch_size
    np.testing.assert_array_equal(ids >= 0, batch.weights == 1)


def test_a_batch_is_a_function_of_the_step_alone():
  make = lambda: Plan(pairs(), batch_size=8, steps=20, seed=3)
  forwards, jumping = make(), make()
  walked = [forwards[s] for s in range(20)]
  for step in (19, 3, 11, 3, 0, 7):
    same(jumping[step], walked[step])
    same(make()[step], walked[step])


def test_more_steps_do_not_change_the_earlier_members():
  few, many = (Plan(pairs(), batch_size=8, steps=n) for n in (3, 40))
  for step in range(3):
    np.testing.assert_array_equal(few.members(step), many.members(step))


def test_another_seed_is_another_order():
  a, b = (
    Plan(pairs(), batch_size=8, steps=4, seed=s).members(0) for s in (0, 1)
  )
  assert not np.array_equal(a, b)


def test_an_epoch_is_a_permutation_and_the_next_another():
  n, plan = 48, Plan(pairs(48), batch_size=8, steps=12)
  seen = np.concatenate([plan.members(s) for s in range(12)])
  for epoch in (seen[:n], seen[n:]):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
  assert not np.array_equal(seen[:n], seen[n:])


def test_epochs_follow_each_other_without_a_gap():
  # 50 examples, 8 a step: the boundary lies inside a batch.
  plan = Plan(pairs(50), batch_size=8, steps=25)
  seen = np.concatenate([plan.members(s) for s in range(25)])
  assert (np.bincount(seen, minlength=50) == 200 / 50).all()
  np.testing.assert_array_equal(np.sort(seen[:50]), np.arange(50))


def test_the_order_does_not_depend_on_the_devices():
  plans = [
    Plan(pairs(), batch_size=16, steps=5, rows_multiple=m) for m in (1, 2, 8)
  ]
  for step in range(5):
    for plan, multiple in zip(plans, (1, 2, 8), strict=True):
      np.testing.assert_array_equal(plan.members(step), plans[0].members(step))
      assert plan[step].ids.shape[0] % multiple == 0


@pytest.mark.parametrize("n", [48, 50, 333])
@pytest.mark.parametrize("balance", [0, 3, 16])
def test_a_balanced_epoch_is_a_permutation_too(n, balance):
  order = Order(
    n, 8, seed=2, sizes=(np.arange(n) ** 2)[:, None], balance=balance
  )
  seen = order.members(0, 3 * n // 8 + 1).reshape(-1)
  for e in range(3):
    np.testing.assert_array_equal(np.sort(seen[e * n : e * n + n]), range(n))
  for step in (0, 17, 5, n // 8 + 1):  # at any step, in any order
    again = Order(
      n, 8, seed=2, sizes=(np.arange(n) ** 2)[:, None], balance=balance
    )
    (one,) = again.members(step, step + 1)
    np.testing.assert_array_equal(one, seen[8 * step : 8 * step + 8])


def test_balanced_batches_are_about_as_large():
  sizes = np.random.default_rng(0).lognormal(5, 0.8, (4000, 2)).astype(int)
  spreads = [
    sizes[Order(4000, 16, sizes=sizes, balance=b).members(0, 240)]
    .sum(axis=1)
    .std(axis=0)
    for b in (0, 4, 16)
  ]
  assert (spreads[1] < 0.7 * spreads[0]).all()
  assert (spreads[2] < 0.4 * spreads[0]).all()


def test_balancing_deals_an_example_to_any_batch_alike():
  """Over seeds, a batch of a window holds an example as often as another does:
  also the longest, and at the place where an epoch begins."""
  n, batch_size, seeds = 20, 4, 1500
  sizes = (np.arange(n) ** 3)[:, None]
  held = np.zeros((5, n))
  for seed in range(seeds):
    order = Order(n, batch_size, seed=seed, sizes=sizes, balance=3)
    for step, members in enumerate(order.members(0, 5)):
      held[step, members] += 1
  expected = seeds * batch_size / n
  assert np.abs(held - expected).max() < 5 * np.sqrt(expected)


def test_what_does_not_depend_on_length_is_batched_as_if_shuffled():
  """The variance of batch means, which gradients have, does not grow: it stays
  for what has nothing to do with length and shrinks for what does."""
  rng = np.random.default_rng(4)
  sizes = rng.lognormal(5, 0.8, (20_000, 1)).astype(int)
  other = rng.normal(size=20_000)
  plain, dealt = (
    Order(20_000, 16, sizes=sizes, balance=b).members(0, 1200) for b in (0, 16)
  )
  free = other[dealt].mean(axis=1).std() / other[plain].mean(axis=1).std()
  bound = sizes[dealt].mean(axis=1).std() / sizes[plain].mean(axis=1).std()
  assert abs(free - 1) < 0.1 and bound < 0.4


@pytest.mark.parametrize("room", [[4, 4, 4], [1, 4, 2], [0, 3, 0, 3]])
def test_each_hand_is_dealt_as_much_as_it_has_room_for(room):
  room, rng = np.array(room), np.random.default_rng(0)
  sizes = rng.lognormal(5, 0.5, (room.sum(), 2)).astype(int)
  to = deal(sizes, room, rng)
  np.testing.assert_array_equal(np.bincount(to, minlength=len(room)), room)


def test_dealing_by_hand():
  sizes, room = np.array([[9], [1], [5], [6]]), np.array([2, 2])
  to = deal(sizes, room, np.random.default_rng())
  assert to[0] == to[1] != to[2] == to[3]  # 9 + 1 and 6 + 5


@pytest.mark.parametrize("balance", [0, 1])
def test_the_members_of_a_step_are_those_of_the_permutations(balance):
  plan = Plan(pairs(n=7), batch_size=5, steps=9, seed=3, balance=balance)
  epochs = [np.random.default_rng([3, e]).permutation(7) for e in range(7)]
  order = np.concatenate(epochs)
  for step in range(9):
    expected = order[5 * step : 5 * step + 5]
    assert plan.members(step).tolist() == expected.tolist()


def test_steps_default_to_once_through_the_examples():
  assert len(Plan(pairs(50), batch_size=8)) == 7
  assert len(Plan(pairs(48), batch_size=8)) == 6


@pytest.mark.parametrize("n", [1, 7, 8, 50])
def test_an_unshuffled_plan_shows_each_example_once_and_fills_up(n):
  plan = Plan(pairs(n), batch_size=8, shuffle=False)
  seen = np.concatenate([members(plan[s]) for s in range(len(plan))])
  np.testing.assert_array_equal(np.sort(seen), np.arange(n))
  assert sum(plan[s].batch.weights.sum() for s in range(len(plan))) == n


def test_iterating_a_plan_ends():
  assert len(list(Plan(pairs(50), batch_size=8))) == 7


@pytest.mark.parametrize("rows", [1, 4, 7, 60])
def test_rows_get_each_example_and_no_more_than_they_may_hold(rows):
  rng = np.random.default_rng(rows)
  tokens = rng.integers(1, 100, (20, 60))
  to = spread(tokens, rng.integers(1, tokens + 1), rows, 60 // rows + 1)
  held = np.stack([(to == r).sum(axis=1) for r in range(rows)])
  assert held.sum() == to.size and held.max() <= 60 // rows + 1
  if rows == 60:  # one each, if only for evenness
    assert (held == 1).all()


def test_rows_are_about_as_full_in_tokens_and_in_scored_ones():
  rng = np.random.default_rng(0)
  scored = rng.lognormal(4, 0.8, (50, 64)).astype(int)
  tokens = scored + rng.lognormal(4.5, 0.8, (50, 64)).astype(int)
  to = spread(tokens, scored, 4, 64)
  for x in (tokens, scored):
    sums = np.stack([np.where(to == r, x, 0).sum(axis=1) for r in range(4)])
    assert (sums.max(axis=0) / sums.mean(axis=0)).mean() < 1.03


def test_spreading_by_hand():
  # Scored ones are alike, so tokens decide.
  tokens = np.array([[3, 7, 2, 6, 5, 4]])
  to = spread(tokens, np.ones_like(tokens), 2, 9)
  assert to.tolist() == [[0, 0, 1, 1, 1, 0]]  # 7 + 4 + 3, and 6 + 5 + 2


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
@pytest.mark.parametrize("batch_size", [16, 64, 256])
def test_batches_of_dialogues_are_full(kind, batch_size):
  plan = Plan(dialogues(4096, kind=kind), batch_size=batch_size, steps=128)
  used = total = scored = places = 0
  for step in range(0, 128, 5):
    batch = plan[step].batch
    shape = plan.shape_of(step)
    used += (batch.key_end > 0).sum()
    total += batch.tokens.size
    scored += batch.lengths.sum()
    places += batch.source.size
    assert batch.tokens.shape == (shape.rows, shape.row.tokens)
    assert (batch.key_end > 0).sum() == plan.tokens(step)
  assert plan.fill() == pytest.approx(used / total, abs=0.01)
  assert plan.scored_fill() == pytest.approx(scored / places, abs=0.02)
  assert plan.fill() >= 0.95 and plan.scored_fill() >= 0.94


@pytest.mark.parametrize("balance", [0, 16])
@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("row_length", [0, 640])
def test_a_plan_has_no_more_shapes_than_it_may(balance, most, row_length):
  plan = Plan(
    dialogues(), batch_size=32, steps=100, row_length=row_length,
    row_counts=most, balance=balance, rows_multiple=2,
  )  # fmt: skip
  assert 1 <= len(plan.shapes) <= most
  seen = {plan[step].batch.tokens.shape for step in range(0, 100, 3)}
  assert seen <= {(s.rows, s.row.tokens) for s in plan.shapes}
  for rows, row in plan.shapes:
    assert rows % 2 == row.scored % 8 == 0
    assert row_length in (0, row.tokens)


def test_more_shapes_pad_less():
  fills = [
    Plan(dialogues(), batch_size=16, steps=400, balance=0, row_counts=n).fill()
    for n in (1, 2, 4, 8)
  ]
  assert fills == sorted(fills) and fills[-1] > fills[0] + 0.2


def test_a_shape_that_would_hardly_be_used_is_not_made():
  few, many = (
    Plan(dialogues(), batch_size=16, steps=n, balance=0) for n in (3, 400)
  )
  assert len(few.shapes) == 1 and len(many.shapes) == 4


def test_every_step_fits_its_shape_and_no_other_would_be_less_work():
  needs = np.random.default_rng(0).integers(1, 40, (300, 3))
  chosen = shapes.choose(needs, 6)
  assert len(chosen) == 6
  mine = chosen[shapes.assign(needs, chosen)]
  assert (needs <= mine).all()
  for need, shape in zip(needs, mine, strict=True):
    fitting = chosen[(need <= chosen).all(axis=1)]
    assert shapes.work(shape) == shapes.work(fitting).min()


def test_shapes_by_hand():
  # Ten small batches, ten of many rows, ten of long rows: no shape helps two.
  kinds = np.array([[1, 64, 16], [8, 64, 16], [1, 512, 16]])
  needs = np.repeat(kinds, 10, axis=0)
  assert shapes.choose(needs, 5).tolist() == kinds[[0, 2, 1]].tolist()
  assert shapes.choose(needs, 1).tolist() == [[8, 512, 16]]


@pytest.mark.parametrize("rows_multiple", [1, 8])
def test_a_free_row_is_as_long_as_its_batch_needs(rows_multiple):
  plan = Plan(dialogues(), batch_size=64, steps=20, rows_multiple=rows_multiple)
  for step in range(20):
    assert plan.shape_of(step).rows % rows_multiple == 0
    batch = plan[step].batch
    longest = (batch.key_end > 0).sum(axis=1)
    assert longest.max() <= batch.tokens.shape[1] < 17_000
    # Devices get about as much to do.
    assert longest.min() > 0.8 * longest.max()


@pytest.mark.parametrize("kind", ["paired", "unpaired", "sft"])
def test_a_batch_tells_each_example_whole(kind):
  """Reads prompt and responses back out of the arrays alone."""
  x = pairs(kind=kind)
  plan = Plan(x, batch_size=12, steps=3, seed=1)
  for step in range(3):
    batch, ids = plan[step]
    who = plan.members(step)
    before = dict(zip(who, np.roll(who, 1), strict=True))
    for row, place in np.argwhere(ids >= 0):
      e = ids[row, place]
      second = x.rejected(e) if kind == "paired" else x.chosen(before[e])
      if kind == "sft":
        second = second[:0]
      for branch, response in enumerate((x.chosen(e), second)):
        mine = batch.slot[row] == 2 * place + branch
        np.testing.assert_array_equal(batch.target[row, mine], response)
        if not len(response):
          continue
        # What predicts them: the prompt's last token, then the response.
        source = batch.source[row, mine]
        np.testing.assert_array_equal(
          batch.tokens[row, source], [x.prompt(e)[-1], *response[:-1]]
        )
        p = x.prompt_lengths[e]
        np.testing.assert_array_equal(
          batch.positions[row, source], p - 1 + np.arange(len(response))
        )
      assert batch.desirable[row, place] == x.desirable[e]
      assert batch.margins[row, place] == x.margins[e]
    # Nothing else is scored.
    scored = batch.slot < 2 * batch.weights.shape[1]
    prompts, responses = plan.lengths(step)
    np.testing.assert_array_equal(prompts, x.prompt_lengths[who])
    assert scored.sum() == responses.sum() == batch.lengths.sum()
    assert (batch.key_end > 0).sum() == plan.tokens(step)


@pytest.mark.parametrize("most", [2, 3, 4, 5])
def test_every_token_of_every_ranked_response_is_scored_once(most):
  """Reads prompts and responses back out of the arrays alone."""
  x = rankings(most=most)
  plan = Plan(x, batch_size=12, steps=5, seed=1)
  assert plan.shapes[0].row.branches == most
  for step in range(5):
    batch, ids = plan[step]
    assert batch.lengths.shape == (*ids.shape, most)
    places = np.argwhere(ids >= 0)
    assert len(places) == batch.weights.sum() == 12
    for row, place in places:
      e = ids[row, place]
      np.testing.assert_array_equal(batch.lengths[row, place], x.lengths[e])
      for k in range(most):
        response = x.response(e, k)
        mine = batch.slot[row] == most * place + k
        np.testing.assert_array_equal(batch.target[row, mine], response)
        if not len(response):
          continue
        source = batch.source[row, mine]
        np.testing.assert_array_equal(
          batch.tokens[row, source], [x.prompt(e)[-1], *response[:-1]]
        )
        p = x.prompt_lengths[e]
        np.testing.assert_array_equal(
          batch.positions[row, source], p - 1 + np.arange(len(response))
        )
    # Nothing else is scored, no token scores two, and no place is left over.
    scored = batch.slot < most * ids.shape[1]
    _, responses = plan.lengths(step)
    assert scored.sum() == responses.sum() == batch.lengths.sum()
    assert (batch.slot[~scored] == most * ids.shape[1]).all()
    for row, mine in enumerate(scored):
      source = batch.source[row, mine]
      assert len(set(source)) == len(source)
    assert (batch.key_end > 0).sum() == plan.tokens(step)
    assert not batch.lengths[ids < 0].any()


def test_rankings_of_two_are_planned_as_pairs_are():
  x = pairs()
  ranked = dataclasses.replace(x, kind="ranked")
  for step in range(3):
    same(*(Plan(y, batch_size=8, steps=3)[step] for y in (x, ranked)))


def test_a_row_holds_the_longest_ranking_whole():
  x = make_examples([9, 9], [4, 1], [4, 1], [4, 0], [4, 0], [4, 0])
  longest = 3 * 8 + 5 * 4
  assert Plan(x, batch_size=2).shapes[-1].row.tokens >= longest
  with pytest.raises(ConfigError, match=f"row 1000 takes {longest} tokens"):
    Plan(x, batch_size=2, row_length=longest - 1)
  batch, _ = Plan(x, batch_size=2, row_length=longest, shuffle=False)[0]
  assert batch.tokens.shape == (2, longest)


def test_an_unpaired_example_meets_the_completion_before_it_in_the_batch():
  x = pairs(20, kind="unpaired")
  for shuffle in (True, False):
    plan = Plan(x, batch_size=5, steps=4, shuffle=shuffle)
    for step in range(4):
      who = plan.members(step)
      batch, ids = plan[step]
      for i, e in enumerate(who):
        row, place = np.argwhere(ids == e)[0]
        other = batch.target[row, batch.slot[row] == 2 * place + 1]
        np.testing.assert_array_equal(other, x.chosen(who[i - 1]))
        assert who[i - 1] != e


def test_a_last_batch_of_one_still_meets_another_completion():
  x = pairs(6, kind="unpaired")
  batch, ids = Plan(x, batch_size=5, shuffle=False)[1]
  ((row, place),) = np.argwhere(ids == 5)
  other = batch.target[row, batch.slot[row] == 2 * place + 1]
  np.testing.assert_array_equal(other, x.chosen(4))


@pytest.mark.parametrize("x", [pairs(), rankings(most=5)])
def test_known_reference_scores_lie_where_their_examples_do(x):
  k = x.lengths.shape[1]
  known = np.arange(1, 50 * k + 1).reshape(50, k).astype(np.float32)
  plan = Plan(x, batch_size=8, steps=3, reference=Scores(known, tails=-known))
  for step in range(3):
    batch, ids = plan[step]
    found = batch.reference
    assert found.confidence is None
    for scores, sign in ((found.logps, 1), (found.tails, -1)):
      assert scores.dtype == np.float32
      for place in np.ndindex(ids.shape):
        expected = sign * known[ids[place]] if ids[place] >= 0 else [0] * k
        np.testing.assert_array_equal(scores[place], expected)


def test_a_row_too_short_names_the_data_row_and_both_lengths():
  x = make_examples([3, 30], [2, 9], [2, 8])
  with pytest.raises(ConfigError) as e:
    Plan(x, batch_size=2, row_length=45)
  longest = 30 - 1 + 9 + 8
  for word in ("row_length=45", "1001", str(longest), "max_length"):
    assert word in str(e.value)
  assert (
    Plan(x, batch_size=2, row_length=longest).shapes[-1].row.tokens == longest
  )


@pytest.mark.parametrize(("n", "batch_size"), [(5, 1), (1, 4)])
def test_unpaired_data_needs_another_example_in_the_batch(n, batch_size):
  with pytest.raises(ConfigError, match="batch_size >= 2"):
    Plan(pairs(n, kind="unpaired"), batch_size=batch_size)
  Plan(pairs(n), batch_size=batch_size)  # pairs do not


def test_token_cost_counts_the_prompts_last_token_once_a_branch():
  assert token_cost(4, 3, 2) == (4 - 1) + 3 + 2


def test_token_cost_counts_a_prompt_for_every_two_responses_there_are():
  assert token_cost(4, 3, 2, 5) == 2 * (4 - 1) + 3 + 2 + 5
  assert token_cost(4, 3, 2, 5, 6, 7) == 3 * (4 - 1) + 3 + 2 + 5 + 6 + 7
  assert token_cost(4, 3, 2, 0, 0) == token_cost(4, 3, 2)
  columns = np.array([[4, 3, 2, 5, 0], [1, 3, 2, 5, 6]]).T
  assert token_cost(*columns).tolist() == [16, 16]


def test_fill_row_refuses_what_does_not_fit_or_is_empty():
  shape = RowShape(tokens=8, scored=5, examples=1)
  one = np.ones(1, np.int32)
  for examples in (
    [Example(one[:0], one, one)],  # no prompt
    [Example(one, one[:0], one)],  # no response
    [Example(np.ones(9, np.int32), one, one)],  # tokens
    [Example(one, np.ones(4, np.int32), np.ones(2, np.int32))],  # scored
    [Example(one, one, one)] * 2,  # examples
    [Example(one, one, one, rest=(one,))],  # responses
  ):
    with pytest.raises(ValueError):
      fill_row(empty_batch(1, shape), 0, examples)


def test_an_empty_batch_sees_scores_and_counts_nothing():
  batch = empty_batch(2, RowShape(tokens=4, scored=3, examples=2))
  assert not batch.key_end.any()
  assert not batch.weights.any()
  assert (batch.slot == 4).all()


@pytest.mark.parametrize(("n", "batch_size"), [(2, 4), (9, 4), (7, 5), (3, 8)])
def test_no_example_meets_its_own_completion_where_epochs_meet(n, batch_size):
  plan = Plan(pairs(n, kind="unpaired"), batch_size=batch_size, steps=40)
  wrapped = 0
  for step in range(40):
    members = plan.members(step)
    (others,) = plan._layouts.others(members[None])
    assert (others != members).all()
    assert set(others) <= set(range(n))
    wrapped += (np.roll(members, 1) == members).any()
  assert wrapped  # a plain rotation would have matched some with themselves


def test_a_step_outside_the_plan_is_an_index_error():
  plan = Plan(pairs(8), batch_size=4, shuffle=False)
  for step in (-1, 2):
    with pytest.raises(IndexError, match=f"step {step}"):
      plan[step]


def test_processes_read_their_own_rows_and_have_the_batch_together(monkeypatch):
  x, read = pairs(), []
  settings = {
    "batch_size": 16,
    "steps": 3,
    "rows_multiple": 4,
    "row_length": 64,
  }
  whole = Plan(x, **settings)
  parts = [
    Plan(x, **settings, local_rows=lambda n, k=k: np.arange(n) % 2 == k)
    for k in (0, 1)
  ]
  real = Plan._example
  monkeypatch.setattr(
    Plan, "_example", lambda plan, e, o: (read.append(e), real(plan, e, o))[1]
  )
  for step in range(3):
    batch, ids = whole[step]
    empty = empty_batch(*whole.shape_of(step))
    for k, plan in enumerate(parts):
      mine = np.arange(len(ids)) % 2 == k
      read.clear()
      part, known = plan[step]
      assert sorted(read) == sorted(e for e in ids[mine].ravel() if e >= 0)
      np.testing.assert_array_equal(known, ids)  # whose scores are whose
      for ours, theirs, nothing in zip(part, batch, empty, strict=True):
        if theirs is not None:
          np.testing.assert_array_equal(ours[mine], theirs[mine])
          np.testing.assert_array_equal(ours[~mine], nothing[~mine])
      assert plan.tokens(step) == whole.tokens(step)
      assert plan.shape_of(step) == whole.shape_of(step)
      assert plan.shape_of(step).rows == len(ids)
