"""What a checkpoint of any form holds, read to be written in another.

Three forms are told apart by what lies in the folder:

  run     work directory of a run: its config.json, checkpoints/ (orbax)
  hf      Hugging Face folder: config.json, safetensors, tokenizer files
  orbax   as hf, but the weights are variables/ (orbax), arrays as the model
          has them: they restore without turning or stacking
"""

import dataclasses
import os
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dpo_jax import sharding, stored
from dpo_jax.build import build, config_entries
from dpo_jax.config import Mesh, from_dict
from dpo_jax.errors import CheckpointError
from dpo_jax.models import hf, peft
from dpo_jax.models.hf_files import INDEX, read_object
from dpo_jax.trainable import VALUE, Trainable
from dpo_jax.weights import load_policy
from dpo_jax.workdir import Workdir

VARIABLES = "variables"
# Beside weights and config.json; code that comes with a model is left behind.
_KEPT = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
_LICENSES = ("LICENSE", "NOTICE")


class Source(NamedTuple):
  """A model, loaded, and what else belongs in its folder."""

  module: types.ModuleType
  config: Any
  variables: Any
  extras: Callable[[str], None]  # given the folder
  entries: dict[str, Any]  # of config.json, beside those of the shape


def kind_of(folder: pathlib.Path) -> str:
  """ "run", "hf" or "orbax".

  Raises:
    CheckpointError: none of these.
  """
  expected = "expected a run's work directory, or a folder of a model"
  file = folder / "config.json"
  if not file.is_file():
    raise CheckpointError(f"{folder}: no config.json there; {expected}")
  about = read_object(file)
  if "identity" in about and "config" in about:
    return "run"
  if "model_type" not in about:
    raise CheckpointError(
      f"{file} is neither of a run nor of a model; {expected}"
    )
  return "orbax" if (folder / VARIABLES).is_dir() else "hf"


def choose_step(workdir: pathlib.Path, step: int | None) -> int:
  """A step of a run that has a checkpoint; None asks for the newest.

  Raises:
    CheckpointError: there is none.
  """
  steps = stored.saved_steps(Workdir(workdir).checkpoints)
  if not steps:
    raise CheckpointError(f"{workdir}: the run has no checkpoint yet")
  if step is not None and step not in steps:
    raise CheckpointError(
      f"{workdir}: no checkpoint of step {step}; there are"
      f" {', '.join(map(str, steps))}"
    )
  return steps[-1] if step is None else step


def load_run(workdir: pathlib.Path, step: int) -> Source:
  """The policy of a run, with what the run did not train from its base.

  Raises:
    UserError: one line for what does not fit.
  """
  place = Workdir(workdir)
  config = from_dict(read_object(place.config)["config"])
  # The run's mesh is of other machines; here its weights lie over all devices.
  # Adapters of a base in few bits go to that base as it was.
  config = dataclasses.replace(
    config,
    mesh=Mesh(data=1, fsdp=-1),
    model=dataclasses.replace(config.model, quantize=""),
  )
  built = build(config)
  trainable = Trainable(built.abstract, config.optim.freeze)
  trained, frozen = trainable.split(built.abstract)
  # PPO's value model is no part of what is served.
  variables = stored.read_trained(place.checkpoints, step, trained, (VALUE,))
  if frozen:  # as the run found it
    meta = stored.read_meta(place.checkpoints, step)
    _check_same(config.model.path, meta.get("frozen"))
    _check_same(config.lora.path, meta.get("adapters"))
    _, frozen = trainable.split(load_policy(config, built))
    variables = trainable.join(frozen, variables)
  model, save = built.model, built.tokenizer.save
  entries = config_entries(built)
  return Source(built.family, model.config, variables, save, entries)


def _check_same(path: str, fingerprint: str | None) -> None:
  """Adapters and partly frozen models mean nothing on other weights."""
  if path and fingerprint not in (None, hf.fingerprint(path)):
    raise CheckpointError(
      f"{path}: not the weights that the run started from, which it did not"
      " train and did not save"
    )


def _shapes(folder: pathlib.Path) -> tuple[types.ModuleType, Any, Any]:
  """Family, config, and `{"params": ...}` of shapes, over all devices."""
  module, config = hf.read_config(folder)
  model = module.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  return module, config, sharding.placed(abstract, mesh)


def load_hf(folder: pathlib.Path) -> Source:
  """A Hugging Face folder, in the dtypes that it has."""
  module, config, abstract = _shapes(folder)
  abstract = hf.as_stored(folder, module.HF_NAMES, abstract)
  variables = hf.load_variables(folder, module.HF_NAMES, abstract)
  return _of_folder(folder, module, config, variables)


def with_adapters(source: Source, path: str | os.PathLike) -> Source:
  """The model with a folder of PEFT's beside its weights.

  Raises:
    CheckpointError: damaged, or of another model.
  """
  params = source.variables["params"]
  what = peft.read_config(path)
  adapters = peft.read(path, source.module.HF_NAMES, params, what)
  return source._replace(variables=source.variables | {"lora": adapters})


def load_orbax(folder: pathlib.Path) -> Source:
  """Variables that `convert` wrote, in the dtypes that they have.

  Raises:
    CheckpointError: damaged, or of another config.
  """
  module, config, abstract = _shapes(folder)
  place = folder / VARIABLES
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
  return _of_folder(folder, module, config, variables)


def _of_folder(folder, module, config, variables) -> Source:
  entries = {}
  if config.scalar_head:  # which token is scored depends on it
    about = read_object(folder / "config.json")
    entries["pad_token_id"] = about.get("pad_token_id")
  copy = lambda to: copy_rest(folder, to)
  return Source(module, config, variables, copy, entries)


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


def copy_rest(source: pathlib.Path, to: str | os.PathLike) -> None:
  """Copies tokenizer, generation config and the like."""
  for file in source.iterdir():
    wanted = file.suffix in _KEPT or file.name.startswith(_LICENSES)
    weights = file.name.endswith(".index.json") or file.name == INDEX
    if file.is_file() and wanted and not weights and file.name != "config.json":
      shutil.copyfile(file, pathlib.Path(to) / file.name)
