"""Runs as jobs of a cluster: what is sent there, from readable templates.

The templates are in scripts/launch; each is a file that its scheduler takes,
with the commands of the runs in it. All hand SIGTERM on to the run, which saves
its checkpoint and ends with status 75, and all start a run again that did.
"""

import difflib
import json
import os
import pathlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from dpo_jax.errors import ConfigError

_NAME_LENGTH = 30  # a pod's name has 63 characters and needs some of its own


class Task(NamedTuple):
  """One run to be sent."""

  id: str
  name: str  # fit for a host name
  command: Sequence[str]


class Target(NamedTuple):
  """A kind of cluster."""

  template: str
  submit: Sequence[str]
  options: Mapping[str, Any]  # with their defaults, which fix the types
  required: Sequence[str] = ()
  a_file_each: bool = False  # given as an argument; else all runs on stdin
  stays: bool = False  # a script that this process becomes


TARGETS = {
  "slurm": Target(
    "slurm.sh.jinja",
    ("sbatch",),
    {
      "time": "24:00:00",  # of a turn; a run that needs more takes more turns
      "grace": 120,  # seconds before its end to save in
      "at_once": 0,  # most runs at a time; 0: as many as there is room for
      "nodes": 1,  # of a run
      "processes": 0,  # a node; 0: one a GPU, as JAX takes it there
      "gpus": 1,  # a node
      "cpus": 8,  # a process
      "memory": "",
      "partition": "",
      "account": "",
      "qos": "",
      "directory": "",  # of the checkout; "" is the current one
    },
  ),
  "gke": Target(
    "gke.yaml.jinja",
    ("kubectl", "apply", "-f", "-"),
    {
      "image": "",  # with the checkout and its requirements
      "directory": "/app",  # of the checkout in it
      "accelerator": "tpu-v5-lite-podslice",
      "topology": "2x4",
      "chips": 4,  # a host
      "hosts": 2,  # of a slice
      "slices": 1,
      "gpus": 0,  # a host, instead of chips
      "spot": False,
      "queue": "",  # of Kueue; clusters made by xpk have "multislice-queue"
      "volume": "",  # claim that holds the work directory
      "mount": "/data",
      "grace": 300,
      "retries": 2,
    },
    required=("image",),
  ),
  "sky": Target(
    "sky.yaml.jinja",
    ("sky", "jobs", "launch", "--yes", "--detach-run"),
    {
      "accelerators": "H100:1",
      "cloud": "",
      "spot": True,
      "nodes": 1,
      "port": 8476,
      "bucket": "",  # that holds the work directory, s3://... or gs://...
      "mount": "/data",
      "setup": 'pip install -r requirements.txt "jax[cuda13]"',
      "retries": 2,
    },
    a_file_each=True,
  ),
  "tpu": Target(
    "tpu.sh.jinja",
    ("bash",),
    {
      "tpu": "",  # its name
      "zone": "",
      "project": "",
      "directory": "dpo_jax",  # of the checkout on its hosts
      "retries": 2,
      "pause": 10,  # seconds before a run is tried again
    },
    required=("tpu", "zone"),
    stays=True,
  ),
}


def host_name(text: str) -> str:
  """Lower case, digits and dashes."""
  name = re.sub(r"[^a-z0-9]+", "-", text.lower())
  return name[:_NAME_LENGTH].strip("-") or "run"


def parse_options(target: str, settings: Sequence[str]) -> dict[str, Any]:
  """The options of a target, from "key=value" and the defaults.

  Raises:
    ConfigError: one is not known, of another type, or missing.
  """
  options = dict(TARGETS[target].options)
  for setting in settings:
    key, equals, text = setting.partition("=")
    if key not in options:
      close = difflib.get_close_matches(key, options, n=1)
      hint = f"did you mean {close[0]!r}? " if close else ""
      raise ConfigError(
        f"--set={setting}: {target} has no {key!r}; {hint}it has:"
        f" {', '.join(options)}"
      )
    options[key] = _parse(setting, text if equals else "", options[key])
  for key in TARGETS[target].required:
    if not options[key]:
      raise ConfigError(f"{target} needs --set={key}=...")
  return options


def render(
  target: str,
  templates: pathlib.Path,
  name: str,
  workdir: pathlib.Path,
  tasks: Sequence[Task],
  options: Mapping[str, Any],
) -> dict[str, str]:
  """File name -> what is sent: one for all runs, or one a run."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(templates),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
  )
  environment.filters |= {
    "q": lambda word: shlex.quote(str(word)),
    "join_quoted": shlex.join,
    "yaml": json.dumps,  # a JSON value is a YAML value
  }
  file = TARGETS[target].template
  template = environment.get_template(file)
  values = {"name": name, "workdir": workdir, "tasks": tasks} | options
  if "directory" in values and not values["directory"]:
    values["directory"] = os.getcwd()
  if not TARGETS[target].a_file_each:
    return {file.removesuffix(".jinja"): template.render(values)}
  return {
    f"{task.name}.yaml": template.render(values | {"task": task})
    for task in tasks
  }


def describe(target: str, files: Mapping[str, str]) -> str:
  """What `submit` would run and send, to read."""
  chosen = TARGETS[target]
  sign = "" if chosen.a_file_each or chosen.stays else "< "
  command = shlex.join(chosen.submit)
  return "".join(f"# {command} {sign}{n}\n{text}" for n, text in files.items())


def submit(target: str, files: Mapping[str, str]) -> None:
  """Sends the files; does not return where it becomes a script itself.

  Raises:
    ConfigError: the scheduler's command is not there, or refuses them.
  """
  chosen = TARGETS[target]
  if chosen.stays:
    (text,) = files.values()
    with tempfile.NamedTemporaryFile("w", suffix=".sh", delete=False) as file:
      file.write(text)
    os.execvp(chosen.submit[0], [*chosen.submit, file.name])
  with tempfile.TemporaryDirectory() as folder:
    for name, text in files.items():
      path = pathlib.Path(folder) / name
      path.write_text(text, encoding="utf-8")
      if chosen.a_file_each:
        _call([*chosen.submit, str(path)], "")
      else:
        _call(chosen.submit, text)


def _call(command: Sequence[str], stdin: str) -> None:
  try:
    subprocess.run(command, input=stdin, text=True, check=True)
  except FileNotFoundError as e:
    raise ConfigError(f"{command[0]!r} is not installed here") from e
  except subprocess.CalledProcessError as e:
    raise ConfigError(
      f"{shlex.join(command)} ended with status {e.returncode}"
    ) from e


def _parse(setting: str, text: str, default: Any) -> Any:
  kind = type(default)
  if kind is bool and text in ("", "True", "False", "true", "false"):
    return text.lower() != "false"
  if kind is int and text.isdecimal():
    return int(text)
  if kind is str and "\n" not in text:
    return text
  raise ConfigError(f"--set={setting} should be of type {kind.__name__}")
