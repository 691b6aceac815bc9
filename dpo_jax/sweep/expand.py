"""From the function of a config file to runs, all checked before one starts."""

import copy
import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections

from dpo_jax.config import Config, flatten, from_dict
from dpo_jax.errors import ConfigError, UserError
from dpo_jax.loss_checks import check_loss
from dpo_jax.online_checks import check_online

FUNCTION = "get_sweep"
_NAME_LENGTH = 80  # most characters of what comes before the hash
_SHOWN = 5  # most runs named in one refusal


class SweepRun(NamedTuple):
  """One run of a sweep."""

  id: str  # readable, and a hash of all that decides its numbers
  overrides: dict[str, Any]  # what the sweep sets, by dotted key
  config: Config


def read_function(path: str, name: str = FUNCTION) -> list[Any]:
  """What the sweep function of a config file yields.

  Args:
    path: of the file, with what stands behind the colon, which a function with
      a parameter is given as `get_config` is.
    name: of the function.

  Raises:
    ConfigError: there is none of that name.
  """
  path, _, arg = path.partition(":")
  loader = importlib.machinery.SourceFileLoader("dpo_jax_sweep_file", path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  loader.exec_module(module)
  function = getattr(module, name, None)
  if not callable(function):
    raise ConfigError(
      f"{path} has no function {name!r} that yields the overrides of a sweep"
    )
  takes_one = bool(inspect.signature(function).parameters)
  return list(function(arg or None) if takes_one else function())


def expand(
  base: ml_collections.ConfigDict, overrides: Iterable[Any]
) -> list[SweepRun]:
  """One run for each override of the base.

  Ids depend on a run alone, not on its place or on the other runs, and settings
  of the base that change no number (where, how fast, how talkative) change no
  id: such a sweep is continued.

  Raises:
    ConfigError: in one line, everything that is wrong with any of them.
  """
  runs, wrong = [], []
  for number, override in enumerate(overrides, 1):
    try:
      runs.append(_run(base, override))
    except UserError as e:
      wrong.append(f"run {number} {_shown(override)}: {e}")
  more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
  if wrong:
    raise ConfigError(f"sweep: {'; '.join(wrong[:_SHOWN])}{more}")
  if not runs:
    raise ConfigError("sweep: the function yields no overrides")
  counts = Counter(_key(run) for run in runs)
  twice = [run for run in runs if counts[_key(run)] > 1]
  if twice:
    same = [r for r in twice if _key(r) == _key(twice[0])]
    raise ConfigError(
      f"sweep: {' and '.join(_shown(r.overrides) for r in same)} are the same"
      " run; each should stand once"
    )
  return runs


def flags_of(overrides: Mapping[str, Any]) -> list[str]:
  """Overrides as they are given on the command line."""
  return [f"--config.{key}={value}" for key, value in overrides.items()]


def _run(base: ml_collections.ConfigDict, override: Any) -> SweepRun:
  if not isinstance(override, Mapping) or not all(
    isinstance(key, str) for key in override
  ):
    raise ConfigError('should be a dict such as {"loss.beta": 0.1}')
  config = copy.deepcopy(base)
  known = flatten(config.to_dict())
  for key, value in override.items():
    key = str(key)
    if key not in known:
      raise ConfigError(f"the config has no {key!r}{_meant(key, known)}")
    if value is None:
      raise ConfigError(f"{key}=None should be a value")
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
      text = re.sub(r"\s+", " ", str(e)).strip()
      raise ConfigError(f"{key}={value!r}: {text}") from e
  typed = from_dict(config.to_dict())
  check_loss(typed, typed.make_loss())
  check_online(typed)
  set_to = flatten(config.to_dict())
  override = {key: set_to[key] for key in override}
  return SweepRun(_identifier(typed, override), override, typed)


def _identifier(config: Config, override: Mapping[str, Any]) -> str:
  return f"{_name(override)}-{_hash(config, override)}"


def _hash(config: Config, override: Mapping[str, Any]) -> str:
  """Of what decides the numbers, the loss with its defaults filled in, and of
  what the sweep sets beside that."""
  decides = config.identity()
  told = {k: v for k, v in decides.items() if not k.startswith("loss.")}
  told["loss"] = repr(config.make_loss())
  told["also"] = {k: override[k] for k in override if k not in decides}
  text = json.dumps(told, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _name(override: Mapping[str, Any]) -> str:
  """`beta=0.1,name=dpo`, fit for a file; short keys where they are clear."""
  last = Counter(key.rpartition(".")[2] for key in override)
  parts = []
  for key, value in sorted(override.items()):
    short = key.rpartition(".")[2]
    parts.append(f"{short if last[short] == 1 else key}={value}")
  name = re.sub(r"[^\w=,.+-]+", "_", ",".join(parts), flags=re.ASCII)
  return name[:_NAME_LENGTH].strip("._-") or "base"


def _key(run: SweepRun) -> str:
  return run.id.rpartition("-")[2]


def _shown(override: Any) -> str:
  if not isinstance(override, Mapping):
    return f"({override!r})"
  return f"({', '.join(f'{k}={v}' for k, v in override.items()) or 'as it is'})"


def _meant(key: str, known: Mapping[str, Any]) -> str:
  close = difflib.get_close_matches(key, known, n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""
