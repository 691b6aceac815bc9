"""From a config to the objects of a run: mesh, tokenizer, model, data; weights
are the next module's."""

import dataclasses
import functools
import logging
import os
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.config import Config
from dpo_jax.data.closing import closed
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.store import (
  Examples,
  check_rankings,
  check_vocabulary,
  load_examples,
)
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import ConfigError
from dpo_jax.losses import Loss
from dpo_jax.models import attention, hf, peft, quantize
from dpo_jax.models import lora as lora_layers
from dpo_jax.models.lora import Lora
from dpo_jax.progress import row_bar
from dpo_jax.reward_score import RewardScore
from dpo_jax.score import Score

_LOG = logging.getLogger("dpo_jax")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Built(NamedTuple):
  """What every command needs."""

  mesh: Mesh
  tokenizer: Any  # see data.tokenizer
  family: types.ModuleType  # see models.hf
  model: nn.Module
  abstract: Any  # variables as shapes, dtypes and shardings
  score: Score | RewardScore
  lora: Lora | None = None  # adapters of the policy, `lora` in its variables


def build(config: Config, devices: Sequence[Any] | None = None) -> Built:
  """Reads the tokenizer and the model's config; loads no weights. For a loss
  that reads scores it is a reward model, whatever head the folder has.

  Args:
    config: of the run.
    devices: of the mesh; all of jax if None.

  Raises:
    ConfigError, CheckpointError, DataError: one line each, for what it is.
  """
  c = config.model
  mesh = sharding.make_mesh(**vars(config.mesh), devices=devices)
  tokenizer = load_tokenizer(c.tokenizer or c.path or "bytes")
  if c.path:
    family, shape = hf.read_config(os.path.expanduser(c.path))
  else:
    family, shape = hf.family(c.family), None
  scores = config.make_loss().needs_scores
  if shape and shape.scalar_head and not scores:
    raise ConfigError(
      f"{c.path} is a reward model, and no policy; only the loss 'reward' reads"
      " one"
    )
  pins = sharding.Pins(mesh)
  try:
    compute = family.Compute(
      dtype=_dtype("model.dtype", c.dtype),
      param_dtype=_dtype("model.param_dtype", c.param_dtype),
      remat=_remat(c),
      attention=c.attention,
      **pins.for_model(),
      **({"unpack_weights": quantize.unpack} if c.quantize else {}),
    )
    shape = shape or family.Config(
      vocab_size=tokenizer.vocab_size,
      width=c.width,
      ffn=c.ffn,
      layers=c.layers,
      heads=c.heads,
      kv_heads=c.kv_heads,
      head_dim=c.width // c.heads,
      max_length=config.data.max_length,
      tied=c.tied,
      **_experts(config, family),
    )
    if scores:
      shape = dataclasses.replace(shape, scalar_head=True)
    model = model_of(family, shape, compute, mesh)
  except ValueError as e:
    raise ConfigError(f"config.model: {e}") from e
  if tokenizer.vocab_size > shape.vocab_size:
    raise ConfigError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary"
      f" only {shape.vocab_size}; they do not belong together"
    )
  if config.data.max_length > shape.max_length:
    _LOG.warning(
      "data.max_length %d is beyond the %d positions that the model was made"
      " for",
      config.data.max_length,
      shape.max_length,
    )
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  lora = _lora(config)
  if lora:
    abstract["lora"] = _abstract_adapters(config, family, abstract, lora)
  if c.quantize:
    pack = functools.partial(quantize.pack, kind=c.quantize)
    abstract["params"] = jax.eval_shape(pack, abstract["params"])
  abstract = sharding.placed(abstract, mesh)
  score = _score(config, model, mesh)
  return Built(mesh, tokenizer, family, model, abstract, score, lora)


def recomputed(config: Config, built: Built, remat: str) -> Built:
  """The same, but for what the backward computes again; see
  `models.shape.Compute`."""
  compute = dataclasses.replace(built.model.compute, remat=remat)
  model = built.model.clone(compute=compute)
  return built._replace(model=model, score=_score(config, model, built.mesh))


def _remat(c: Any) -> str:
  """What is asked for, or the least that is worth it; `memory.fit` may find
  that it takes more."""
  return "minimal" if c.remat == "auto" else c.remat


def _score(config, model, mesh) -> Score | RewardScore:
  if model.config.scalar_head:
    return RewardScore(model)
  pins = sharding.Pins(mesh)
  return Score(
    model, tile=config.model.head_tile, place_head=pins.head,
    place_sweep=pins.sweep,
  )  # fmt: skip


def config_entries(built: Built) -> dict[str, Any]:
  """What config.json of an exported reward model says beside its shape.

  transformers scores the last token that is not padding. Where padding has the
  id of the end token that would be the one before; without the entry it takes
  sequences one at a time, and scores their end.
  """
  if not built.model.config.scalar_head:
    return {}
  pad, end = built.tokenizer.pad_id, built.tokenizer.eos_id
  return {"pad_token_id": None if pad == end else pad}


def model_of(
  family: types.ModuleType, shape: Any, compute: Any, mesh: Mesh
) -> nn.Module:
  """A family's model, with the attention that the mesh's devices are to run.

  Raises:
    ValueError: that which is asked for cannot be had.
  """
  how = _attention(compute, shape.head_dim, mesh.devices.flat[0])
  return family.Model(shape, dataclasses.replace(compute, attention=how))


def _attention(compute, head_dim, device) -> str:
  """The implementation that the mesh's devices are to run."""
  how = compute.attention
  if how == "auto":
    return attention.choose(compute.dtype, head_dim, device)
  kernel = attention.KERNELS.get(how)
  if kernel and (reason := kernel.why_not(compute.dtype, head_dim)):
    raise ValueError(reason)
  if not attention.is_native(how, device):
    _LOG.warning(
      "model.attention=%r is not made for %s: interpreted, and slow",
      how,
      device.device_kind,
    )
  return how


def _experts(config, family) -> dict[str, int]:
  """What of experts was asked for, from scratch."""
  c = config.model
  asked = {"experts": c.experts, "experts_per_token": c.experts_per_token}
  asked = {key: n for key, n in asked.items() if n}
  if asked and family.Config.experts is None:
    raise ConfigError(
      f"config.model.{next(iter(asked))}: family {c.family!r} has no experts"
    )
  return asked


def _lora(config: Config) -> Lora | None:
  c = config.lora
  if c.path:
    lora = peft.read_config(c.path)
    if c.rank not in (0, lora.rank):
      raise ConfigError(
        f"config.lora.rank={c.rank}, and the adapters of {c.path} have rank"
        f" {lora.rank}; leave the rank to the folder"
      )
    _refuse_set(c, ("alpha", "targets", "rslora"), f"the adapters of {c.path}"
                " say that themselves")  # fmt: skip
    # Of training, and not of what the adapters are.
    return dataclasses.replace(lora, dropout=c.dropout)
  if not c.rank:
    _refuse_set(
      c, ("alpha", "targets", "rslora", "dropout"),
      "there are no adapters; set config.lora.rank, or a config.lora.path",
    )  # fmt: skip
    return None
  targets = tuple(x.strip() for x in c.targets.split(",") if x.strip())
  return Lora(c.rank, c.alpha, targets, c.dropout, c.rslora)


def _refuse_set(section, names, why) -> None:
  """Settings that would be ignored."""
  for name in names:
    value = getattr(section, name)
    if value != getattr(type(section)(), name):
      raise ConfigError(f"config.lora.{name}={value!r}: {why}")


def _abstract_adapters(config, family, abstract, lora) -> Any:
  params = abstract["params"]
  if not config.lora.path:
    return jax.eval_shape(
      lambda key: lora_layers.init(key, params, lora), jax.random.key(0)
    )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    peft.read(config.lora.path, family.HF_NAMES, params, lora),
  )


class Data(NamedTuple):
  train: Examples
  held_out: Examples | None
  reports: dict[str, Any]  # counts of what was dropped and cut, by split


def load_data(config: Config, built: Built, loss: Loss, limit: int = 0) -> Data:
  """Encoded training and held-out examples for a loss.

  Without an evaluation source, the examples of the first `eval_rows` usable
  rows are held out, so that what belongs to one row stays on one side. A
  `limit` above 0 reads only the first rows.
  """
  d = config.data
  if not d.source:
    raise ConfigError("config.data.source is empty; name a file or TFDS folder")
  load = functools.partial(
    _load_checked,
    loss=loss,
    vocab_size=built.model.config.vocab_size,
    tokenizer=built.tokenizer,
    settings=EncodeSettings(
      max_length=d.max_length,
      max_prompt_length=d.max_prompt_length,
      kind=loss.kind,
      on_bad_row=d.on_bad_row,
    ),
    cache_dir=os.path.expanduser(d.cache_dir),
    workers=d.workers,
  )
  train = load(os.path.expanduser(d.source), d.split)
  reports = {"train": train.report}
  if limit:
    train, _ = _first_rows(train, limit)
  if d.eval_source:
    held_out = load(os.path.expanduser(d.eval_source), d.eval_split)
    reports["eval"] = held_out.report
    if d.eval_rows:
      held_out, _ = _first_rows(held_out, d.eval_rows)
  elif d.eval_rows:
    held_out, train = _first_rows(train, d.eval_rows)
    if not len(train):
      raise ConfigError(
        f"config.data.eval_rows={d.eval_rows} holds out all"
        f" {len(held_out)} examples of {d.source} and leaves nothing to train"
        " on; lower it, or name a config.data.eval_source"
      )
  else:
    held_out = None
  return Data(train, held_out, reports)


def _load_checked(source, split, *, loss, vocab_size, **options) -> Examples:
  with row_bar("encoding") as progress:
    examples = load_examples(source, split, progress=progress, **options)
  check_vocabulary(examples, vocab_size)
  check_rankings(examples, loss.responses)
  if loss.needs_scores:
    return closed(examples, options["tokenizer"].pad_id)
  return examples


def _first_rows(examples: Examples, n: int) -> tuple[Examples, Examples]:
  rows = np.unique(examples.rows)
  count = len(examples)
  if n < len(rows):
    count = int(np.searchsorted(examples.rows, rows[n]))
  return examples.slice(0, count), examples.slice(count, len(examples))


def _dtype(key: str, name: str) -> Any:
  if name not in _DTYPES:
    raise ConfigError(
      f"config.{key}={name!r} should be one of {', '.join(_DTYPES)}"
    )
  return _DTYPES[name]
