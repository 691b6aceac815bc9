"""Adapters of ours in PEFT, and of PEFT's here; and what merging them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf, lora, peft
from dpo_jax.models.lora import Lora

from .live import (
  WHY,
  hf_config,
  hf_model,
  load,
  our_logits,
  rng,
  their_logits,
)

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
their_peft = pytest.importorskip("peft", reason=WHY)

pytestmark = pytest.mark.parity
__all__ = ["rng"]

FAMILIES = {
  "llama": {"attention_bias": True, "head_dim": 12},
  "mistral": {"sliding_window": 9},
  "qwen2": {},
  "qwen3": {"head_dim": 16},
  "gemma2": {"head_dim": 16, "sliding_window": 11},
  "gemma3_text": {"head_dim": 16, "sliding_window": 11},
}
MODULES = {
  "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
  "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip
close = {"rtol": 1e-4, "atol": 1e-4}


def base(rng, family, path):
  """A model of transformers, and the same folder read here."""
  theirs = hf_model(hf_config(rng, family, **FAMILIES[family]))
  theirs.save_pretrained(path)
  return theirs, *load(path)


def drawn(rng, params, what):
  adapters = lora.init(jax.random.key(0), params, what)

  def one(path, leaf):
    if path[-1].key != "b":
      return leaf
    return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(one, adapters)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_load_in_peft(rng, tmp_path, family, rslora):
  theirs, model, variables = base(rng, family, tmp_path / "base")
  picked = rng.permutation(list(MODULES))[: rng.integers(1, 8)].tolist()
  what = Lora(int(rng.integers(1, 5)), 6.0, tuple(picked), rslora=rslora)
  adapters = drawn(rng, variables["params"], what)
  names = hf.family(family).HF_NAMES
  peft.save(tmp_path / "adapter", names, adapters, what, "base")

  adapted = their_peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
  config = adapted.peft_config["default"]
  assert config.target_modules == {MODULES[name] for name in picked}
  ids = rng.integers(0, theirs.config.vocab_size, (2, 40))
  ours = our_logits(model, variables | {"lora": adapters}, ids)
  assert np.abs(ours - our_logits(model, variables, ids)).max() > 1e-2
  np.testing.assert_allclose(ours, their_logits(adapted.eval(), ids), **close)

  # Merged here, with the names of the family, and merged there.
  hf.save_checkpoint(
    tmp_path / "merged", hf.family(family), model.config, variables,
    transform=lora.merger(jax.device_get(adapters)),
  )  # fmt: skip
  merged = adapted.merge_and_unload()
  np.testing.assert_allclose(
    our_logits(*load(tmp_path / "merged"), ids), their_logits(merged, ids),
    **close,
  )  # fmt: skip
  state = merged.state_dict()
  for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "merged", dtype=torch.float32
  ).state_dict().items():  # fmt: skip
    np.testing.assert_allclose(tensor, state[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_theirs_load_here(rng, tmp_path, family):
  theirs, model, variables = base(rng, family, tmp_path / "base")
  modules = rng.permutation(list(MODULES.values()))[: rng.integers(1, 8)]
  config = their_peft.LoraConfig(
    r=3, lora_alpha=7, target_modules=modules.tolist(), lora_dropout=0.1,
    task_type="CAUSAL_LM", init_lora_weights=False, use_rslora=True,
  )  # fmt: skip
  adapted = their_peft.get_peft_model(theirs, config).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  what = peft.read_config(tmp_path / "adapter")
  adapters = peft.read(
    tmp_path / "adapter", hf.family(family).HF_NAMES, variables["params"], what
  )
  assert what == Lora(3, 7.0, (), 0.1, True)
  ids = rng.integers(0, theirs.config.vocab_size, (2, 40))
  ours = our_logits(model, variables | {"lora": adapters}, ids)
  np.testing.assert_allclose(ours, their_logits(adapted, ids), **close)


def test_all_linear_of_theirs_is_all_of_ours(rng, tmp_path):
  theirs, _, variables = base(rng, "llama", tmp_path / "base")
  config = their_peft.LoraConfig(
    r=2, target_modules="all-linear", task_type="CAUSAL_LM"
  )
  their_peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "a")
  what = peft.read_config(tmp_path / "a")
  read = peft.read(
    tmp_path / "a", hf.family("llama").HF_NAMES, variables["params"], what
  )
  ours = lora.init(jax.random.key(0), variables["params"], what)
  assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, ours)
  bound = lambda tree: np.abs(tree["layers"]["mlp"]["up"]["a"]).max()
  assert bound(ours) <= 32**-0.5 and bound(read) <= 32**-0.5


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "lora_only"}, "bias"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"layers_to_transform": [1]}, "layers_to_transform"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
  ],
  ids=str,
)
def test_other_kinds_of_theirs_are_refused(rng, tmp_path, options, words):
  theirs, _, variables = base(rng, "llama", tmp_path / "base")
  options = {"r": 2, "target_modules": ["q_proj"]} | options
  config = their_peft.LoraConfig(task_type="CAUSAL_LM", **options)
  their_peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "a")
  with pytest.raises(CheckpointError) as error:
    what = peft.read_config(tmp_path / "a")
    peft.read(
      tmp_path / "a", hf.family("llama").HF_NAMES, variables["params"], what
    )
  assert words in str(error.value)
