"""Checkpoints from one form into another; convert_sources.py says which."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.config import from_dict
from dpo_jax.convert_sources import (
  VARIABLES,
  Source,
  choose_step,
  copy_rest,
  kind_of,
  load_hf,
  load_orbax,
  load_run,
  with_adapters,
)
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.models import hf, lora
from dpo_jax.models.hf_files import Folder, read_object
from dpo_jax.models.hf_write import (
  SHARD_BYTES,
  Tensor,
  dtype_entries,
  whole_folder,
  write_tensors,
)

DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("hf", "orbax")


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  form: str = "hf",
  step: int | None = None,
  dtype: str = "",
  max_shard_bytes: int = SHARD_BYTES,
  adapter: str | os.PathLike = "",
) -> str:
  """Writes `target`, which appears only when it is whole.

  Args:
    source: a folder of one of the three forms.
    target: new folder, or a checkpoint to replace.
    form: of the target, "hf" or "orbax".
    step: of a run; None is its newest checkpoint.
    dtype: of the weights; "" keeps that of each tensor.
    max_shard_bytes: start another safetensors file beyond this size.
    adapter: PEFT folder, to be merged into the weights of a Hugging Face one.

  Returns:
    A line that says what was done.

  Raises:
    ConfigError, CheckpointError: one line for what does not fit.
  """
  source = pathlib.Path(source).expanduser().absolute()
  target = pathlib.Path(target).expanduser().absolute()
  kind = kind_of(source)
  if step is not None and kind != "run":
    raise ConfigError(f"{source} is no work directory of a run; it has no step")
  if adapter and not kind == form == "hf":
    raise ConfigError(
      f"an adapter is merged into a Hugging Face folder, and to one; {source}"
      f" is {kind}, wanted is {form}"
    )
  _check_target(target, source, *_read_too(source, kind, adapter))
  cast = np.dtype(jnp.dtype(dtype)) if dtype else None
  try:
    if adapter:
      loaded = with_adapters(load_hf(source), adapter)
      _write(loaded, target, form, cast, max_shard_bytes)
    elif kind == form == "hf":
      _rewrite(source, target, cast, max_shard_bytes)
    else:
      if kind == "run":
        _refuse_adapters(source, form)
        step = choose_step(source, step)
        loaded = load_run(source, step)
      else:
        loaded = {"hf": load_hf, "orbax": load_orbax}[kind](source)
      _write(loaded, target, form, cast, max_shard_bytes)
  except OSError as e:
    raise CheckpointError(f"{target}: cannot be written: {e}") from e
  of = f"step {step} of {source}" if kind == "run" else f"{source} ({kind})"
  of += f" with {adapter}" if adapter else ""
  return f"{target} ({form}): {of}, {dtype or 'dtype as it was'}"


def _refuse_adapters(source: pathlib.Path, form: str) -> None:
  settings = from_dict(read_object(source / "config.json")["config"]).lora
  if form == "orbax" and (settings.rank or settings.path):
    raise ConfigError(
      "the run trained adapters, which are merged into a Hugging Face folder"
      " only; convert that one to orbax"
    )


def _read_too(source, kind, adapter) -> list[pathlib.Path]:
  """Folders beside the source that must not be written over."""
  found = [adapter]
  if kind == "run":
    settings = from_dict(read_object(source / "config.json")["config"])
    model, lora_ = settings.model, settings.lora
    found += [model.path, model.tokenizer, lora_.path, settings.reference.path]
  folders = (pathlib.Path(path).expanduser() for path in found if path)
  return [folder for folder in folders if folder.exists()]


def _check_target(target: pathlib.Path, *sources: pathlib.Path) -> None:
  for source in map(pathlib.Path.resolve, sources):
    if target.resolve() in (source, *source.parents):
      raise ConfigError(
        f"{target} would be written over what is read, {source}"
      )
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return
  try:
    fits = target.is_dir() and kind_of(target) != "run"
  except CheckpointError:
    fits = False
  if not fits:
    raise ConfigError(
      f"{target} is there and is not a model's folder; it is not replaced"
    )


def _write(loaded: Source, target, form, cast, max_shard_bytes) -> None:
  module, config, variables, extras, entries = loaded
  if form == "hf":
    adapters = variables.get("lora")
    hf.save_checkpoint(
      target,
      module,
      config,
      variables,
      max_shard_bytes=max_shard_bytes,
      save_tokenizer=extras,
      transform=lora.merger(jax.device_get(adapters)) if adapters else None,
      dtype=cast,
      entries=entries,
    )
    return
  if cast is not None:
    variables = jax.tree.map(lambda x: x.astype(cast), variables)
  with whole_folder(target) as part:
    about = module.config_to_hf(config) | entries
    (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    extras(str(part))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
      writer.save(part / VARIABLES, args=ocp.args.StandardSave(variables))


def _rewrite(source, target, cast, max_shard_bytes) -> None:
  """Hugging Face to Hugging Face: tensor by tensor, whatever the model is."""
  folder = Folder(source)
  tensors = []
  for name, stored in folder.tensors.items():
    kept = cast or folder.dtype(name)

    def make(name=name, kept=kept):
      array = folder.view(name).astype(kept)
      folder.forget(name)
      return array

    tensors.append(Tensor(name, kept, stored.shape, make))
  with whole_folder(target) as part:
    write_tensors(part, tensors, max_shard_bytes)
    about = read_object(source / "config.json")
    if cast is not None:
      about |= dtype_entries(tensors)
    (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    copy_rest(source, part)
