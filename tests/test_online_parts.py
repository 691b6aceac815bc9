"""The parts of an online run: rows of answers, pairs, rewards, prompts."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from online_runs import online_config
from runs import small_config

from dpo_jax import logps
from dpo_jax.build import build
from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import ConfigError, DataError
from dpo_jax.online import grpo, ppo, value
from dpo_jax.online.packing import Packer
from dpo_jax.online.pairs import pairs_of
from dpo_jax.online.prompts import PromptPlan, Used
from dpo_jax.online.rewards import Rewards
from dpo_jax.online.rollout import Rollout
from dpo_jax.online.updates import minibatches
from dpo_jax.online_checks import check_online
from dpo_jax.weights import load_variables

NAN = float("nan")
CORPUS = {"pairs": "pairs.jsonl", "sft": "sft.jsonl"}
ROOM = 6


@pytest.fixture(scope="module")
def answered():
  """Prompts, and one to three answers to each."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(3, 250, n).astype(np.int32)
  prompts = [draw(n) for n in (5, 1, 9, 4, 7)]
  sizes = [(3, 6, 1), (1, 1, 1), (6, 6, 6), (2, 5, 4), (1, 2, 3)]
  return prompts, [[draw(n) for n in own] for own in sizes]


def packer(**changes):
  options = {"longest_prompt": 9, "max_tokens": ROOM, "shapes": 2} | changes
  return Packer(5, 3, **options)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_known_of_tokens_finds_its_way_to_rows_and_back(answered, rows):
  prompts, responses = answered
  pack = packer(rows_multiple=rows)
  part = pack(prompts, responses, [4, 0, 3, 2, 1])
  assert part.batch.tokens.shape[0] == rows
  tokens = np.zeros((5, 3, ROOM), np.float32)
  for n, own in enumerate(responses):
    for g, response in enumerate(own):
      tokens[n, g, : len(response)] = response
  there = part.example >= 0
  found = part.by_token(tokens)
  np.testing.assert_array_equal(found[there], part.batch.target[there])
  assert not found[~there].any()
  back = np.zeros_like(tokens)
  part.scatter(part.batch.target.astype(np.float32), back)
  np.testing.assert_array_equal(back, tokens)
  lengths = np.array([[len(x) for x in own] for own in responses])
  np.testing.assert_array_equal(part.by_response(lengths), part.batch.lengths)


def test_the_largest_shape_holds_whatever_comes_and_the_first_fit_is_taken():
  long = [np.arange(9, dtype=np.int32)] * 5
  full = [[np.arange(ROOM, dtype=np.int32)] * 3] * 5
  short = [[np.arange(1, dtype=np.int32)] * 3] * 5
  pack = packer()
  assert len(pack.shapes) == 2
  for responses, shape in ((full, pack.shapes[1]), (short, pack.shapes[0])):
    batch = pack(long, responses, range(5)).batch
    assert batch.tokens.shape == (shape.rows, shape.row.tokens)
    assert batch.slot.shape == (shape.rows, shape.row.scored)
    assert batch.weights.sum() == 5


def test_rows_of_one_answer_a_prompt_have_no_room_for_a_second():
  pack = Packer(5, 1, longest_prompt=9, max_tokens=ROOM, shapes=1)
  full = [[np.arange(ROOM, dtype=np.int32)]] * 5
  batch = pack([np.arange(9, dtype=np.int32)] * 5, full, range(5)).batch
  assert (batch.key_end > 0).sum() == 5 * (9 - 1 + ROOM)
  assert batch.tokens.size < 5 * (9 - 1 + ROOM) + 16
  assert batch.slot.size < 5 * ROOM + 8


def test_log_probs_of_tokens_add_up_to_those_of_answers(answered):
  config = small_config(CORPUS)
  built = build(config)
  variables = load_variables(config, built)
  batch = packer()(*answered, range(5)).batch
  tokens = jax.jit(built.score.tokens)(variables, batch)
  sums = logps.sum_by_slot(tokens, batch.slot, batch.lengths.shape[1:])
  whole = jax.jit(built.score)(variables, batch).logps
  np.testing.assert_allclose(sums, whole, rtol=1e-6)


def test_a_pair_is_the_best_and_the_worst_that_have_a_reward():
  pairs = pairs_of(
    np.array([[1, 3, 2], [NAN, 0, -1], [2, 2, 2], [NAN, 5, NAN], [NAN] * 3])
  )
  assert pairs.chosen.tolist()[:2] == [1, 1]
  assert pairs.rejected.tolist()[:2] == [0, 2]
  assert pairs.weights.tolist() == [1, 1, 0, 0, 0]
  values = np.arange(15).reshape(5, 3)
  assert pairs.of(values)[:2].tolist() == [[1, 0], [4, 5]]


def rollout(scores, lengths):
  n, g = np.shape(scores)
  zeros = np.zeros((n, g, ROOM))
  return Rollout(
    [np.arange(3)] * n, zeros.astype(np.int32), zeros.astype(np.float32),
    np.array(lengths), np.ones((n, g), bool),
    np.array(scores, np.float32), 0.0,
  )  # fmt: skip


def online(**changes):
  changes = {f"online.{k}": v for k, v in changes.items()}
  return online_config(CORPUS, "grpo", **changes).online


def test_answers_without_a_reward_are_as_if_not_given_in_grpo():
  """Whatever a group is divided by."""
  lengths = np.array([[2, 3, 1], [4, 5, 2], [1, 1, 1]])
  some = rollout([[1, NAN, 2], [0, 4, 8], [NAN, NAN, 5]], lengths)
  for scale, rest in (
    ("group", [1, 2]), ("batch", [1, 2, 0, 4, 8]), ("none", None),
  ):  # fmt: skip
    deviation = np.std(rest, ddof=1) + 1e-4 if rest else 1
    settings = online(scale=scale)
    given, sums, _ = grpo.prepare(settings, some, known((3, 3, ROOM)), None)
    found = given["advantages"][..., 0]
    np.testing.assert_allclose(
      found[0], np.array([-0.5, 0, 0.5]) / deviation, rtol=1e-5
    )
    assert found[1, 0] < 0 < found[1, 2]
    assert given["mask"].sum(axis=2).tolist() == [[2, 0, 1], [4, 5, 2], [0] * 3]
    assert sums["frac_reward_zero_std"].count == 2
    want = np.std([1, 2], ddof=1) + np.std([0, 4, 8], ddof=1)
    np.testing.assert_allclose(sums["reward_std"].total, want, rtol=1e-6)


def known(shape, seed=0):
  rng = np.random.default_rng(seed)
  names = ("old", "reference", "values")
  return {name: rng.normal(size=shape).astype(np.float32) for name in names}


def test_an_answer_that_none_is_left_to_compare_with_has_no_part_in_grpo():
  some = rollout([[1, 2], [NAN, 4]], [[2, 3], [4, 5]])
  given, sums, _ = grpo.prepare(online(), some, known((2, 2, ROOM)), None)
  assert given["mask"].sum(axis=2).tolist() == [[2, 3], [0, 0]]
  # By hand: -+0.5 over a deviation of sqrt(0.5).
  want = 0.5 / (np.sqrt(0.5) + 1e-4)
  np.testing.assert_allclose(
    given["advantages"][0, :, 0], [-want, want], rtol=1e-5
  )
  assert sums["frac_reward_zero_std"].count == 1


def test_ppo_is_given_what_hand_arithmetic_gives():
  settings = online(kl=0.5, whiten=False, lam=1.0, gamma=1.0)
  some = rollout([[1.0], [NAN]], [[2], [3]])
  of = known((2, 1, ROOM))
  given, sums, price = ppo.prepare(settings, some, of, None)
  kl = (of["old"] - of["reference"])[0, 0, :2]
  returns = np.array([1 - 0.5 * kl.sum(), 1 - 0.5 * kl[1]])
  np.testing.assert_allclose(given["returns"][0, 0, :2], returns, rtol=1e-5)
  np.testing.assert_allclose(
    given["advantages"][0, 0, :2], returns - of["values"][0, 0, :2], rtol=1e-5
  )
  assert given["mask"].sum(axis=2).tolist() == [[2], [0]]
  assert price is None
  total = sums["objective/rlhf_reward"]
  np.testing.assert_allclose(total.mean(), returns[0], rtol=1e-5)


def test_the_price_of_a_nat_moves_towards_its_target():
  settings = online(kl_target=0.1, kl_horizon=10)
  some, of = rollout([[1.0], [1.0]], [[2], [3]]), known((2, 1, ROOM))
  of["old"] = of["reference"] + 1  # 2 and 3 nats: far beyond
  _, _, price = ppo.prepare(settings, some, of, np.float32(0.2))
  np.testing.assert_allclose(price, 0.2 * (1 + 0.2 * 2 / 10), rtol=1e-6)
  of["old"] = of["reference"]
  _, _, price = ppo.prepare(settings, some, of, np.float32(0.2))
  np.testing.assert_allclose(price, 0.2 * (1 - 0.2 * 2 / 10), rtol=1e-6)
  of["old"] = of["old"] * NAN
  _, _, price = ppo.prepare(settings, some, of, np.float32(0.2))
  assert price == np.float32(0.2)  # for the steps to come


def test_minibatches_are_a_permutation_that_the_numbers_decide():
  parts = minibatches(12, 3, 5, 6, 7)
  assert [len(x) for x in parts] == [4, 4, 4]
  assert sorted(np.concatenate(parts)) == list(range(12))
  np.testing.assert_array_equal(parts, minibatches(12, 3, 5, 6, 7))
  assert not np.array_equal(parts, minibatches(12, 3, 5, 6, 8))


def test_long_runs_remember_the_last_steps_alone():
  plan = PromptPlan(range(3), batch_size=2, steps=20)
  for step in range(20):
    share = step / 20
    plan.used(step, Used(step, share, 1 - share, *[None] * 4, float(step)))
  assert plan.tokens(19) == plan.seconds(19) == 19
  assert plan.tokens(2) == 0 and plan.shape_of(2) is None
  np.testing.assert_allclose(plan.fill(), np.mean(np.arange(20) / 20))
  np.testing.assert_allclose(plan.scored_fill(), 1 - plan.fill())


@pytest.mark.parametrize("wide", [False, True])
def test_the_value_model_starts_from_a_reward_model_of_the_policys_shape(wide):
  built = build(small_config(CORPUS))
  model = value.value_model(built)
  policy = load_variables(small_config(CORPUS), built)
  changes = {"model.ffn": 48 if wide else 32, "data.max_length": 999}
  other = build(small_config(CORPUS, **changes))
  like = value.value_model(other)
  variables = like.init_variables(jax.random.key(1))
  reward = SimpleNamespace(model=like, variables=variables)
  start = value.start(model, policy, reward)
  own = policy["params"] if wide else variables["params"]
  jax.tree.map(np.testing.assert_array_equal, start["layers"], own["layers"])
  assert wide == (not np.any(start["score"]))
  shapes = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
  assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, shapes)


@pytest.fixture(scope="module")
def built():
  return build(small_config(CORPUS))


def rewards(built, name):
  return Rewards(online(reward=f"online_runs:{name}"), built)


def test_rewards_are_asked_for_text_and_failures_are_not_a_number(built):
  encode = lambda text: built.tokenizer.encode([text])[0]
  prompts = [[built.tokenizer.bos_id, *encode("Q: x")]] * 3
  ends = [built.tokenizer.eos_id]
  texts = ["b", "abc", "a"]
  responses = [[*encode(text), *ends] for text in texts]
  found = rewards(built, "vowels")(prompts, responses)
  np.testing.assert_allclose(found, [0, 1 / 3, 1], rtol=1e-6)
  found = rewards(built, "moody")(prompts, responses)  # codes say which fails
  codes = np.array([sum(map(ord, text)) % 3 for text in texts])
  assert set(codes) > {2} and (np.isnan(found) == (codes < 2)).all()
  scored = rewards(built, "never")(prompts, responses, strict=False)
  assert np.isnan(scored).all()
  with pytest.raises(ConfigError, match=r"all 3 answers.* ValueError: no opin"):
    rewards(built, "never")(prompts, responses)
  with pytest.raises(ConfigError, match=r"on the first: it gave 1e\+300"):
    rewards(built, "huge")(prompts, responses)
  # An answer of an end alone is an empty text.
  assert rewards(built, "vowels")(prompts[:1], [ends]).tolist() == [0]


def test_a_reward_that_is_not_there_is_named(built):
  with pytest.raises(ConfigError, match=r"config.online.reward='no.where:x'"):
    Rewards(online(reward="no.where:x"), built)


def read(tmp_path, lines, kind="prompts"):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  settings = EncodeSettings(max_length=64, kind=kind)
  return load_examples(str(path), "train", load_tokenizer("bytes"), settings)


def test_prompts_are_read_from_rows_of_any_shape(tmp_path):
  message = [{"role": "user", "content": "hi"}]
  tokenizer = load_tokenizer("bytes")
  for rows, text in (
    ([{"prompt": "hi"}, {"prompt": "ho"}], "hi"),
    ([{"prompt": "hi", "chosen": "a", "rejected": "b"}], "hi"),
    ([{"prompt": "hi", "completion": "a"}], "hi"),
    ([{"prompt": message}], "user: hi\nassistant:"),
    ([{"instruction": "hi"}], "Instruction: hi\nResponse:"),
  ):
    examples = read(tmp_path, rows)
    assert len(examples) == len(rows)
    assert tokenizer.decode(examples.prompt(0)) == text
    assert examples.prompt(0)[0] == tokenizer.bos_id
    assert not examples.lengths.any()


def test_a_prompt_alone_is_no_row_for_those_who_need_answers(tmp_path):
  with pytest.raises(DataError, match="wrong_shape 1"):
    read(tmp_path, [{"prompt": "hi"}], kind="paired")


def test_the_prompts_of_a_step_depend_on_seed_and_step_alone(tmp_path):
  examples = read(tmp_path, [{"prompt": f"hi {i}"} for i in range(10)])
  plan = PromptPlan(examples, batch_size=4, steps=5, seed=3)
  again = PromptPlan(examples, batch_size=4, steps=5, seed=3)
  for step in (4, 0, 2):
    np.testing.assert_array_equal(plan[step].ids, again[step].ids)
  epochs = np.concatenate([plan.members(s) for s in range(5)])
  for epoch in (epochs[:10], epochs[10:]):
    assert sorted(epoch) == list(range(10))
  with pytest.raises(IndexError):
    plan[5]
  rest = PromptPlan(examples, batch_size=4, shuffle=False)
  assert [len(rest.members(s)) for s in range(len(rest))] == [4, 4, 2]


@pytest.mark.parametrize(
  "method, changes, words",
  [
    ("grpo", {"online.reward": ""}, ["needs a reward", "reward_model"]),
    ("grpo", {"online.reward_model": "x"}, ["either"]),
    ("grpo", {"online.group": 1}, ["config.online.group=1", "at least 2"]),
    ("ppo", {"online.minibatches": 3}, ["minibatches=3", "batch_size=8"]),
    ("ppo", {"online.max_tokens": 90}, ["max_tokens=90", "has room for 24"]),
    ("ppo", {"data.row_length": 512}, ["config.data.row_length"]),
    ("pairs", {"reference.precompute": True}, ["reference.precompute"]),
    ("pairs", {"reference.sync_every": 2}, ["reference.sync_every"]),
    ("grpo", {"lora.rank": 2, "lora.dropout": 0.1}, ["lora.dropout"]),
    ("pairs", {"loss.name": "kto"}, ["config.loss.name='kto'"]),
    ("pairs", {"loss.name": "reward"}, ["config.loss.name='reward'"]),
    ("grpo", {"online.temperature": 0.7}, ["temperature=0.7", "grpo"]),
    ("ppo", {"online.top_k": 5}, ["config.online.top_k=5"]),
    ("grpo", {"loss.beta": 0.2}, ["config.loss.beta", "config.online"]),
    ("ppo", {"lora.rank": 2}, ["config.lora", "value model"]),
    ("grpo", {"online.clip": 1.5}, ["clip=1.5", "[0, 1]", "clip_high"]),
    ("pairs", {"online.temperature": 0.0}, ["temperature=0", "differ"]),
    ("pairs", {"online.kl": 0.1}, ["online.kl=0.1", "ppo and grpo"]),
    ("grpo", {"online.kl_target": 1.0}, ["kl_target=1.0", "only ppo"]),
    ("ppo", {"online.scale": "batch"}, ["scale='batch'", "only grpo"]),
    ("ppo", {"online.kl": 0.0}, ["kl_target=3.0", "online.kl", "above 0"]),
    ("ppo", {"online.kl_horizon": 15}, ["kl_horizon=15", "16 answers"]),
  ],
  ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line(
  method, changes, words
):
  if "loss.name" in changes:
    changes = changes | {"loss.beta": None}
  config = online_config(CORPUS, method, **changes)
  with pytest.raises(ConfigError) as error:
    check_online(config)
  message = str(error.value)
  assert "\n" not in message
  assert all(word in message for word in words), message


def test_the_settings_of_the_tests_go_together():
  for method in ("ppo", "grpo", "pairs"):
    check_online(online_config(CORPUS, method))
  check_online(small_config(CORPUS))
