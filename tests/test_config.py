"""Settings: what is known, of which type, and that each of them is read."""

import ast
import dataclasses
import importlib
import inspect
import math
import pathlib

import pytest
from ml_collections import ConfigDict

from dpo_jax import config as settings
from dpo_jax import losses, optim, sharding
from dpo_jax.config import Config, from_dict
from dpo_jax.config_file import defaults, parse_arg
from dpo_jax.errors import ConfigError
from dpo_jax.trainable import Trainable

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
SECTIONS = {
  f.name: f.type
  for f in dataclasses.fields(Config)
  if dataclasses.is_dataclass(f.type)
}


def load(name, *args):
  return importlib.import_module(f"configs.{name}").get_config(*args)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_becomes_a_typed_config(name):
  config = from_dict(load(name).to_dict())
  loss = config.make_loss()
  assert loss.name == (name if name in losses.names() else "dpo")
  # Options that are left unset are the loss's own defaults.
  own = losses.defaults(loss.name)
  chosen = {k: v for k, v in config.loss.items() if k != "name" and v}
  assert dict(loss.options) == own | chosen
  assert config.optim.learning_rate > 0


@pytest.mark.parametrize(
  "name, arg, key, value",
  [
    ("dpo", "tone", "train.steps", 126),
    ("quickstart", "stage=sft", "loss.name", "sft"),
    ("quickstart", "stage=sft,root=/r", "data.source", "/r/data/sft.jsonl"),
    ("quickstart", "root=/r", "model.path", "/r/sft/model"),
  ],
)
def test_arguments_of_config_files_take_effect(name, arg, key, value):
  config = from_dict(load(name, arg).to_dict())
  assert settings.flatten(config.to_dict())[key] == value
  config.make_loss()


def test_every_config_file_says_how_it_is_run():
  for name in CONFIGS:
    said = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in said


def test_defaults_are_those_of_the_dataclasses():
  config = from_dict(defaults("dpo").to_dict())
  assert dataclasses.replace(config, loss={"name": "dpo"}) == Config()


@pytest.mark.parametrize("name", losses.names())
def test_the_loss_of_one_config_can_be_switched(name):
  config = load("dpo")
  config.loss.name = name  # as --config.loss.name does
  assert from_dict(config.to_dict()).make_loss() == losses.make(name)
  for option, default in losses.defaults(name).items():
    config.loss[option] = default  # the placeholder has its type
  assert from_dict(config.to_dict()).make_loss() == losses.make(name)


def test_an_option_of_another_loss_is_refused():
  config = load("dpo")
  config.loss.lam = 0.2
  with pytest.raises(ConfigError, match=r"'dpo' has no hyper-parameter 'lam'"):
    from_dict(config.to_dict()).make_loss()


@pytest.mark.parametrize(
  "values, words",
  [
    ({"modle": {}}, ["config has no field 'modle'", "'model'?"]),
    ({"model": {"widht": 3}}, ["config.model has no", "'width'?"]),
    ({"model": {"width": "3"}}, ["config.model.width='3'", "int"]),
    ({"model": {"width": 3.0}}, ["config.model.width=3.0", "int"]),
    ({"model": {"tied": 1}}, ["config.model.tied=1", "bool"]),
    ({"model": {"path": None}}, ["config.model.path=None", "str"]),
    ({"optim": {"learning_rate": True}}, ["learning_rate=True", "float"]),
    ({"model": 3}, ["config.model=3", "dict"]),
    ({"seed": "x"}, ["config.seed='x'", "int"]),
    ({"seed": True}, ["config.seed=True", "int"]),
    ({"seed": -1}, ["config.seed=-1"]),
    ({"seed": 2**40}, ["config.seed="]),  # would be 0 in 32 bits
    ({"loss": "dpo"}, ["config.loss='dpo'", "dict"]),
    ({"train": {"batch_size": 0}}, ["config.train.batch_size=0", "[1, "]),
    ({"train": {"epochs": -1.0}}, ["config.train.epochs=-1.0", "[0, "]),
    ({"train": {"epochs": math.nan}}, ["config.train.epochs=nan"]),
    ({"optim": {"learning_rate": math.inf}}, ["learning_rate=inf"]),
    ({"optim": {"b1": 1.5}}, ["config.optim.b1=1.5", "[0, 1]"]),
    ({"data": {"row_counts": 0}}, ["config.data.row_counts=0"]),
    ({"model": {"width": 2}}, ["heads=4 should be", "config.model.width=2"]),
    ({"online": {"method": "pppo"}}, ["online.method='pppo'", "'grpo'"]),
    ({"online": {"gamma": 1.5}}, ["config.online.gamma=1.5", "[0, 1]"]),
    ({"sample": {"top_p": 1.1}}, ["config.sample.top_p=1.1", "[0, 1]"]),
    ({"sample": {"temperature": -1.0}}, ["config.sample.temperature=-1.0"]),
  ],
  ids=str,
)
def test_unknown_names_and_wrong_values_are_named_in_one_line(values, words):
  with pytest.raises(ConfigError) as error:
    from_dict(values)
  message = str(error.value)
  assert "\n" not in message
  assert all(word in message for word in words), message


@pytest.mark.parametrize(
  "loss, words",
  [
    ({}, ["config.loss.name=None", "dpo, dpop"]),
    ({"name": 5}, ["config.loss.name=5"]),
    ({"name": "kt0"}, ["unknown loss 'kt0'", "'kto'?"]),
    ({"name": "dpo", "beta": "x"}, ["beta='x'", "float"]),
    ({"name": "dpo", "beta": -1.0}, ["beta=-1.0"]),
    ({"name": "dpo", "beta": math.nan}, ["beta=nan"]),
  ],
  ids=str,
)
def test_a_loss_that_cannot_be_is_refused(loss, words):
  with pytest.raises(ConfigError) as error:
    from_dict({"loss": loss}).make_loss()
  message = str(error.value)
  assert "\n" not in message
  assert all(word in message for word in words), message


def test_a_whole_number_for_a_float_is_the_same_run():
  whole = from_dict({"optim": {"learning_rate": 1}})
  point = from_dict({"optim": {"learning_rate": 1.0}})
  assert type(whole.optim.learning_rate) is float
  assert whole.identity() == point.identity()


def test_a_config_does_not_share_its_loss_with_what_it_was_made_from():
  values = {"loss": {"name": "dpo"}}
  config = from_dict(values)
  values["loss"]["name"] = "ipo"
  assert config.loss == {"name": "dpo"}


# What changes no number of a run: how fast, where, how talkative. How answers
# are sampled does: those before are compared with those after.
HARMLESS = {
  "mesh": {"data": 4, "fsdp": 2, "tensor": 2},
  "offload": {"reference": True, "optimizer": True},
  "log": {
    "tensorboard": True, "wandb": True, "name": "x", "watchdog": 5.0,
    "trace": "3-4", "peak_tflops": 7.0,
  },
  "data": {"cache_dir": "elsewhere", "workers": 3},
  "model": {"remat": "block", "attention": "dense", "head_tile": 8},
  "train": {
    "microbatches": 2, "eval_every": 7, "eval_batch_size": 3, "log_every": 3,
    "checkpoint_every": 9, "keep_checkpoints": 9, "max_skipped": 3,
    "export": False, "keep_best": "min loss", "on_damaged_checkpoint": "stop",
  },
  "sample": {"batch_size": 9},
}  # fmt: skip


# Of settings that are one of a few words.
OTHER_WORDS = {
  "method": "ppo", "kl_estimator": "k2", "scale": "none", "reduction": "grpo"
}  # fmt: skip


def another(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return 2 * value + 1
  return value / 2 + 0.25 if isinstance(value, float) else value + "x"


def test_identity_ignores_what_changes_no_number():
  changed = from_dict(HARMLESS)
  assert changed != Config()
  assert changed.identity() == Config().identity()


def test_identity_sees_everything_else():
  plain = Config().identity()
  for name, cls in SECTIONS.items():
    for field in dataclasses.fields(cls):
      if field.name in HARMLESS.get(name, {}):
        continue
      value = another(field.default)
      if name == "online":
        value = OTHER_WORDS.get(field.name, value)
      changed = from_dict({name: {field.name: value}}).identity()
      key = f"{name}.{field.name}"
      assert settings.differences(plain, changed).startswith(key), key
  assert from_dict({"seed": 1}).identity() != plain
  other = from_dict({"loss": {"name": "ipo"}}).identity()
  said = settings.differences(plain, other)
  assert said == "loss.name: 'dpo' there, 'ipo' here"


def test_options_left_unset_are_no_difference():
  plain, filled = Config(), from_dict(defaults("dpo").to_dict())
  assert not settings.differences(plain.identity(), filled.identity())


def _aliases(tree, section, cls):
  """Names that a file binds to a section: `t = config.train` and the like."""

  def is_section(node):
    return isinstance(node, ast.Attribute) and node.attr == section

  handed = cls in (settings.Sample, settings.Online)  # on, as `settings`
  names = {"settings"} if handed else set()
  for node in ast.walk(tree):
    if not isinstance(node, ast.Assign):
      continue
    target, value = node.targets[0], node.value
    pairs = [(target, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
      pairs = zip(target.elts, value.elts, strict=True)
    for left, right in pairs:
      if isinstance(left, ast.Name):
        is_mine = is_section(right) or (
          isinstance(right, ast.Attribute)
          and right.attr == "settings"
          and handed
        )
        names |= {left.id} if is_mine else set()
  return names


def _reads(section, cls):
  """Fields of a section that some line of the package reads."""
  found = set()
  for path in (ROOT / "dpo_jax").rglob("*.py"):
    if path.name in ("config.py", "config_file.py"):
      continue
    tree = ast.parse(path.read_text())
    names = _aliases(tree, section, cls)
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute):
        owner = node.value
        if (isinstance(owner, ast.Attribute) and owner.attr == section) or (
          isinstance(owner, ast.Name) and owner.id in names
        ):
          found.add(node.attr)
  return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_read_somewhere(section):
  cls = SECTIONS[section]
  if cls is settings.Optim:  # handed on whole, by name
    read = {*inspect.signature(optim.make).parameters}
    read |= {*inspect.signature(optim.make_schedule).parameters}
    read |= {*inspect.signature(Trainable).parameters}
  elif cls is settings.Mesh:
    read = {*inspect.signature(sharding.make_mesh).parameters}
  else:
    read = _reads(section, cls)
  dead = {f.name for f in dataclasses.fields(cls)} - read
  assert not dead


def test_the_search_for_dead_settings_can_find_one():
  @dataclasses.dataclass(frozen=True)
  class Train(settings.Train):
    never_read: int = 0

  fields = {f.name for f in dataclasses.fields(Train)}
  assert fields - _reads("train", Train) == {"never_read"}


def test_arguments_have_the_types_of_their_defaults():
  spec = {"quick": False, "model": "x", "steps": 3, "rate": 0.5}
  assert parse_arg(None, **spec).to_dict() == spec
  assert parse_arg("", **spec).to_dict() == spec
  got = parse_arg("quick,model=a=b,steps=7,rate=1", **spec)
  assert isinstance(got, ConfigDict)
  assert got.to_dict() == {
    "quick": True, "model": "a=b", "steps": 7, "rate": 1.0,
  }  # fmt: skip
  assert parse_arg("quick=False", **spec).quick is False
  assert parse_arg("quick=1", **spec).quick is True


@pytest.mark.parametrize(
  "arg, words",
  [
    ("quik", ["unknown switch 'quik'", "known: quick, steps"]),
    ("steps=x", ["steps='x'", "int"]),
    ("steps", ["steps=''", "int"]),
    ("quick=maybe", ["quick='maybe'", "True or False"]),
  ],
)
def test_arguments_that_do_not_fit_name_the_file(arg, words):
  with pytest.raises(ValueError) as error:
    parse_arg(arg, quick=False, steps=3)
  assert all(word in str(error.value) for word in [__file__, *words])
