"""Writing safetensors: what the files hold, and what is there when it fails."""

import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_cases import abstract, load, random_folder, same_bytes, tensors

from dpo_jax.models import hf, hf_write, llama


@pytest.fixture
def folder(tmp_path):
  random_folder(tmp_path / "m")
  return tmp_path / "m"


def test_tensors_begin_at_multiples_of_their_width_in_files_of_two_types(
  folder,
):
  config, variables = load(folder)

  def narrow(path, x):
    return x if "norm" in str(path) else x.astype(jnp.bfloat16)

  mixed = jax.tree_util.tree_map_with_path(narrow, variables)
  out = folder.parent / "out"
  hf.save_checkpoint(out, llama, config, mixed)
  data = (out / "model.safetensors").read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  assert header.pop("__metadata__") == {"format": "pt"}
  assert size % 8 == 0
  widths = {"F32": 4, "BF16": 2}
  assert {about["dtype"] for about in header.values()} == widths.keys()
  for about in header.values():
    assert about["data_offsets"][0] % widths[about["dtype"]] == 0
  written = json.loads((out / "config.json").read_text())
  assert written["dtype"] == written["torch_dtype"] == "bfloat16"  # of most


def test_only_one_tensor_is_on_the_host_at_a_time(folder, monkeypatch):
  config, variables = load(folder)
  alive, most = [], []
  to_hf = hf_write.layout.to_hf

  def counted(path, part):
    tensor = to_hf(path, part)
    alive.append(weakref.ref(tensor))
    most.append(sum(ref() is not None for ref in alive))
    return tensor

  monkeypatch.setattr(hf_write.layout, "to_hf", counted)
  hf.save_checkpoint(folder.parent / "out", llama, config, variables)
  assert len(most) == len(tensors(folder))
  assert max(most) <= 2  # the one before goes when the next is there


def test_a_transform_is_given_each_part_of_ours_and_changes_what_is_written(
  folder,
):
  config, variables = load(folder)
  seen = []

  def double(path, index, part):
    seen.append((path, index, part.shape))
    return (
      part * 2 if path == "layers/mlp/up/kernel" and index == (1,) else part
    )

  out = folder.parent / "out"
  hf.save_checkpoint(out, llama, config, variables, transform=double)
  assert ("embed", (), (24, 8)) in seen
  assert [x for x in seen if x[0] == "layers/attention/q/kernel"] == [
    ("layers/attention/q/kernel", (i,), (8, 4, 2)) for i in range(3)
  ]
  wanted = tensors(folder)
  wanted["model.layers.1.mlp.up_proj.weight"] *= 2
  same_bytes(wanted, tensors(out))


def test_a_transform_that_changes_the_dtype_is_refused(folder):
  config, variables = load(folder)
  widen = lambda path, index, part: part.astype(np.float64)
  with pytest.raises(ValueError, match=r"float64.*float32.*embed"):
    hf.save_checkpoint(
      folder.parent / "out", llama, config, variables, transform=widen
    )
  assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_files_can_be_of_another_dtype_than_the_arrays(folder):
  config, variables = load(folder)
  out = folder.parent / "out"
  hf.save_checkpoint(out, llama, config, variables, dtype=jnp.bfloat16)
  wanted = {k: v.astype(jnp.bfloat16) for k, v in tensors(folder).items()}
  same_bytes(wanted, tensors(out))
  assert hf.read_config(out)[1] == config


@pytest.mark.parametrize("most", [1, 700, 2000, 10**9])
def test_a_file_is_as_large_as_allowed_and_no_tensor_is_lost(folder, most):
  config, variables = load(folder)
  out = folder.parent / "out"
  hf.save_checkpoint(out, llama, config, variables, max_shard_bytes=most)
  same_bytes(tensors(folder), tensors(out))
  for file in out.glob("*.safetensors"):
    found = safetensors.numpy.load_file(file)
    sizes = [tensor.nbytes for tensor in found.values()]
    assert sum(sizes) <= most or len(sizes) == 1
  load(out)


def test_a_failed_save_leaves_the_old_folder_and_nothing_half_written(folder):
  config, variables = load(folder)
  before = {p.name: p.read_bytes() for p in folder.iterdir()}

  def fail(path):
    assert (pathlib.Path(path) / "config.json").exists()
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    hf.save_checkpoint(folder, llama, config, variables, save_tokenizer=fail)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_save_replaces_the_old_folder_and_its_leftovers(folder):
  config, variables = load(folder)
  (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
  leftover = folder.with_name(folder.name + ".part")
  leftover.mkdir()
  (leftover / "junk").write_text("of a run that was killed")
  hf.save_checkpoint(
    folder, llama, config, variables,
    save_tokenizer=lambda to: (pathlib.Path(to) / "t.json").write_text("{}"),
  )  # fmt: skip
  names = sorted(p.name for p in folder.iterdir())
  assert names == ["config.json", "model.safetensors", "t.json"]
  assert not leftover.exists()


@pytest.mark.parity
def test_transformers_reads_the_dtype_and_the_shards(tmp_path):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  config = llama.Config(24, 8, 12, 3, 4, 2, 2, tied=True)
  compute = {"param_dtype": jnp.bfloat16}
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    abstract(config, **compute),
  )
  out = tmp_path / "m"
  hf.save_checkpoint(out, llama, config, variables, max_shard_bytes=700)
  theirs = transformers.AutoConfig.from_pretrained(out)
  assert theirs.dtype in (torch.bfloat16, "bfloat16")
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype="auto", output_loading_info=True
  )
  assert model.dtype == torch.bfloat16
  assert not any(report.values())
  embed = model.get_input_embeddings().weight.detach().float().numpy()
  np.testing.assert_array_equal(
    embed, variables["params"]["embed"].astype(jnp.float32)
  )
