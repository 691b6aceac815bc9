"""Reward models: packed scores are those of sequences alone, and only folders
that are one, with the policy's tokenizer, are loaded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import copy_of, rewrite, tensors
from test_evaluate import examples_of

from dpo_jax import reward_model, sharding
from dpo_jax.build import build
from dpo_jax.config import Config, Data, Model, Sample
from dpo_jax.data.closing import closed
from dpo_jax.data.plan import Plan
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.evaluate import score_examples
from dpo_jax.models import hf
from dpo_jax.weights import load_policy, load_variables

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = Model(tokenizer="bytes", width=16, layers=2, heads=2, kv_heads=1, ffn=32)
REWARD = {"loss": {"name": "reward"}, "sample": Sample(prompts=0)}


def saved(config, path):
  built = build(config)
  variables = load_variables(config, built)
  hf.save_checkpoint(
    path, built.family, built.model.config, variables,
    save_tokenizer=built.tokenizer.save,
  )  # fmt: skip
  return built, variables


@pytest.fixture(scope="module")
def policy():
  return build(Config(model=TINY))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("reward") / "model"
  built, variables = saved(Config(model=TINY, seed=3, **REWARD), path)
  return path, built, variables


def alone(built, variables, prompt, response):
  """The score of one sequence in a row of its own, nothing closed."""
  ids = np.concatenate([prompt, response]).astype(np.int32)
  padded = np.zeros(64, np.int32)  # one shape to compile
  padded[: len(ids)] = ids
  index = jnp.arange(64)[None]
  hidden = _apply(built.model)(variables, padded[None], index)
  return float(hidden[0, len(ids) - 1] @ variables["params"]["score"][0])


_APPLIED = {}


def _apply(model):
  def run(variables, ids, index):
    return model.apply(variables, ids, index, index * 0, index + 1)

  return _APPLIED.setdefault(id(model), jax.jit(run))


def test_a_closed_response_has_one_more_token_that_is_never_read():
  examples = examples_of("paired", n=5)
  more = closed(examples, 7)
  assert (more.lengths == examples.lengths + 1).all()
  for i in range(5):
    np.testing.assert_array_equal(more.prompt(i), examples.prompt(i))
    for k in range(2):
      np.testing.assert_array_equal(
        more.response(i, k), [*examples.response(i, k), 7]
      )
  assert more.fingerprint != examples.fingerprint
  single = closed(examples_of("sft", n=5), 7)
  assert (single.rejected_lengths == 0).all()
  packed = [Plan(closed(examples, t), batch_size=5, shuffle=False)[0].batch
            for t in (7, 8)]  # fmt: skip
  np.testing.assert_array_equal(packed[0].tokens, packed[1].tokens)
  assert (packed[0].target != packed[1].target).any()


def test_packed_pairs_have_the_scores_of_sequences_alone(folder):
  _, built, variables = folder
  examples = examples_of("paired", n=9)
  plan = Plan(
    closed(examples, 0), batch_size=9, shuffle=False,
    rows_multiple=sharding.batch_shards(built.mesh),
  )  # fmt: skip
  scores = score_examples(built.score, variables, plan, built.mesh).logps
  expected = [
    [alone(built, variables, examples.prompt(i), examples.response(i, k))
     for k in range(2)] for i in range(9)
  ]  # fmt: skip
  assert np.std(expected) > 0.01
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_a_scorer_reads_what_was_exported(folder, policy):
  path, built, variables = folder
  about = json.loads((path / "config.json").read_text())
  assert about["architectures"] == ["LlamaForSequenceClassification"]
  assert "lm_head.weight" not in tensors(path)
  assert tensors(path)["score.weight"].shape == (1, 16)
  scorer = reward_model.load(path, policy)
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(
    3, 259, rng.integers(low, high)
  ).tolist()
  prompts = [draw(1, 20) for _ in range(12)]
  prompts[4:8] = [prompts[4]] * 4  # neighbours share a row's prompt
  prompts[9:12] = [prompts[9]] * 3
  responses = [draw(1, 20) for _ in prompts]
  responses[2] = []
  rewards = scorer(prompts, responses)
  assert rewards.dtype == np.float32 and rewards.shape == (12,)
  expected = [
    alone(built, variables, p, r)
    for p, r in zip(prompts, responses, strict=True)
  ]
  np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-6)
  # Neither order nor company counts.
  np.testing.assert_allclose(
    scorer(prompts[::-1], responses[::-1])[::-1], rewards, rtol=1e-5, atol=1e-7
  )
  np.testing.assert_allclose(
    scorer(prompts[3:4], responses[3:4]), rewards[3:4], rtol=1e-5, atol=1e-7
  )
  assert scorer([], []).shape == (0,)


def test_few_shapes_are_compiled(folder, policy):
  scorer = reward_model.load(folder[0], policy)
  rng = np.random.default_rng(1)
  for n in (5, 7, 30, 33):
    prompts = rng.integers(3, 259, (n, 9)).tolist()
    scorer(prompts, [p[: 1 + i % 9] for i, p in enumerate(prompts)])
  # 33 fill more than 2 rows of 256, 30 as many, and the others one.
  assert scorer._step._cache_size() <= 3


def test_a_language_model_is_no_reward_model(policy, tmp_path):
  saved(Config(model=TINY), tmp_path / "lm")
  with pytest.raises(CheckpointError, match="expected a reward model"):
    reward_model.load(tmp_path / "lm", policy)


def test_another_tokenizer_is_refused(folder, policy, tmp_path):
  path = copy_of(folder[0], tmp_path / "other")
  about = json.loads((path / "tokenizer_config.json").read_text())
  about["add_bos_token"] = False
  (path / "tokenizer_config.json").write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match="another tokenizer") as error:
    reward_model.load(path, policy)
  assert "\n" not in str(error.value)


def test_a_classifier_of_two_labels_is_refused(folder, tmp_path):
  for i, entries in enumerate(
    ({"id2label": {"0": "no", "1": "yes"}}, {"id2label": ...})
  ):
    path = copy_of(folder[0], tmp_path / str(i), **entries)
    with pytest.raises(CheckpointError, match="2 labels; a reward model has 1"):
      hf.read_config(path)


def test_an_output_embedding_in_the_folder_is_passed_over(
  folder, policy, tmp_path
):
  path = copy_of(folder[0], tmp_path / "m")
  rewrite(path, lambda found: found.update(
    {"lm_head.weight": np.zeros((259, 16), "f4")}
  ))  # fmt: skip
  np.testing.assert_array_equal(
    reward_model.load(path, policy)([[1, 5]], [[6, 2]]),
    reward_model.load(folder[0], policy)([[1, 5]], [[6, 2]]),
  )


def test_a_reward_model_is_no_policy(folder):
  with pytest.raises(ConfigError, match="is a reward model, and no policy"):
    build(Config(model=Model(path=str(folder[0]))))


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_begins_a_reward_model_with_a_head_of_the_seed(
  tmp_path, tied
):
  base = Model(**vars(TINY) | {"tied": tied})
  _, before = saved(Config(model=base), tmp_path / "lm")
  drawn = []
  for seed in (0, 0, 1):
    config = Config(
      model=Model(path=str(tmp_path / "lm")), seed=seed, data=Data(), **REWARD
    )
    built = build(config)
    after = load_policy(config, built)
    assert "unembed" not in after["params"]
    assert jax.tree.structure(after) == jax.tree.structure(built.abstract)
    drawn.append(np.asarray(after["params"].pop("score")))
    before["params"].pop("unembed", None)
    jax.tree.map(np.testing.assert_array_equal, before, after)
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).all() and drawn[0].std() < 0.05
