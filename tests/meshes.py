"""Runs on eight devices that are compiled and not run: a model's config without
its weights, and a run of it on pairs."""

import json
import pathlib
from typing import Any

from dpo_jax.config import from_dict
from dpo_jax.config_file import defaults
from dpo_jax.data.corpus import write_corpus
from dpo_jax.run import Run

SIZES = {
  "vocab_size": 4096,
  "hidden_size": 128,
  "intermediate_size": 352,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
}


def write_model(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
  """A folder that holds the config of a Llama, and no weights."""
  folder.mkdir(parents=True, exist_ok=True)
  fields = {"model_type": "llama", "hidden_act": "silu", **SIZES, **changes}
  (folder / "config.json").write_text(json.dumps(fields))
  return folder


def make_run(folder: pathlib.Path, mesh, model=None, **changes: Any) -> Run:
  """A run of DPO on generated pairs, 4 of them a device, on a mesh."""
  sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
  shards = sizes["data"] * sizes["fsdp"]
  corpus = write_corpus(folder / "corpus", pairs=96)
  name = "-".join(f"{k}={v}" for k, v in (model or {}).items()) or "plain"
  config = defaults(loss="dpo")
  config.model.path = str(write_model(folder / name, **(model or {})))
  config.model.tokenizer = "bytes"
  config.data.source = str(corpus["pairs"])
  config.data.eval_rows = 10
  config.data.cache_dir = ""
  config.data.row_length = 256  # attention by blocks
  config.data.row_counts = 1
  config.train.batch_size = 4 * shards
  config.train.steps = 2
  for axis, size in sizes.items():
    config.mesh[axis] = size
  config.update_from_flattened_dict(changes)
  return Run(from_dict(config.to_dict()))
