"""A base in few bits: how far it is off, and that nothing else changes."""

import functools
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import compile_once, on_base, save_base  # noqa: F401

from dpo_jax import sharding
from dpo_jax.build import build
from dpo_jax.convert import convert
from dpo_jax.data.corpus import write_corpus
from dpo_jax.errors import ConfigError
from dpo_jax.models import llama, mixtral, quantize
from dpo_jax.run import Run
from dpo_jax.train import train
from dpo_jax.weights import load_policy, load_variables

qwix = pytest.importorskip("qwix", reason="an extra: pip install qwix")

pytestmark = pytest.mark.usefixtures("compile_quickly")

SHAPE = {
  "vocab_size": 24, "width": 96, "ffn": 40, "layers": 2, "heads": 4,
  "kv_heads": 2, "head_dim": 24,
}  # fmt: skip
# Root mean square of a normal weight's error, relative: what the grids give.
ERRORS = {"int8": 0.01, "int4": 0.15, "nf4": 0.12}
PACKED = {"lora.rank": 4, "model.quantize": "nf4", "model.remat": "block"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=48)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
  return save_base(corpus, tmp_path_factory.mktemp("base") / "model")


def leaves(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, qwix.QArray)
    )
  }


def drawn(family=llama, **options):
  model = family.Model(
    family.Config(**SHAPE | options),
    family.Compute(unpack_weights=quantize.unpack),
  )
  return model, model.init_variables(jax.random.key(0))


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("family", [llama, mixtral], ids=["dense", "experts"])
def test_packed_kernels_are_near_what_they_were(kind, family):
  model, variables = drawn(family)
  packed = quantize.pack(variables["params"], kind)
  back = leaves(quantize.unpack(packed))
  for path, leaf in leaves(variables["params"]).items():
    is_kernel = path.endswith("kernel") and "router" not in path
    assert isinstance(leaves(packed)[path], qwix.QArray) == is_kernel, path
    error = np.sqrt(np.mean((back[path] - leaf) ** 2) / np.mean(leaf**2))
    assert (0 < error < ERRORS[kind]) if is_kernel else error == 0, path
  ids = jnp.arange(20)[None]
  run = jax.jit(
    lambda v: model.apply(v, ids, ids, ids * 0, ids + 1) @ model.unembed(v).T
  )
  far = run({"params": packed}) - run(variables)
  assert 0 < np.abs(far).mean() < 4 * ERRORS[kind] * run(variables).std()
  # The model on packed weights is the model on the unpacked ones.
  np.testing.assert_allclose(
    run({"params": packed}), run({"params": quantize.unpack(packed)}),
    atol=1e-5,
  )  # fmt: skip


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4)])
def test_a_value_takes_its_bits_and_a_share_of_a_scale(kind, bits):
  _, variables = drawn()
  kernel = quantize.pack(variables["params"], kind)["layers"]["mlp"]["gate"]
  packed = kernel["kernel"]
  assert jnp.iinfo(packed.qvalue.dtype).bits == bits
  assert packed.scale.shape == (2, 96 // 32, 40)  # 32 is what 64 shares with it


# The 16 values of QLoRA's appendix E, of weights within [-1, 1].
NF4 = [
  -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500,
  0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170,
  0.7229568, 1.0,
]  # fmt: skip


def test_nf4_has_the_papers_values_and_takes_the_nearest():
  rng = np.random.default_rng(0)
  up = jnp.asarray(rng.normal(size=(1, 64, 300)), jnp.float32)
  packed = quantize.pack({"layers": {"mlp": {"up": {"kernel": up}}}}, "nf4")
  kernel = packed["layers"]["mlp"]["up"]["kernel"]
  largest = np.abs(up).max(axis=1, keepdims=True)  # of a tile
  found = quantize.unpack(kernel) / largest
  np.testing.assert_allclose(np.unique(np.round(found, 5)), NF4, atol=2e-5)
  far = np.abs((up / largest)[..., None] - np.array(NF4))
  nearest = np.array(NF4)[far.argmin(axis=-1)]
  np.testing.assert_allclose(found, nearest, atol=1e-5)


def test_packing_gives_up_each_kernel_as_it_goes(monkeypatch):
  _, variables = drawn()
  kernels = [
    weakref.ref(leaf)
    for path, leaf in sorted(leaves(variables["params"]).items())
    if path.endswith("kernel")
  ]
  alive, pack_one = [], quantize._pack_one

  def counting(path, kind, kernel):
    alive.append(sum(one() is not None for one in kernels))
    return pack_one(path, kind, kernel)

  monkeypatch.setattr(quantize, "_pack_one", counting)
  params = [variables.pop("params")]
  quantize.pack(params.pop(), "int8")
  assert alive == list(range(len(kernels), 0, -1))


def test_parts_of_a_kernel_lie_on_the_mesh_as_the_kernel_does():
  mesh = sharding.make_mesh()
  for path in ("layers/attention/o/kernel", "layers/mlp/up/kernel"):
    spec = functools.partial(sharding.spec_for, shape=(2, 8, 8, 8), mesh=mesh)
    assert spec(path) == spec(f"{path}/qvalue") == spec(f"{path}/scale")
  assert not any(sharding.spec_for("layers/mlp_norm/scale", (2, 8), mesh))


@pytest.mark.slow
def test_a_run_on_a_packed_base_learns_and_leaves_adapters(
  corpus,
  base,
  tmp_path,
):
  config = on_base(corpus, base, **PACKED)
  run = Run(config)
  state, frozen = run.start()
  reference = run.load_reference(state.params, frozen)
  kernel = lambda tree: tree["params"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel(reference) is kernel(frozen)
  assert isinstance(kernel(frozen), qwix.QArray)

  summary = train(config, tmp_path / "run")
  # Policy and reference are the same packed base: no step between them.
  assert summary["initial_eval"]["loss"] == np.float32(np.log(2))
  assert summary["final_eval"]["loss"] < summary["initial_eval"]["loss"]
  assert summary["model_dir"] is None
  assert not (tmp_path / "run" / "model").exists()
  whole = summary["parameters"]
  assert whole == sum(x.size for x in leaves(load_variables(
    on_base(corpus, base), build(on_base(corpus, base)))).values()
  )  # fmt: skip

  # To serve: on the base as it was.
  convert(tmp_path / "run", tmp_path / "served")
  convert(base, tmp_path / "merged", adapter=tmp_path / "run" / "adapter")
  served, merged = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("served", "merged")
  )
  assert served == merged

  # The adapters on the base as it was score nearly what they were trained to.
  adapter = {"lora.path": str(tmp_path / "run" / "adapter")}
  batch, _ = run.train_plan[0]
  logps = []
  for changes in (adapter, PACKED | {"lora.rank": 0} | adapter):
    there = on_base(corpus, base, **changes)
    built = build(there)
    score = jax.jit(built.score)
    logps.append(np.asarray(score(load_policy(there, built), batch).logps))
  assert 0 < np.abs(logps[0] - logps[1]).max() < 0.05 * np.abs(logps[0]).max()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.quantize": "nf4", "model.remat": "block"}, "set config.lora.rank"),
    (PACKED | {"model.remat": "none"}, "should be minimal, block or offload"),
    (PACKED | {"model.quantize": "fp3"}, "int8, int4, nf4"),
  ],
  ids=str,
)
def test_packing_that_makes_no_sense_is_refused(
  corpus,
  base,
  changes,
  words,
):
  with pytest.raises(ConfigError) as error:
    Run(on_base(corpus, base, **changes))
  assert words in str(error.value)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ConfigError, match="pip install qwix"):
    quantize.library()
