"""The variables that a config starts from: read, or drawn by its seed."""

import dataclasses
import os
from typing import Any

import jax

from dpo_jax import offload, sharding
from dpo_jax.build import Built
from dpo_jax.config import Config
from dpo_jax.errors import CheckpointError, ConfigError
from dpo_jax.models import hf, lora, peft, quantize
from dpo_jax.models.decoder import init_score


def load_policy(config: Config, built: Built) -> Any:
  """Variables that the config starts from: `load_variables`, and adapters
  where there are any, read or new."""
  variables = load_variables(config, built)
  if built.lora is None:
    return variables
  abstract = built.abstract
  shardings = jax.tree.map(lambda x: x.sharding, abstract["lora"])
  if config.lora.path:
    read = peft.read(
      config.lora.path, built.family.HF_NAMES, abstract["params"], built.lora
    )
    return variables | {"lora": jax.device_put(read, shardings)}
  init = jax.jit(
    lambda key: lora.init(key, abstract["params"], built.lora),
    out_shardings=shardings,
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  return variables | {"lora": init(key)}


def load_variables(
  config: Config, built: Built, path: str = "", *, on_host: bool = False
) -> Any:
  """Weights of `path`, or of the config's model, or random by the seed;
  sharded as they are made, without adapters, in few bits if the config says
  so. With `on_host` they are read into host memory, past the device; those in
  few bits go there from it."""
  path = path or config.model.path
  past = on_host and not config.model.quantize
  variables = _whole_variables(config, built, path, past)
  if config.model.quantize:
    packed = quantize.pack(variables.pop("params"), config.model.quantize)
    abstract = built.abstract["params"]
    abstract = offload.on_host(abstract) if on_host else abstract
    places = jax.tree.map(lambda x: x.sharding, abstract)
    variables["params"] = jax.device_put(packed, places)
  return variables


def _whole_variables(config, built, path, on_host) -> Any:
  init = built.model.init_variables
  abstract = sharding.placed(
    jax.eval_shape(init, jax.random.key(0)), built.mesh
  )
  if on_host:
    abstract = offload.on_host(abstract)
  if path:
    path = os.path.expanduser(path)
    _, shape = hf.read_config(path)
    wanted, names = built.model.config, built.family.HF_NAMES
    if shape.scalar_head and not wanted.scalar_head:
      raise CheckpointError(f"{path}: a reward model, and no language model")
    headless = wanted.scalar_head and not shape.scalar_head
    if dataclasses.replace(shape, scalar_head=wanted.scalar_head) != wanted:
      raise CheckpointError(
        f"{path}: a model of another config than {config.model.path}:"
        f" {shape} there, {wanted} here"
      )
    if headless:
      return _with_new_head(config, path, names, abstract)
    return hf.load_variables(path, names, abstract)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))


def _with_new_head(config, path, names, abstract) -> Any:
  """A reward model's beginning: a language model's weights, without its
  unembedding, and a scalar head drawn by the seed."""
  params = dict(abstract["params"])
  head = params.pop("score")
  variables = hf.load_variables(path, names, {"params": params})
  init = jax.jit(
    lambda key: init_score(key, head.shape, head.dtype),
    out_shardings=head.sharding,
  )
  variables["params"]["score"] = init(jax.random.key(config.seed))
  return variables


def other_reference(config: Config) -> bool:
  """Whether the reference is another model than the policy begins as."""
  named = config.reference.path
  return bool(named) and not same_path(named, config.model.path)


def same_path(one: str, other: str) -> bool:
  """Whether two names are of one folder; "" is of none."""
  if not one or not other:
    return False
  return (
    len({os.path.realpath(os.path.expanduser(x)) for x in (one, other)}) == 1
  )


def refuse_new_adapters(config: Config) -> None:
  """Raises ConfigError where adapters would be drawn and not read."""
  if config.lora.rank and not config.lora.path:
    raise ConfigError(
      f"config.lora.rank={config.lora.rank} without config.lora.path: adapters"
      " that were never trained add nothing; name the folder of those to use"
    )
