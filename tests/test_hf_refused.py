"""Folders whose weights do not fit, or lie: refused in one line each."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hf_cases import abstract, load, random_folder, refused, rewrite, tensors

from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf
from dpo_jax.models.hf_names import differences


@pytest.fixture
def folder(tmp_path):
  random_folder(tmp_path / "m")
  return tmp_path / "m"


def test_missing_weights_are_refused(folder):
  (folder / "model.safetensors").unlink()
  refused(folder, "cannot read weights")


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_cut_file_is_refused(folder, left):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:left])
  refused(folder, "cannot read weights")


def test_an_oversized_header_is_refused(folder):
  file = folder / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
  refused(folder, "cannot read weights")


def test_a_missing_and_an_extra_tensor_are_both_named(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  rewrite(folder, lambda found: found.update(odd=found.pop(name)))
  refused(folder, f"missing: {name};", "unexpected: odd")


def test_a_layer_too_many_is_refused(folder):
  config = json.loads((folder / "config.json").read_text())
  config["num_hidden_layers"] = 2
  (folder / "config.json").write_text(json.dumps(config))
  refused(folder, "unexpected: model.layers.2.input_layernorm", "and 3 more")


def test_a_wrong_shape_is_refused_with_both_shapes(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  rewrite(folder, lambda found: found.update({name: np.ones((8, 12), "f4")}))
  refused(folder, name, "[8, 12]", "[12, 8]")


@pytest.mark.parametrize(
  "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder, name):
  shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
  index = {"weight_map": {"model.norm.weight": name}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  refused(folder, repr(name), "leaves the folder")


@pytest.mark.parametrize(
  "text",
  ["", "[]", "{}", "3", '{"weight_map": []}', '{"weight_map": {"a": 1}}',
   '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}',
   '{"weight_map": {"a": "\\u0000"}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_index_is_refused(folder, text):
  (folder / "model.safetensors.index.json").write_text(text)
  refused(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "BOOL"])
def test_weights_that_are_not_floats_are_refused(folder, dtype):
  # Quantised weights are integers with a scale elsewhere: read as they stand,
  # they are another model.
  name, size = "model.norm.weight", {"F8_E4M3": 1, "I32": 4, "BOOL": 1}[dtype]
  file = folder / "model.safetensors"
  found = safetensors.numpy.load_file(file)
  found.pop(name)
  odd = {"dtype": dtype, "shape": [8], "data_offsets": [0, 8 * size]}
  header = json.dumps({name: odd}).encode()
  safetensors.numpy.save_file(found, folder / "a.safetensors")
  (folder / "b.safetensors").write_bytes(
    len(header).to_bytes(8, "little") + header + b"\1" * 8 * size
  )
  index = {"weight_map": dict.fromkeys(found, "a.safetensors")}
  index["weight_map"][name] = "b.safetensors"
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  refused(folder, name)


def test_an_index_that_names_the_wrong_file_is_refused(folder):
  found = tensors(folder)
  half = dict(list(found.items())[:5])
  safetensors.numpy.save_file(half, folder / "a.safetensors")
  rest = {k: v for k, v in found.items() if k not in half}
  safetensors.numpy.save_file(rest, folder / "b.safetensors")
  (folder / "model.safetensors").unlink()
  index = {k: "a.safetensors" if k in half else "b.safetensors" for k in found}
  file = folder / "model.safetensors.index.json"
  file.write_text(json.dumps({"weight_map": index}))
  load(folder)
  wrong = next(iter(rest))
  index[wrong] = "a.safetensors"
  file.write_text(json.dumps({"weight_map": index}))
  refused(folder, repr(wrong), "is not in 'a.safetensors'")
  index[wrong] = "c.safetensors"
  file.write_text(json.dumps({"weight_map": index}))
  refused(folder, "c.safetensors", "cannot read weights")


def test_pickled_weights_are_named_and_not_read(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  refused(folder, "pytorch_model.bin is pickled", "safetensors first")


def test_names_that_do_not_fit_are_shown_as_patterns():
  layers = [f"model.layers.{i}.self_attn.q_norm.weight" for i in range(32)]
  others = [name.replace("q_norm", "query_norm") for name in layers]
  experts = [
    f"model.layers.{i}.mlp.experts.{j}.up_proj.weight"
    for i in range(3)
    for j in (0, 1, 5)
  ]
  assert differences(layers + experts, others) == (
    "missing: model.layers.{0-2}.mlp.experts.{0-1,5}.up_proj.weight (9),"
    " model.layers.{0-31}.self_attn.q_norm.weight (32) (did you mean"
    " model.layers.{0-31}.self_attn.query_norm.weight (32)?);"
    " unexpected: model.layers.{0-31}.self_attn.query_norm.weight (32)"
  )
  assert differences([], ["x.7.y"]) == "missing: none; unexpected: x.7.y"


def test_hostile_names_make_one_line_of_bounded_length():
  names = [f"a{i}\n\x1b[31m{{}}" + "b" * i for i in range(5000)]
  text = differences(names[:3000], names[1000:])
  assert len(text) < 3000 and text.isprintable()


def test_what_does_not_fit_is_refused_before_anything_is_read(folder):
  name = "model.norm.weight"  # the last by name
  rewrite(folder, lambda found: found.update({name: np.ones(9, "f4")}))
  module, config = hf.read_config(folder)
  read = []
  with pytest.raises(CheckpointError, match=r"\[9\].*\[8\]"):
    hf.load_variables(
      folder, module.HF_NAMES, abstract(config), on_read=read.append
    )
  assert not read
