"""A reward model from its first step to its export: it learns, a stopped run
goes on, and what cannot be is refused in one line."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from runs import compile_once, on_base, save_base, small_config, stop_after

from configs import reward as reward_config
from dpo_jax import reward_model
from dpo_jax.build import build
from dpo_jax.config import from_dict
from dpo_jax.convert import convert
from dpo_jax.data.corpus import true_reward, write_corpus
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.judge import judge, render
from dpo_jax.processes import Stopped
from dpo_jax.run import Run
from dpo_jax.train import train

__all__ = ["compile_once"]
pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=1500)


def reward_run(corpus, **changes):
  changes = {"sample.prompts": 0} | changes
  return small_config(corpus, loss="reward", **changes)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
  """A run that has learned something: its folder, and its summary."""
  place = tmp_path_factory.mktemp("reward") / "run"
  config = reward_run(
    corpus,
    **{
      "train.steps": 100, "train.batch_size": 32, "train.eval_every": 0,
      "train.checkpoint_every": 0, "data.eval_rows": 200,
      "data.row_length": 4096,
    },
  )  # fmt: skip
  return place, train(config, place), config


def test_it_learns_and_reports_how_far_it_is_to_be_believed(trained):
  place, summary, _ = trained
  before, after = summary["initial_eval"], summary["final_eval"]
  assert abs(before["loss"] - math.log(2)) < 0.05
  assert after["loss"] < 0.62  # 0.493 is the least on these
  assert after["rewards/accuracies"] > 0.65  # 0.725 the most
  found = summary["calibration"]
  assert found["pairs"] == summary["eval_examples"]
  assert found["error"] == after["calibration_error"]
  assert sum(row["pairs"] for row in found["bins"]) == found["pairs"]
  page = (place / "report.html").read_text()
  assert "Calibration" in page and f"{found['bins'][0]['pairs']:,}" in page
  assert "log-ratio" not in page


def test_the_export_scores_as_the_run_and_is_judged_alike(trained, corpus):
  place, summary, config = trained
  values = config.to_dict()
  values["model"] |= {"path": str(place / "model"), "tokenizer": ""}
  result = judge(from_dict(values))
  for name, value in summary["final_eval"].items():
    if name in result["metrics"]:
      np.testing.assert_allclose(result["metrics"][name], value, rtol=1e-4)
  assert result["calibration"]["pairs"] == summary["eval_examples"]
  text = render(result)
  assert "score margin" in text and "calibration error" in text
  # The order of answers by their reward is that of the true one, mostly.
  policy = build(small_config(corpus))
  scorer = reward_model.load(place / "model", policy)
  prompt = "Q: What is Ana's dog like?\nA:"
  answers = [
    f" Ana's dog is {one} and {other}."
    for one in ("lovely", "merry", "bright", "dull", "nasty", "rotten")
    for other in ("gentle", "gloomy")
  ]
  tokenizer = policy.tokenizer
  asked = [tokenizer.bos_id, *tokenizer.encode([prompt])[0]]
  said = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(answers)]
  rewards = scorer([asked] * len(said), said)
  truth = [true_reward(prompt, answer) for answer in answers]
  assert np.corrcoef(rewards, truth)[0, 1] > 0.5


def test_the_folder_says_what_padding_is_and_keeps_it(trained, tmp_path):
  place, _, _ = trained
  about = json.loads((place / "model" / "config.json").read_text())
  assert about["pad_token_id"] == 0
  convert(place / "model", tmp_path / "orbax", form="orbax")
  convert(tmp_path / "orbax", tmp_path / "hf")
  again = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert again == about
  assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
    place / "model" / "model.safetensors"
  ).read_bytes()


def test_a_stopped_run_goes_on_to_the_same_numbers(
  corpus, tmp_path, monkeypatch
):
  config = reward_run(corpus)
  whole = train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(config, tmp_path / "parts")
  parts = train(config, tmp_path / "parts")
  assert parts["final_eval"] == whole["final_eval"]
  assert parts["calibration"] == whole["calibration"]
  ours, theirs = (
    (tmp_path / x / "model" / "model.safetensors").read_bytes()
    for x in ("parts", "whole")
  )
  assert ours == theirs
  convert(tmp_path / "parts", tmp_path / "converted")
  assert (tmp_path / "converted" / "model.safetensors").read_bytes() == ours
  assert json.loads((tmp_path / "converted" / "config.json").read_text()) == (
    json.loads((tmp_path / "parts" / "model" / "config.json").read_text())
  )


def test_margins_of_the_data_are_asked_of_the_scores(corpus, tmp_path):
  lines = pathlib.Path(corpus["pairs"]).read_text().splitlines()
  rows, found = [json.loads(line) for line in lines], []
  for told in ({}, {"margin": 1.5}):
    source = tmp_path / f"{len(told)}.jsonl"
    source.write_text("".join(json.dumps(x | told) + "\n" for x in rows))
    run = Run(reward_run(corpus | {"pairs": source}))
    state, frozen = run.start()
    batch, _ = run.train_plan[0]
    assert set(batch.margins[batch.weights > 0]) == {told.get("margin", 0)}
    _, sums = run.step(state, None, batch, frozen)
    found.append(sums)
  # The scores are the same, and near to one another before any step.
  a, b = (sums["rewards/margins"].mean() for sums in found)
  assert a == b and abs(a) < 0.2
  assert found[1]["loss"].mean() > found[0]["loss"].mean() + 0.8


def test_parts_of_a_batch_change_no_number(corpus):
  moved = []
  for parts in (1, 2):
    run = Run(reward_run(corpus, **{"train.microbatches": parts}))
    state, frozen = run.start()
    batch, _ = run.train_plan[0]
    state, sums = run.step(state, None, batch, frozen)
    moved.append((state.params, float(sums["loss"].mean())))
  np.testing.assert_allclose(moved[0][1], moved[1][1], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
    moved[0][0], moved[1][0],
  )  # fmt: skip


@pytest.mark.slow
def test_adapters_are_trained_with_the_head_and_exported_merged(
  corpus, tmp_path
):
  base = save_base(corpus, tmp_path / "base")
  config = on_base(
    corpus, base,
    **{"loss.name": "reward", "sample.prompts": 0, "lora.rank": 2},
  )  # fmt: skip
  summary = train(config, tmp_path / "run")
  assert summary["adapter_dir"] is None
  assert not (tmp_path / "run" / "adapter").exists()
  run = Run(config)
  state, frozen = run.start()
  assert set(state.params) == {"lora", "params"}
  assert list(state.params["params"]) == ["score"]
  assert "score" not in frozen["params"] and "unembed" not in frozen["params"]
  # What was trained is what is exported, but for the rounding of the merge.
  values = config.to_dict()
  values["model"]["path"] = str(tmp_path / "run" / "model")
  values["lora"]["rank"] = 0
  merged = judge(
    from_dict(values | {"data": values["data"] | {"eval_rows": 10}})
  )
  np.testing.assert_allclose(
    merged["metrics"]["loss"], summary["final_eval"]["loss"], rtol=1e-4
  )
  convert(tmp_path / "run", tmp_path / "converted")
  assert (tmp_path / "converted" / "model.safetensors").read_bytes() == (
    tmp_path / "run" / "model" / "model.safetensors"
  ).read_bytes()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"sample.prompts": 2}, ["sample.prompts=2", "answers nothing"]),
    (
      {"model.quantize": "int8", "model.remat": "block", "lora.rank": 2},
      ["model.quantize='int8'", "scalar head"],
    ),
    ({"reference.sync_every": 2}, ["reads no reference"]),
  ],
)
def test_settings_without_a_meaning_are_refused(corpus, changes, words):
  with pytest.raises(ConfigError) as error:
    Run(reward_run(corpus, **changes))
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "\n" not in str(error.value)


def test_a_language_model_is_not_judged_by_its_scores(corpus, tmp_path):
  base = save_base(corpus, tmp_path / "base")
  with pytest.raises(ConfigError, match="is a language model"):
    judge(on_base(corpus, base, **{"loss.name": "reward"}))


def test_a_reward_model_is_no_reference(trained, corpus, tmp_path):
  place, _, _ = trained
  base = save_base(corpus, tmp_path / "base")
  config = on_base(corpus, base, **{"reference.path": str(place / "model")})
  with pytest.raises(CheckpointError, match="a reward model, and no language"):
    Run(config).load_reference(None, None)


def test_the_config_file_has_both_forms():
  for arg in (None, "quickstart,root=somewhere"):
    config = from_dict(reward_config.get_config(arg).to_dict())
    assert config.make_loss().needs_scores and config.sample.prompts == 0
