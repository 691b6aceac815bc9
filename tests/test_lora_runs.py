"""Whole runs that train adapters, or a part of the weights."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from runs import (  # noqa: F401
  STEPS,
  compile_once,
  metric_rows,
  on_base,
  save_base,
  stop_after,
)

from dpo_jax import dry_run
from dpo_jax.asking import answer_texts
from dpo_jax.build import build
from dpo_jax.convert import convert
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.judge import judge
from dpo_jax.run import Run
from dpo_jax.train import Stopped, train
from dpo_jax.weights import load_policy

pytestmark = pytest.mark.slow

LORA = {"lora.rank": 4, "lora.alpha": 16.0, "lora.dropout": 0.1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
  """A model to put adapters on."""
  return save_base(corpus, tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def finished(corpus, base, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("lora") / "run"
  return train(on_base(corpus, base, **LORA), workdir), workdir


def loaded(corpus, path, **changes):
  config = on_base(corpus, str(path), **changes)
  built = build(config)
  return built, load_policy(config, built)


def test_a_run_with_adapters_learns_and_starts_at_log_two(finished):
  summary, _ = finished
  assert summary["initial_eval"]["loss"] == np.float32(np.log(2))
  assert summary["final_eval"]["loss"] < summary["initial_eval"]["loss"]
  assert 0 < summary["trained_parameters"] < summary["parameters"]
  assert summary["kl_to_reference"] is not None


def test_checkpoints_hold_the_adapters_and_not_the_base(finished):
  _, workdir = finished
  meta = json.loads(
    (workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text()
  )
  arrays = [n for n in meta["arrays"] if n.startswith("params")]
  assert arrays and all(n.endswith(("/a", "/b")) for n in arrays)


def test_the_exported_model_is_the_base_with_the_adapters(
  corpus, base, finished
):
  _, workdir = finished
  built, merged = loaded(corpus, workdir / "model")
  assert set(merged) == {"params"}
  _, parts = loaded(corpus, base, **{"lora.path": str(workdir / "adapter")})
  assert set(parts) == {"params", "lora"}
  batch, _ = Run(on_base(corpus, base)).train_plan[0]
  logps = [
    np.asarray(jax.jit(built.score)(variables, batch).logps)
    for variables in (merged, parts, {"params": parts["params"]})
  ]
  np.testing.assert_allclose(logps[0], logps[1], rtol=1e-5, atol=1e-3)
  assert np.abs(logps[0] - logps[2]).max() > 1e-2


def test_merging_an_adapter_by_the_script_gives_the_exported_model(
  base, finished, tmp_path
):
  _, workdir = finished
  line = convert(base, tmp_path / "m", adapter=workdir / "adapter")
  assert str(workdir / "adapter") in line
  for file in ("model.safetensors", "tokenizer.json"):
    there = (tmp_path / "m" / file).read_bytes()
    assert there == (workdir / "model" / file).read_bytes()
  with pytest.raises(ConfigError, match="merged into a Hugging Face folder"):
    convert(base, tmp_path / "n", form="orbax", adapter=workdir / "adapter")


def test_adapters_evaluate_and_answer_as_the_merged_model(
  corpus, base, finished
):
  _, workdir = finished
  adapter = {"lora.path": str(workdir / "adapter"), "reference.path": base}
  of_model = on_base(corpus, str(workdir / "model"), **{"reference.path": base})
  of_adapter = on_base(corpus, base, **adapter)
  results = [judge(config) for config in (of_model, of_adapter)]
  for key, value in results[0]["metrics"].items():
    np.testing.assert_allclose(
      results[1]["metrics"][key], value, rtol=1e-4, atol=1e-4, err_msg=key
    )
  said = [answer_texts(c, ["Q: hello"]) for c in (of_model, of_adapter)]
  assert said[0][0]["response"] == said[1][0]["response"]


def test_a_stopped_run_with_dropout_continues_to_the_same_bits(
  corpus, base, finished, tmp_path, monkeypatch
):
  _, straight = finished
  config = on_base(corpus, base, **LORA)
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    with pytest.raises(Stopped):
      train(config, tmp_path / "run")
  train(config, tmp_path / "run")
  assert metric_rows(tmp_path / "run") == metric_rows(straight)
  for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
    there = (tmp_path / "run" / file).read_bytes()
    assert there == (straight / file).read_bytes()


def change_one_number(folder, name):
  file = folder / name
  tensors = safetensors.numpy.load_file(file)
  key = sorted(tensors)[-1]
  tensors[key] = tensors[key].copy()
  tensors[key].flat[-1] += 1
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def test_neither_another_base_nor_other_adapters_are_continued(
  corpus, base, finished, tmp_path
):
  _, workdir = finished
  shutil.copytree(base, tmp_path / "base")
  shutil.copytree(workdir / "adapter", tmp_path / "adapter")
  # Without a reference, only the weights below the adapters tell.
  changes = {"loss.name": "orpo", "lora.path": str(tmp_path / "adapter")}
  config = on_base(corpus, str(tmp_path / "base"), **changes)
  train(config, tmp_path / "run")
  (tmp_path / "run" / "summary.json").unlink()
  train(config, tmp_path / "run")  # nothing has changed yet
  (tmp_path / "run" / "summary.json").unlink()

  about = tmp_path / "adapter" / "adapter_config.json"
  before = about.read_text()
  about.write_text(before.replace('"lora_alpha": 16.0', '"lora_alpha": 160.0'))
  assert about.read_text() != before
  with pytest.raises(CheckpointError, match="another adapters"):
    train(config, tmp_path / "run")
  with pytest.raises(CheckpointError, match="not the weights"):
    convert(tmp_path / "run", tmp_path / "out")
  about.write_text(before)

  change_one_number(tmp_path / "base", "model.safetensors")
  with pytest.raises(CheckpointError, match="another frozen"):
    train(config, tmp_path / "run")
  with pytest.raises(CheckpointError, match="not the weights"):
    convert(tmp_path / "run", tmp_path / "out")


def test_with_dropout_the_parts_of_a_batch_belong_to_the_run(
  corpus, base, finished, tmp_path
):
  shutil.copytree(finished[1], tmp_path / "run")
  changes = LORA | {"train.microbatches": 2, "data.row_length": 0}
  with pytest.raises(CheckpointError, match="another dropout"):
    train(on_base(corpus, base, **LORA, **{"train.microbatches": 2}),
          tmp_path / "run")  # fmt: skip
  assert Run(on_base(corpus, base, **changes)).identity()["dropout"] == [2, 1]


def test_nothing_that_is_read_is_written_over(base, finished, tmp_path):
  _, workdir = finished
  with pytest.raises(ConfigError, match="written over"):
    convert(workdir, base)
  folder = tmp_path / "base"
  shutil.copytree(base, folder)
  shutil.copytree(workdir / "adapter", folder / "adapter")
  with pytest.raises(ConfigError, match="written over"):
    convert(base, folder, adapter=folder / "adapter")
  assert (folder / "adapter" / "adapter_config.json").exists()


def test_settings_that_would_be_ignored_are_refused(corpus, base):
  for changes, words in (
    ({"lora.alpha": 64.0}, "lora.alpha=64.0"),
    ({"lora.targets": "q"}, "lora.targets='q'"),
    ({"lora.dropout": 0.1}, "lora.dropout=0.1"),
    ({"lora.rank": 2, "lora.alpha": 0.0}, "lora.alpha=0.0"),
  ):
    with pytest.raises(ConfigError) as error:
      build(on_base(corpus, base, **changes))
    assert words in str(error.value)


def test_training_goes_on_from_adapters_and_they_are_the_reference(
  corpus, base, finished
):
  _, workdir = finished
  path = {"lora.path": str(workdir / "adapter")}
  run = Run(on_base(corpus, base, **path))
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  assert "a" in reference["lora"]["layers"]["mlp"]["up"]
  # Dropout is of a training, not of the adapters: the margins start at 0.
  assert run.built.lora.rank == 4 and run.built.lora.dropout == 0
  also = {"reference.path": base + "/"}
  off = Run(on_base(corpus, base, **path | also))
  assert set(off.load_reference(state.params, frozen)) == {"params"}


def test_the_reference_of_new_adapters_is_the_one_base(corpus, base):
  run = Run(on_base(corpus, base, **LORA))
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  assert set(reference) == {"params"}
  jax.tree.map(
    lambda x, y: x is y or pytest.fail("copied"),
    reference["params"],
    frozen["params"],
  )


def test_what_is_frozen_is_shared_with_the_reference_and_stays(
  corpus, base, tmp_path
):
  changes = {"optim.freeze": "embed|layers/0/", "optim.rates": "norm=0.1"}
  config = on_base(corpus, base, **changes)
  run = Run(config)
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  assert reference["params"]["embed"] is frozen["params"]["embed"]
  assert "embed" not in state.params["params"]
  summary = train(config, tmp_path / "run")
  assert summary["final_eval"]["loss"] < summary["initial_eval"]["loss"]
  _, before = loaded(corpus, base)
  _, after = loaded(corpus, tmp_path / "run" / "model")
  np.testing.assert_array_equal(
    before["params"]["embed"], after["params"]["embed"]
  )
  for x, y in zip(
    jax.tree.leaves(before["params"]["layers"]),
    jax.tree.leaves(after["params"]["layers"]),
    strict=True,
  ):
    np.testing.assert_array_equal(x[0], y[0])
    assert (x[1] != y[1]).any()


def test_a_moving_reference_goes_with_frozen_weights(corpus, base, tmp_path):
  changes = {"optim.freeze": "embed", "reference.sync_every": 2}
  summary = train(on_base(corpus, base, **changes), tmp_path / "run")
  assert np.isfinite(summary["final_eval"]["loss"])


def test_the_dry_run_counts_what_is_trained(corpus, base):
  text = dry_run.describe(on_base(corpus, base, **LORA))
  run = Run(on_base(corpus, base, **LORA))
  trained, _ = run.trainable.split(run.built.abstract)
  count = sum(x.size for x in jax.tree.leaves(trained))
  assert f"{count:,} of them trained" in text
  # The base is there once, though policy and reference both have it.
  size = sum(x.size for x in jax.tree.leaves(run.built.abstract["params"])) * 4
  held = dict(re.findall(r"^  (\w+) +([\d.]+) MiB$", text, re.M))
  assert "reference" not in held
  given = sum(float(held[k]) for k in ("trained", "frozen", "optimizer"))
  assert abs(given * 2**20 - size - 12 * count) < 2**18


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({**LORA, "reference.sync_every": 2}, "a mean of adapters"),
    ({**LORA, "lora.targets": "q,head"}, "'head'"),
    ({"optim.freeze": "embd"}, "'embd' matches none"),
    ({**LORA, "lora.dropout": 1.5}, "lora.dropout=1.5"),
  ],
  ids=str,
)
def test_settings_that_do_not_go_together_are_refused(
  corpus, base, changes, words
):
  with pytest.raises(ConfigError) as error:
    Run(on_base(corpus, base, **changes))
  assert words in str(error.value)


def test_a_rank_that_is_not_that_of_the_folder_is_refused(
  corpus, base, finished
):
  _, workdir = finished
  changes = {"lora.path": str(workdir / "adapter"), "lora.rank": 8}
  with pytest.raises(ConfigError, match="have rank 4"):
    build(on_base(corpus, base, **changes))
  changes = {"lora.path": str(workdir)}
  with pytest.raises(CheckpointError, match=r"there is one in .*/adapter"):
    build(on_base(corpus, base, **changes))
  with pytest.raises(ConfigError, match="never trained"):
    answer_texts(on_base(corpus, base, **LORA), ["Q: hello"])
  changes = {"lora.path": str(workdir / "adapter"), "lora.alpha": 64.0}
  with pytest.raises(ConfigError, match="say that themselves"):
    build(on_base(corpus, base, **changes))
