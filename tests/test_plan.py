"""Plans and packing: pure functions of lengths, seed and step."""

import dataclasses

import numpy as np
import pytest

from dpo_jax.batch import Scores
from dpo_jax.data.pack import (
  Example,
  RowShape,
  empty_batch,
  fill_row,
  first_fit_decreasing,
  rows_needed,
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


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_never_overflows_and_loses_nobody(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 100, 200)
  scored = rng.integers(1, tokens + 1)
  shape = RowShape(tokens=128, scored=100, examples=5)
  rows = first_fit_decreasing(tokens.tolist(), scored.tolist(), shape)
  assert sorted(i for row in rows for i in row) == list(range(200))
  for row in rows:
    assert tokens[row].sum() <= 128
    assert scored[row].sum() <= 100
    assert len(row) <= 5


def test_first_fit_decreasing_by_hand():
  # 6, 5, 4, 3, 2 into rows of 10: 6+4, 5+3+2.
  shape = RowShape(tokens=10, scored=10, examples=9)
  rows = first_fit_decreasing([3, 6, 2, 5, 4], [1] * 5, shape)
  assert rows == [[1, 4], [3, 0, 2]]


@pytest.mark.parametrize(
  "shape", [RowShape(40, 30, 9), RowShape(40, 60, 3), RowShape(60, 20, 60)]
)
def test_rows_are_counted_of_many_batches_as_they_are_packed_one_by_one(shape):
  rng = np.random.default_rng(shape.examples)
  sizes = rng.integers(1, 19, (2, 200, 50))
  tokens, scored = sizes.max(axis=0), sizes.min(axis=0)
  tokens[-1, 7:] = scored[-1, 7:] = 0  # a batch of seven
  packed = [
    len(first_fit_decreasing(t[t > 0].tolist(), s.tolist(), shape))
    for t, s in zip(tokens, scored, strict=True)
  ]
  assert rows_needed(tokens, scored, shape).tolist() == packed


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_plan_counts_the_rows_that_its_steps_take(shuffle, monkeypatch):
  monkeypatch.setattr(
    "dpo_jax.data.plan._AT_ONCE", 64
  )  # five parts, one ragged
  x = pairs(n=130)
  plan = Plan(x, batch_size=16, shuffle=shuffle, row_counts=99, row_length=64)
  rows = [int((p.batch.weights.sum(axis=1) > 0).sum()) for p in plan]
  assert [plan.rows(s) for s in range(len(plan))] == rows


def test_the_members_of_a_step_are_those_of_the_permutations():
  plan = Plan(pairs(n=7), batch_size=5, steps=9, seed=3)
  epochs = [np.random.default_rng([3, e]).permutation(7) for e in range(7)]
  order = np.concatenate(epochs)
  for step in range(9):
    expected = order[5 * step : 5 * step + 5]
    assert plan.members(step).tolist() == expected.tolist()


def test_ties_keep_their_order():
  shape = RowShape(tokens=2, scored=2, examples=2)
  assert first_fit_decreasing([1] * 4, [1] * 4, shape) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_rows_of_dialogues_are_nine_tenths_full(kind):
  plan = Plan(dialogues(kind=kind), batch_size=64, steps=16)
  used = total = 0
  for step in range(16):
    batch = plan[step].batch
    used += (batch.key_end > 0).sum()
    total += batch.tokens.size
  assert used / total >= 0.9
  assert plan.fill() == used / total


@pytest.mark.parametrize("batch_size", [4, 32, 256])
def test_a_plan_has_at_most_four_shapes(batch_size):
  plan = Plan(dialogues(), batch_size=batch_size, steps=40)
  shapes = {plan[step].batch.tokens.shape for step in range(40)}
  assert 1 <= len(shapes) <= 4
  assert {rows for rows, _ in shapes} <= set(plan.row_counts.tolist())


@pytest.mark.parametrize("row_length", [0, 64, 77])
def test_a_row_keeps_within_its_capacity(row_length):
  plan = Plan(
    pairs(), batch_size=16, steps=4, row_length=row_length, scored_multiple=6
  )
  shape = plan.shape
  assert row_length in (0, shape.tokens)
  assert shape.scored % 6 == 0
  batch = plan[0].batch
  assert batch.tokens.shape[1] == shape.tokens
  assert batch.source.shape == batch.slot.shape == batch.target.shape
  assert batch.source.shape[1] == shape.scored
  assert batch.weights.shape[1] == shape.examples
  assert batch.reference is None


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
  assert plan.shape.branches == most
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
  assert Plan(x, batch_size=2).shape.tokens >= longest
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
  assert Plan(x, batch_size=2, row_length=longest).shape.tokens == longest


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
    others = plan._others(members)
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
    empty = empty_batch(len(ids), whole.shape)
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
      assert plan.rows(step) == whole.rows(step) == len(ids)
