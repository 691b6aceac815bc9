"""Checkpoints from one form into another.

Three forms are told apart by what lies in the folder:

  run     work directory of a run: its config.json, checkpoints/ (orbax)
  hf      Hugging Face folder: config.json, safetensors, tokenizer files
  orbax   as hf, but the weights are variables/ (orbax), arrays as the model
          has them: they restore without turning or stacking
"""

import dataclasses
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax import checkpoint, sharding
from dpo_jax.build import build, load_policy
from dpo_jax.config import Mesh, from_dict
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.models import hf, lora
from dpo_jax.models.hf_files import INDEX, Folder, read_object
from dpo_jax.models.hf_write import (
  SHARD_BYTES,
  Tensor,
  dtype_entries,
  whole_folder,
  write_tensors,
)
from dpo_jax.trainable import Trainable
from dpo_jax.workdir import Workdir

DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("hf", "orbax")
_VARIABLES = "variables"
# Beside weights and config.json; code that comes with a model is left behind.
_KEPT = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
_LICENSES = ("LICENSE", "NOTICE")


class _Source(NamedTuple):
  """A model, loaded, and what else belongs in its folder."""

  module: types.ModuleType
  config: Any
  variables: Any
  extras: Callable[[str], None]  # given the folder


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  form: str = "hf",
  step: int | None = None,
  dtype: str = "",
  max_shard_bytes: int = SHARD_BYTES,
) -> str:
  """Writes `target`, which appears only when it is whole.

  Args:
    source: a folder of one of the three forms.
    target: new folder, or a checkpoint to replace.
    form: of the target, "hf" or "orbax".
    step: of a run; None is its newest checkpoint.
    dtype: of the weights; "" keeps that of each tensor.
    max_shard_bytes: start another safetensors file beyond this size.

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
  _check_target(source, target)
  cast = np.dtype(jnp.dtype(dtype)) if dtype else None
  try:
    if kind == form == "hf":
      _rewrite(source, target, cast, max_shard_bytes)
    else:
      if kind == "run":
        step = _choose_step(source, step)
        loaded = _load_run(source, step)
      else:
        loaded = {"hf": _load_hf, "orbax": _load_orbax}[kind](source)
      _write(loaded, target, form, cast, max_shard_bytes)
  except OSError as e:
    raise CheckpointError(f"{target}: cannot be written: {e}") from e
  of = f"step {step} of {source}" if kind == "run" else f"{source} ({kind})"
  return f"{target} ({form}): {of}, {dtype or 'dtype as it was'}"


def kind_of(folder: pathlib.Path) -> str:
  """ "run", "hf" or "orbax".

  Raises:
    CheckpointError: none of these.
  """
  about = read_object(folder / "config.json")
  if "identity" in about and "config" in about:
    return "run"
  if "model_type" not in about:
    raise CheckpointError(
      f"{folder}/config.json is neither of a run nor of a model; expected a"
      " run's work directory, or a folder with config.json and weights"
    )
  return "orbax" if (folder / _VARIABLES).is_dir() else "hf"


def _check_target(source: pathlib.Path, target: pathlib.Path) -> None:
  if target.resolve() in (source.resolve(), *source.resolve().parents):
    raise ConfigError(f"{target} would be written over what is read, {source}")
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


def _choose_step(workdir: pathlib.Path, step: int | None) -> int:
  steps = checkpoint.saved_steps(Workdir(workdir).checkpoints)
  if not steps:
    raise CheckpointError(f"{workdir}: the run has no checkpoint yet")
  if step is not None and step not in steps:
    raise CheckpointError(
      f"{workdir}: no checkpoint of step {step}; there are"
      f" {', '.join(map(str, steps))}"
    )
  return steps[-1] if step is None else step


def _load_run(workdir: pathlib.Path, step: int) -> _Source:
  place = Workdir(workdir)
  config = from_dict(read_object(place.config)["config"])
  # The run's mesh is of other machines; here its weights lie over all devices.
  config = dataclasses.replace(config, mesh=Mesh(data=1, fsdp=-1))
  built = build(config)
  trainable = Trainable(built.abstract, config.optim.freeze)
  trained, frozen = trainable.split(built.abstract)
  variables = checkpoint.read_trained(place.checkpoints, step, trained)
  if frozen:  # as the run found it
    _check_base(
      config.model.path, checkpoint.read_meta(place.checkpoints, step)
    )
    _, frozen = trainable.split(load_policy(config, built))
    variables = trainable.join(frozen, variables)
  model, save = built.model, built.tokenizer.save
  return _Source(built.family, model.config, variables, save)


def _check_base(path: str, meta: dict[str, Any]) -> None:
  """Adapters and partly frozen models mean nothing on other weights."""
  if path and meta.get("frozen") not in (None, hf.fingerprint(path)):
    raise CheckpointError(
      f"{path}: not the weights that the run started from, which it did not"
      " train and did not save"
    )


def _shapes(folder: pathlib.Path) -> tuple[types.ModuleType, Any, Any]:
  """Family, config, and `{"params": ...}` of shapes, over all devices."""
  module, config = hf.read_config(folder)
  model = module.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  places = sharding.shard_tree(abstract, sharding.make_mesh(data=1, fsdp=-1))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    places,
  )
  return module, config, abstract


def _load_hf(folder: pathlib.Path) -> _Source:
  module, config, abstract = _shapes(folder)
  abstract = hf.as_stored(folder, module.HF_NAMES, abstract)
  variables = hf.load_variables(folder, module.HF_NAMES, abstract)
  return _Source(module, config, variables, lambda to: _copy_rest(folder, to))


def _load_orbax(folder: pathlib.Path) -> _Source:
  module, config, abstract = _shapes(folder)
  place = folder / _VARIABLES
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      saved = dict(reader.metadata(place).item_metadata.tree)
      wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
          s.shape, s.dtype, sharding=x.sharding
        ),
        abstract,
        saved,
      )
      _check_shapes(place, abstract, wanted)
      variables = reader.restore(place, args=ocp.args.StandardRestore(wanted))
  except CheckpointError:
    raise
  except Exception as e:  # of damaged arrays orbax raises no narrower one
    reason = " ".join(str(e).split())[:300]
    raise CheckpointError(f"{place}: cannot be restored: {reason}") from e
  return _Source(module, config, variables, lambda to: _copy_rest(folder, to))


def _check_shapes(place, abstract, saved) -> None:
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(saved)
  ):
    if x.shape != tuple(y.shape):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise CheckpointError(
        f"{place}: {name} has shape {list(y.shape)}, the config asks for"
        f" {list(x.shape)}"
      )


def _write(loaded: _Source, target, form, cast, max_shard_bytes) -> None:
  module, config, variables, extras = loaded
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
    )
    return
  if "lora" in variables:
    raise ConfigError(
      "the run trained adapters, which are merged into a Hugging Face folder"
      " only; convert that one to orbax"
    )
  if cast is not None:
    variables = jax.tree.map(lambda x: x.astype(cast), variables)
  with whole_folder(target) as part:
    about = module.config_to_hf(config)
    (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    extras(str(part))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
      writer.save(part / _VARIABLES, args=ocp.args.StandardSave(variables))


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
    _copy_rest(source, part)


def _copy_rest(source: pathlib.Path, to: str | os.PathLike) -> None:
  for file in source.iterdir():
    wanted = file.suffix in _KEPT or file.name.startswith(_LICENSES)
    weights = file.name.endswith(".index.json") or file.name == INDEX
    if file.is_file() and wanted and not weights and file.name != "config.json":
      shutil.copyfile(file, pathlib.Path(to) / file.name)
