"""Evaluation: means that no batch size changes, and each row in its place."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import evaluate, judge, losses, metrics, sharding
from dpo_jax.answers import Answerer, load_reward
from dpo_jax.batch import Scores
from dpo_jax.build import build
from dpo_jax.config import Config, Data, Model, Reference, Sample, Train
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.errors import ConfigError
from dpo_jax.evaluate import Evaluation, by_subset
from dpo_jax.models import hf
from dpo_jax.score import summed
from dpo_jax.weights import load_variables

VOCABULARY = 40
N = 23


pytestmark = pytest.mark.usefixtures("compile_quickly")


def examples_of(kind, n=N, seed=0):
  """Random examples; prompts and responses of 1 to 12 tokens."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 13, (3, n)).astype(np.int32)
  if kind != "paired":
    lengths[2] = 0
  total = int(lengths.sum())
  return Examples(
    tokens=rng.integers(0, VOCABULARY, total).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths.sum(axis=0))]),
    prompt_lengths=lengths[0],
    lengths=lengths[1:].T,
    desirable=rng.random(n) < 0.5,
    margins=np.zeros(n, np.float32),
    rows=np.arange(n),
    subsets=np.zeros(n, np.int32),
    subset_names=("",),
    kind=kind,
    format="ids",
    report={},
    fingerprint="",
  )


TABLES = [
  jnp.asarray(np.random.default_rng(s).uniform(-3, -0.5, VOCABULARY), "f4")
  for s in (1, 2)
]


def table_variables(i):
  return {"params": TABLES[i]}


def score(variables, batch, *, tails=False, confidence=False):
  """A model of token frequencies: no attention, so nothing to compile."""
  table = variables["params"]
  squares = jax.nn.logsumexp(2 * table) if confidence else None
  return summed(table[batch.target], batch, tails=tails, squares=squares)


MESH = sharding.make_mesh()


@pytest.fixture(scope="module")
def evaluator_of():
  made = {}

  def get(name):
    if name not in made:
      made[name] = evaluate.make_evaluator(score, losses.make(name), MESH)
    return made[name]

  return get


def by_hand(examples, table):
  table = np.asarray(table, np.float64)
  return np.array(
    [
      [table[examples.chosen(i)].sum(), table[examples.rejected(i)].sum()]
      for i in range(len(examples))
    ]
  )


def plan_of(examples, size):
  # Few shapes of batches, so that little is compiled.
  return Plan(
    examples, batch_size=size, shuffle=False, row_length=128, rows_multiple=4
  )


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "sft"])
def test_means_do_not_depend_on_the_batch_size(name, evaluator_of):
  loss = losses.make(name)
  examples = examples_of(loss.kind)
  policy, reference = table_variables(0), None
  if loss.needs_reference:
    reference = table_variables(1)
  results = [
    evaluator_of(name)(policy, reference, plan_of(examples, size))
    for size in (1, 7, 16, 64)
  ]
  # What one unpacked pass over all examples gives.
  logps = jnp.asarray(by_hand(examples, TABLES[0]), jnp.float32)
  known = jnp.asarray(by_hand(examples, TABLES[1]), jnp.float32)
  out = loss(
    policy_chosen_logps=logps[:, 0],
    policy_rejected_logps=logps[:, 1],
    reference_chosen_logps=known[:, 0],
    reference_rejected_logps=known[:, 1],
    chosen_lengths=examples.chosen_lengths,
    rejected_lengths=examples.rejected_lengths,
  )
  wanted = metrics.means(losses.reduce(out))
  for result in results:
    assert sorted(result.means) == sorted(wanted)
    for key, value in wanted.items():
      assert result.means[key] == pytest.approx(value, rel=2e-6, abs=1e-6)
    np.testing.assert_allclose(result.policy.logps, logps, atol=1e-5)
    if reference is None:
      assert result.reference is None
    else:
      np.testing.assert_allclose(result.reference.logps, known, atol=1e-5)


@pytest.mark.parametrize("size", [22, 23])  # 22 leaves a batch of one
def test_kto_is_finite_and_its_means_count_each_class(size, evaluator_of):
  examples = examples_of("unpaired")
  result = evaluator_of("kto")(
    table_variables(0), table_variables(1), plan_of(examples, size)
  )
  assert all(math.isfinite(v) for v in result.means.values())
  logratios = (by_hand(examples, TABLES[0]) - by_hand(examples, TABLES[1]))[
    :, 0
  ]
  liked = 0.1 * logratios[examples.desirable].mean()
  not_liked = 0.1 * logratios[~examples.desirable].mean()
  means = result.means
  assert means["rewards/chosen"] == pytest.approx(liked, abs=1e-5)
  assert means["rewards/rejected"] == pytest.approx(not_liked, abs=1e-5)
  margin = means["rewards/margins"]
  assert margin == pytest.approx(liked - not_liked, abs=1e-5)


@pytest.mark.parametrize("size", [5, 23])
def test_a_mixture_divides_each_term_by_its_own_count(size, evaluator_of):
  """Of several batches too: pairs by pairs, tokens by tokens."""
  plan = plan_of(examples_of("paired"), size)
  args = table_variables(0), table_variables(1), plan
  terms = [evaluator_of(name)(*args).means["loss"] for name in ("dpo", "sft")]
  mixed = evaluator_of("dpo+0.3*sft")(*args).means
  assert mixed["loss"] == pytest.approx(terms[0] + 0.3 * terms[1], rel=1e-5)
  assert mixed["loss/dpo"] == pytest.approx(terms[0], rel=1e-5)


def test_evaluation_uses_the_state_of_a_loss_and_leaves_it(evaluator_of):
  plan = plan_of(examples_of("unpaired"), 7)
  args = table_variables(0), table_variables(1), plan
  seen = losses.Sums(jnp.float32(6), jnp.float32(2))
  none = losses.Sums(jnp.float32(0), jnp.float32(0))
  state = type(losses.make("bco").initial_state())(seen, none)
  assert evaluator_of("bco")(*args, state).means["delta"] == 3.0
  assert evaluator_of("bco")(*args).means["delta"] == 0.0


def test_an_untrained_policy_has_loss_log_2_and_accuracy_one_half(evaluator_of):
  result = evaluator_of("dpo")(
    table_variables(0), table_variables(0), plan_of(examples_of("paired"), 7)
  )
  assert result.means["loss"] == np.float32(math.log(2))
  assert result.means["rewards/accuracies"] == 0.5
  assert result.means["rewards/margins"] == 0.0


def test_means_leave_out_what_was_never_counted_and_add_in_float64():
  sums = {"a": losses.Sums(1.0, 0.0), "b": losses.Sums(3.0, 2.0)}
  assert metrics.means(sums) == {"b": 1.5}
  small = {"x": losses.Sums(np.float32(1), np.float32(1))}
  big = {"x": losses.Sums(np.float32(2**24), np.float32(2**24))}
  total = metrics.add([big, *[small] * 3])["x"]
  assert float(total.total) == 2**24 + 3  # float32 would stay at 2**24


@pytest.mark.parametrize(
  "share, n", [(0.5, 10), (0.93, 100), (1.0, 7), (0.0, 7), (0.25, 2)]
)
def test_the_interval_is_the_one_of_wilson(share, n):
  low, high = metrics.accuracy_interval(share, n)
  z = 1.959964
  # Its ends p are where |p - share| is z standard errors *of p*.
  for p in (low, high):
    assert (p - share) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-9)
  assert -1e-12 <= low <= share <= high <= 1 + 1e-12
  assert high - low > 0.01


def test_no_example_leaves_everything_open():
  assert metrics.accuracy_interval(0.0, 0) == (0.0, 1.0)


def subset_examples(subsets, names, chosen=1, rejected=1):
  subsets = np.array(subsets)
  return types.SimpleNamespace(
    subsets=subsets,
    subset_names=tuple(names),
    lengths=np.tile([chosen, rejected], (len(subsets), 1)),
  )


def test_subsets_are_counted_apart_and_a_tie_is_half():
  policy = np.array([[-1, -2], [-3, -1], [-5, -5], [-4, -9]], np.float32)
  reference = np.array([[-1, -1], [-2, -1], [-5, -5], [0, -9]], np.float32)
  # Margins: 1, -1, 0, -4.
  got = by_subset(
    Evaluation({}, Scores(policy), Scores(reference)),
    subset_examples([0, 1, 0, 1], ["chat", "code", "empty"]),
    losses.make("dpo"),
  )
  assert sorted(got) == ["chat", "code"]
  assert got["chat"]["examples"] == got["code"]["examples"] == 2
  assert got["chat"]["accuracy"] == 0.75
  assert got["code"]["accuracy"] == 0.0
  assert got["chat"]["logratio_margin"] == 0.5
  assert got["code"]["logratio_margin"] == -2.5
  assert got["chat"]["interval"] == metrics.accuracy_interval(0.75, 2)


def test_subset_accuracies_are_those_of_the_loss():
  # The longer answer is less likely as a whole, and likelier by the token;
  # ORPO compares by the token and reads no reference.
  logps = np.array([[-6.0, -3.0]] * 2)
  result = Evaluation({}, Scores(logps), Scores(np.zeros((2, 2))))
  examples = subset_examples([0, 0], [""], chosen=10, rejected=2)
  dpo = by_subset(result, examples, losses.make("dpo"))
  orpo = by_subset(result, examples, losses.make("orpo"))
  assert dpo["all"]["accuracy"] == 0.0
  assert orpo["all"]["accuracy"] == 1.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A tiny policy, its reference, and 14 pairs in two subsets."""
  root = tmp_path_factory.mktemp("judge")
  config = Config(
    model=Model(
      tokenizer="bytes", width=8, layers=1, heads=2, kv_heads=1, ffn=8
    )
  )
  built = build(config)
  variables = load_variables(config, built)
  rng = np.random.default_rng(0)
  for name in ("policy", "reference"):
    variables = jax.tree.map(
      lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f4"), variables
    )
    hf.save_checkpoint(
      root / name, built.family, built.model.config, variables,
      save_tokenizer=built.tokenizer.save,
    )  # fmt: skip
  rows = [
    {
      "prompt": f"Q{i}:",
      "chosen": "a" * (1 + i % 5),
      "rejected": "bc" * (1 + i % 3),
      "subset": "even" if i % 2 == 0 else "odd",
    }
    for i in range(14)
  ]
  file = root / "pairs.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return root


def settings(root, *, loss="dpo", reference="reference", **sample):
  return Config(
    model=Model(path=str(root / "policy")),
    reference=Reference(path=reference and str(root / reference)),
    data=Data(source=str(root / "pairs.jsonl"), max_length=32, cache_dir=""),
    loss={"name": loss},
    train=Train(batch_size=5),
    sample=Sample(**{"prompts": 0, "max_tokens": 8} | sample),
  )


def test_judging_a_file_gives_means_subsets_and_kl(folders):
  result = judge.judge(settings(folders, prompts=6))
  json.dumps(result, allow_nan=False)
  assert result["examples"] == 14
  subsets = result["subsets"]
  assert {k: v["examples"] for k, v in subsets.items()} == {
    "even": 7,
    "odd": 7,
  }
  # The subsets make up the whole.
  share = np.mean([row["accuracy"] for row in subsets.values()])
  assert share == pytest.approx(result["metrics"]["rewards/accuracies"])
  margin = np.mean([row["logratio_margin"] for row in subsets.values()])
  assert 0.1 * margin == pytest.approx(
    result["metrics"]["rewards/margins"], rel=1e-5
  )
  assert result["kl"]["mean"] > 0
  assert result["kl"]["standard_error"] > 0
  text = judge.render(result)
  for word in ("even", "odd", "KL, nats a response", "14 examples"):
    assert word in text


def test_judging_a_part_of_a_file_says_so(folders):
  config = settings(folders)
  data = dataclasses.replace(config.data, eval_rows=9)
  result = judge.judge(dataclasses.replace(config, data=data))
  assert result["examples"] == 9
  assert "9 of 14 (--config.data.eval_rows=0 takes" in judge.render(result)


def test_kl_is_0_where_the_policy_is_its_reference(folders):
  built = build(settings(folders))
  variables = load_variables(settings(folders), built)
  answerer = Answerer(built, Sample(max_tokens=8), [[1, 5], [1, 6, 7]], 0)
  sampled = answerer(variables).sampled
  kl = answerer.kl(variables, variables, sampled)
  assert kl == {"mean": 0.0, "standard_error": 0.0}


def test_kl_is_not_estimated_from_answers_of_another_distribution(folders):
  built = build(settings(folders))
  for sample in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}):
    answerer = Answerer(built, Sample(**sample), [[1, 5]], 0)
    assert answerer.kl({}, {}, None) is None


@pytest.mark.parametrize(
  "change, word",
  [
    ({"model": Model()}, "config.model.path is empty"),
    ({"reference": Reference()}, "config.reference.path"),
    ({"data": Data()}, "config.data.source is empty"),
  ],
  ids=["model", "reference", "source"],
)
def test_what_judging_lacks_is_named(change, word, folders):
  config = dataclasses.replace(settings(folders), **change)
  with pytest.raises(ConfigError, match=word):
    judge.judge(config)


@pytest.mark.parametrize(
  "name", ["nowhere:f", "math", "math:no", ".x:f", ":f", "math:pi", ""]
)
def test_a_reward_that_cannot_be_called_is_refused(name):
  with pytest.raises(ConfigError, match="expected 'module:function'"):
    load_reward(name)
