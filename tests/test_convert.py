"""From a run to a folder to serve, and between the forms of a checkpoint."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import ROOT, load, random_folder, rewrite, same_bytes, tensors

from dpo_jax import convert_sources
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.config import from_dict
from dpo_jax.config_file import defaults
from dpo_jax.convert import convert
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import CheckpointError, ConfigError, UserError
from dpo_jax.models import hf, hf_write
from dpo_jax.run import Run
from dpo_jax.train import train
from dpo_jax.update import TrainState


def train_briefly(workdir, corpus, **changes):
  """A real run of two steps, a checkpoint after each."""
  config = defaults(loss="sft")
  settings = {
    "model.tokenizer": "bytes", "model.width": 16, "model.layers": 2,
    "model.heads": 2, "model.kv_heads": 1, "model.ffn": 32,
    "data.source": str(corpus["sft"]), "data.cache_dir": "",
    "data.eval_rows": 0, "data.row_length": 512, "train.batch_size": 4,
    "train.steps": 2, "train.checkpoint_every": 1, "sample.prompts": 0,
    "optim.learning_rate": 1e-2,
  }  # fmt: skip
  config.update_from_flattened_dict(settings | changes)
  train(from_dict(config.to_dict()), workdir)
  return workdir


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=8)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
  return train_briefly(tmp_path_factory.mktemp("runs") / "run", corpus)


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder with what lies beside weights."""
  random_folder(tmp_path / "m")
  for name in ("tokenizer.json", "generation_config.json"):
    (tmp_path / "m" / name).write_text(f'{{"of": "{name}"}}')
  (tmp_path / "m" / "modeling_odd.py").write_text("raise SystemExit")
  return tmp_path / "m"


def files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def alone(folder):
  """Nothing half-written lies beside a folder."""
  return not [
    p for p in folder.parent.iterdir() if p.suffix in (".part", ".old")
  ]


def test_the_newest_checkpoint_of_a_run_becomes_the_model_it_exported(
  run, tmp_path
):
  line = convert(run, tmp_path / "out")
  assert "step 2" in line and str(tmp_path / "out") in line
  assert files(tmp_path / "out") == files(run / "model")


@pytest.mark.parametrize(
  "changes", [{"lora.rank": 2}, {"optim.freeze": "embed|layers/0"}], ids=str
)
def test_a_run_that_saves_only_what_it_trains_is_put_on_its_base(
  run, corpus, tmp_path, changes
):
  base = tmp_path / "base"
  shutil.copytree(run / "model", base)
  workdir = train_briefly(
    tmp_path / "run", corpus, **{"model.path": str(base)} | changes
  )
  convert(workdir, tmp_path / "out")
  same_bytes(tensors(workdir / "model"), tensors(tmp_path / "out"))
  assert files(tmp_path / "out") == files(workdir / "model")
  moved = tensors(base)["model.layers.1.mlp.up_proj.weight"]
  assert not np.array_equal(
    moved, tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"]
  )
  if "lora.rank" in changes:
    with pytest.raises(ConfigError, match="merged into a Hugging Face folder"):
      convert(workdir, tmp_path / "orbax", form="orbax")
  rewrite(base, lambda found: found["model.norm.weight"].__imul__(2))
  with pytest.raises(CheckpointError, match="not the weights that the run"):
    convert(workdir, tmp_path / "again")
  assert not (tmp_path / "again").exists()


def test_an_earlier_step_of_a_run_that_is_still_going_can_be_taken(
  run, tmp_path
):
  going = run / "checkpoints" / "3.orbax-checkpoint-tmp"
  going.mkdir()
  convert(run, tmp_path / "out", step=1)
  assert going.is_dir()  # it is the run's
  going.rmdir()
  _, loaded = load(tmp_path / "out")
  _, last = load(run / "model")
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), loaded, last)
  assert min(jax.tree.leaves(moved)) > 0
  # The same as on the way that continues a run, with all of its state.
  config = from_dict(json.loads((run / "config.json").read_text())["config"])
  with Checkpoints(run / "checkpoints") as saved:
    state = saved.restore(1, Run(config).abstract_state)
  jax.tree.map(np.testing.assert_array_equal, state.params, loaded)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
  with pytest.raises(CheckpointError, match=r"step 7.* 1, 2$"):
    convert(run, tmp_path / "out", step=7)
  assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  with pytest.raises(CheckpointError, match="no checkpoint yet"):
    convert(tmp_path / "run", tmp_path / "out")


def test_a_state_that_holds_something_else_is_refused_by_name(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  params = {"params": {"adapter": jnp.ones((2, 3))}}
  state = TrainState(jnp.int32(4), params, {}, jnp.int32(0))
  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    saved.save(4, state, {})
    saved.wait()
  with pytest.raises(CheckpointError, match=r"adapter.*float32\[2, 3\]"):
    convert(tmp_path / "run", tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_of_a_run_is_refused_in_a_line(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  for file in (tmp_path / "run" / "checkpoints" / "2").rglob("*"):
    if file.is_file() and file.parent.name == "d":
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(CheckpointError, match="cannot be restored") as error:
    convert(tmp_path / "run", tmp_path / "out")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_orbax_and_back_gives_the_same_bytes(folder, tmp_path):
  def mix(found):
    for name in found:
      if "mlp" in name:
        found[name] = found[name].astype(np.float16)
      elif "attn" in name:
        found[name] = found[name].astype(jnp.bfloat16)

  rewrite(folder, mix)
  convert(folder, tmp_path / "orbax", form="orbax")
  assert not list((tmp_path / "orbax").glob("*.safetensors"))
  assert (tmp_path / "orbax" / "tokenizer.json").exists()
  convert(tmp_path / "orbax", tmp_path / "back")
  same_bytes(tensors(folder), tensors(tmp_path / "back"))
  mine, theirs = files(tmp_path / "back"), files(folder)
  assert mine.keys() == theirs.keys() - {"modeling_odd.py"}
  for name in ("tokenizer.json", "generation_config.json"):
    assert mine[name] == theirs[name]
  same = [hf.read_config(x)[1] for x in (folder, tmp_path / "back")]
  assert same[0] == same[1]


def test_a_run_can_become_orbax_variables_in_another_dtype(run, tmp_path):
  convert(run, tmp_path / "orbax", form="orbax", dtype="bfloat16")
  convert(tmp_path / "orbax", tmp_path / "back")
  found = tensors(run / "model")
  wanted = {k: v.astype(jnp.bfloat16) for k, v in found.items()}
  same_bytes(wanted, tensors(tmp_path / "back"))
  about = json.loads((tmp_path / "back" / "config.json").read_text())
  assert about["dtype"] == about["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", ""])
def test_a_folder_is_rewritten_in_another_dtype_and_shard_size(
  folder, tmp_path, dtype
):
  before = json.loads((folder / "config.json").read_text())
  before["something_else"] = 3  # not ours to drop
  (folder / "config.json").write_text(json.dumps(before))
  convert(folder, tmp_path / "out", dtype=dtype, max_shard_bytes=900)
  kind = jnp.dtype(dtype or "float32")
  wanted = {k: v.astype(kind) for k, v in tensors(folder).items()}
  same_bytes(wanted, tensors(tmp_path / "out"))
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
  after = json.loads((tmp_path / "out" / "config.json").read_text())
  assert after == before | (
    {"dtype": dtype, "torch_dtype": dtype} if dtype else {}
  )
  load(tmp_path / "out")


def test_quantised_weights_are_not_cast(folder, tmp_path):
  name = "model.norm.weight"
  rewrite(folder, lambda found: found.update({name: np.ones(8, np.int8)}))
  with pytest.raises(CheckpointError, match=f"{name} is of type I8"):
    convert(folder, tmp_path / "out", dtype="bfloat16")
  assert not (tmp_path / "out").exists() and alone(tmp_path / "out")


def test_a_checkpoint_is_replaced_and_nothing_else_is(folder, run, tmp_path):
  target = tmp_path / "out"
  convert(folder, target)
  (target / "old.txt").write_text("")
  convert(folder, target, dtype="float16")
  assert not (target / "old.txt").exists() and alone(target)
  other = tmp_path / "other"
  other.mkdir()
  convert(folder, other)  # an empty folder is no loss
  shutil.rmtree(other)
  other.mkdir()
  (other / "thesis.tex").write_text("years of work")
  for wrong in (other, run, other / "thesis.tex", pathlib.Path(__file__)):
    with pytest.raises(ConfigError, match="is not replaced"):
      convert(folder, wrong)
  assert (other / "thesis.tex").read_text() == "years of work"
  for wrong in (folder, folder.parent, folder / ".." / folder.name):
    with pytest.raises(ConfigError, match="over what is read"):
      convert(folder, wrong)
  load(folder)


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_full_disk_is_one_line_and_leaves_the_old_folder(
  folder, tmp_path, monkeypatch, form
):
  target = tmp_path / "out"
  convert(folder, target, form=form)
  before = files(target)

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(hf_write, "_write_file", full)
  monkeypatch.setattr(convert_sources.shutil, "copyfile", full)
  with pytest.raises(CheckpointError, match="No space left"):
    convert(folder, target, form=form)
  assert files(target) == before and alone(target)


def test_what_is_no_checkpoint_is_refused(folder, run, tmp_path):
  with pytest.raises(CheckpointError, match="none: no config"):
    convert(tmp_path / "none", tmp_path / "out")
  with pytest.raises(ConfigError, match="has no step"):
    convert(folder, tmp_path / "out", step=3)
  (folder / "config.json").write_text("{}")
  with pytest.raises(CheckpointError, match="neither of a run nor of a model"):
    convert(folder, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_orbax_variables_of_another_model_or_damaged_are_refused(
  folder, tmp_path
):
  place = tmp_path / "orbax"
  convert(folder, place, form="orbax")
  about = json.loads((place / "config.json").read_text())
  (place / "config.json").write_text(json.dumps(about | {"vocab_size": 25}))
  with pytest.raises(CheckpointError, match=r"embed.*\[24, 8\].*\[25, 8\]"):
    convert(place, tmp_path / "out")
  (place / "config.json").write_text(json.dumps(about | {"mlp_bias": True}))
  with pytest.raises(CheckpointError, match="cannot be restored"):
    convert(place, tmp_path / "out")
  (place / "config.json").write_text(json.dumps(about))
  shutil.rmtree(place / "variables" / "d")
  with pytest.raises(UserError, match="cannot be restored") as error:
    convert(place, tmp_path / "out")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_the_command_prints_a_line_and_fails_in_a_line(folder, tmp_path):
  def command(*args):
    return subprocess.run(
      [sys.executable, "scripts/convert.py", *args],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )

  done = command(f"--from={folder}", f"--to={tmp_path / 'out'}",
                 "--dtype=bfloat16", "--max_shard_gb=0.000001")  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f"{tmp_path / 'out'} (hf): {folder} (hf)")
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  done = command(f"--from={tmp_path / 'none'}", f"--to={tmp_path / 'x'}")
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
