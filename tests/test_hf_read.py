"""Reading safetensors: which bytes, how much memory, what is refused."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_cases import (
  abstract,
  finished,
  load,
  random_folder,
  rewrite,
  same_bytes,
  start,
  tensors,
)

from dpo_jax.models import hf, hf_read, llama

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def folder(tmp_path):
  random_folder(tmp_path / "m")
  return tmp_path / "m"


SIZES = {"width": 16, "ffn": 32, "heads": 4, "kv_heads": 4}


def test_eight_devices_read_each_byte_once_and_hold_what_one_holds(tmp_path):
  random_folder(tmp_path / "m", vocab_size=260, **SIZES)  # bytes: 259
  script = """
    import sys, jax, numpy as np
    import flax.traverse_util as traverse
    from hf_cases import abstract
    from dpo_jax.build import build
    from dpo_jax.config import Config, Mesh, Model
    from dpo_jax.models import hf, hf_read

    assert jax.device_count() == 8
    path, out = sys.argv[1:]
    module, shape = hf.read_config(path)
    whole = hf.load_variables(path, module.HF_NAMES, abstract(shape))
    whole = traverse.flatten_dict(whole["params"])
    size = sum(x.nbytes for x in whole.values())
    for mesh, by_layer in (
      (Mesh(2, 2, 2), False), (Mesh(1, 4, 2), False), (Mesh(1, 4, 2), True),
    ):
      # How accelerators are filled works on any device.
      hf_read._by_layer = lambda sharding: by_layer
      config = Config(model=Model(path=path, tokenizer="bytes"), mesh=mesh)
      built, read = build(config), []
      loaded = hf.load_variables(
        path, module.HF_NAMES, built.abstract, on_read=read.append
      )
      assert sum(read) == size, (mesh, sum(read), size)
      for name, mine in traverse.flatten_dict(loaded["params"]).items():
        array = whole[name]
        assert mine.sharding.num_devices == 8, name
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(array))
        share = mine.addressable_shards[0].data.size
        if name[-1] in ("kernel", "embed", "unembed"):
          parts = mesh.fsdp * mesh.tensor
          assert share * parts == mine.size, (name, share, mine.size)
        for shard in mine.addressable_shards:
          np.testing.assert_array_equal(shard.data, array[shard.index])
    hf.save_checkpoint(out, module, shape, loaded)
  """
  finished(start(script, tmp_path / "m", tmp_path / "out"))
  same_bytes(tensors(tmp_path / "m"), tensors(tmp_path / "out"))


def test_two_processes_read_their_halves_and_save_one_folder(tmp_path):
  random_folder(tmp_path / "m", vocab_size=264, **SIZES)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  script = """
    import sys, jax
    path, out, port, number = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    from dpo_jax.build import build
    from dpo_jax.config import Config, Mesh, Model
    from dpo_jax.models import hf

    config = Config(
      model=Model(path=path, tokenizer="bytes"), mesh=Mesh(1, 8, 1)
    )
    built, read = build(config), []
    loaded = hf.load_variables(
      path, built.family.HF_NAMES, built.abstract, on_read=read.append
    )
    hf.save_checkpoint(out, built.family, built.model.config, loaded)
    norms = sum(
      x.nbytes for x in jax.tree.leaves(loaded) if x.is_fully_replicated
    )
    print(sum(read), norms)
  """
  both = [
    start(script, tmp_path / "m", tmp_path / "out", port, i, devices=4)
    for i in range(2)
  ]
  size = sum(t.nbytes for t in tensors(tmp_path / "m").values())
  for process in both:
    read, norms = map(int, finished(process).splitlines()[-1].split())
    assert norms < size / 20
    assert read == (size - norms) // 2 + norms
  same_bytes(tensors(tmp_path / "m"), tensors(tmp_path / "out"))


def test_loading_takes_the_memory_of_the_arrays_and_of_few_tensors(tmp_path):
  # 64 MB in bfloat16. The kernel's own count of everything, mapped files too.
  script = """
    import sys, jax, jax.numpy as jnp
    from hf_cases import abstract
    from dpo_jax.models import hf

    def megabytes(key):
      with open("/proc/self/status") as f:
        return next(int(x.split()[1]) for x in f if x.startswith(key)) / 1024

    module, config = hf.read_config(sys.argv[1])
    wanted = abstract(config, param_dtype=jnp.bfloat16)
    jnp.zeros(2).block_until_ready()
    try:
      with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak begins anew
    except OSError:
      sys.exit()
    before = megabytes("VmRSS")
    loaded = hf.load_variables(sys.argv[1], module.HF_NAMES, wanted)
    jax.block_until_ready(loaded)
    size = sum(x.nbytes for x in jax.tree.leaves(loaded)) / 2**20
    print(size, megabytes("VmHWM") - before)
  """
  config = llama.Config(512, 256, 1024, 32, 4, 4, 64, tied=True)
  shapes = abstract(config, param_dtype=jnp.bfloat16)
  ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  hf.save_checkpoint(
    tmp_path / "m", llama, config, ones, max_shard_bytes=20 * 2**20
  )
  found = finished(start(script, tmp_path / "m", devices=1))
  if not found:
    pytest.skip("this kernel does not let a process begin its peak anew")
  size, grown = map(float, found.split())
  assert 50 < size < 80
  assert grown < 1.2 * size


class Experts:
  """As much of a family as reading and writing need, with experts."""

  HF_NAMES = {  # noqa: RUF012
    "unembed": "lm_head.weight",
    "layers/experts/up/kernel": "model.layers.{}.mlp.experts.{}.up.weight",
  }

  @staticmethod
  def config_to_hf(config):
    return {"model_type": "experts"}


@pytest.mark.parametrize("by_layer", [False, True])
def test_experts_are_tensors_of_their_own(by_layer, tmp_path, monkeypatch):
  monkeypatch.setattr(hf_read, "_by_layer", lambda sharding: by_layer)
  kernel = jnp.arange(3 * 2 * 4 * 5, dtype=jnp.float32).reshape(3, 2, 4, 5)
  variables = {"params": {"layers": {"experts": {"up": {"kernel": kernel}}},
                          "unembed": jnp.ones((2, 4))}}  # fmt: skip
  hf.save_checkpoint(tmp_path / "m", Experts, None, variables)
  one = tensors(tmp_path / "m")["model.layers.2.mlp.experts.1.up.weight"]
  np.testing.assert_array_equal(one, np.asarray(kernel[2, 1]).T)
  shapes = jax.eval_shape(lambda: variables)
  again = hf.load_variables(tmp_path / "m", Experts.HF_NAMES, shapes)
  jax.tree.map(np.testing.assert_array_equal, variables, again)


def test_experts_that_are_split_over_devices_are_read_where_they_lie(tmp_path):
  kernel = jnp.arange(2 * 8 * 4 * 6, dtype=jnp.float32).reshape(2, 8, 4, 6)
  variables = {"params": {"layers": {"experts": {"up": {"kernel": kernel}}},
                          "unembed": jnp.ones((2, 4))}}  # fmt: skip
  hf.save_checkpoint(tmp_path / "m", Experts, None, variables)
  script = """
    import sys, jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from test_hf_read import Experts
    from dpo_jax.models import hf, hf_read

    mesh = jax.make_mesh((4, 2), ("a", "b"))
    shape = lambda s, *spec: jax.ShapeDtypeStruct(
      s, np.float32, sharding=NamedSharding(mesh, P(*spec))
    )
    for by_layer in (False, True):
      hf_read._by_layer = lambda sharding: by_layer
      for spec in ((None, "a", None, "b"), (None, "b", "a"), (None, "a", "b")):
        read = []
        kernel = shape((2, 8, 4, 6), *spec)
        wanted = {"params": {
          "layers": {"experts": {"up": {"kernel": kernel}}},
          "unembed": shape((2, 4)),
        }}
        loaded = hf.load_variables(
          sys.argv[1], Experts.HF_NAMES, wanted, on_read=read.append
        )
        kernel = loaded["params"]["layers"]["experts"]["up"]["kernel"]
        np.testing.assert_array_equal(
          np.asarray(kernel).ravel(), np.arange(kernel.size)
        )
        assert sum(read) == kernel.nbytes + 32, read
  """
  finished(start(script, tmp_path / "m"))


def test_half_precision_and_mixed_types_come_back_byte_for_byte(folder):
  # Norms in float32 beside weights in half precision, as some writers do.
  def change(found):
    for name, tensor in found.items():
      kind = np.float16 if "self_attn" in name else jnp.bfloat16
      if "norm" not in name:
        found[name] = tensor.astype(kind)

  rewrite(folder, change)
  module, config = hf.read_config(folder)
  wanted = hf.as_stored(folder, module.HF_NAMES, abstract(config))
  kinds = {x.dtype for x in jax.tree.leaves(wanted)}
  assert kinds == {jnp.dtype(x) for x in ("float32", "float16", "bfloat16")}
  loaded = hf.load_variables(folder, module.HF_NAMES, wanted)
  hf.save_checkpoint(folder.parent / "out", module, config, loaded)
  same_bytes(tensors(folder), tensors(folder.parent / "out"))


def test_layers_of_two_types_are_held_in_the_one_that_holds_both(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  rewrite(folder, lambda f: f.update({name: f[name].astype(np.float16)}))
  module, config = hf.read_config(folder)
  wanted = hf.as_stored(folder, module.HF_NAMES, abstract(config))
  loaded = hf.load_variables(folder, module.HF_NAMES, wanted)
  kernel = loaded["params"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel[1].T, tensors(folder)[name])


def test_weights_are_rounded_to_nearest_when_they_are_narrowed(folder):
  _, loaded = load(folder, param_dtype=jnp.bfloat16)
  wanted = tensors(folder)["model.layers.2.self_attn.o_proj.weight"]
  kernel = loaded["params"]["layers"]["attention"]["o"]["kernel"][2]
  np.testing.assert_array_equal(
    kernel.reshape(8, 8).T, wanted.astype(jnp.bfloat16)
  )


def test_a_tied_model_takes_a_second_copy_of_its_head_and_old_buffers(tmp_path):
  _, variables = random_folder(tmp_path / "m", tied=True)
  file = tmp_path / "m" / "model.safetensors"
  found = safetensors.numpy.load_file(file)
  assert "lm_head.weight" not in found
  found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
  found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, "f4")
  safetensors.numpy.save_file(found, file)
  _, loaded = load(tmp_path / "m")
  jax.tree.map(np.testing.assert_array_equal, variables, loaded)
