"""What is read is data: no code in it is run, nothing secret is written down,
and nobody is called."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.data.corpus import write_corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = [
  path
  for folder in ("dpo_jax", "scripts", "configs")
  for path in sorted((ROOT / folder).rglob("*.py"))
]
FORBIDDEN_MODULES = {
  "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
  "yaml", "torch", "tensorflow", "transformers", "huggingface_hub", "requests",
  "urllib.request", "http", "ftplib", "telnetlib", "code", "codeop",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
# Who starts programs, and who imports by name; each for what the user named.
PROGRAMS = {"dpo_jax/sweep/child.py", "dpo_jax/sweep/launch.py"}
BY_NAME = {
  "dpo_jax/models/hf.py",  # a table of families
  "dpo_jax/answers.py",  # config.sample.reward
  "dpo_jax/sweep/expand.py",  # the config file itself
}


def facts(path):
  """(modules imported, names called, keyword arguments with their values)."""
  modules, calls, keywords = set(), set(), {}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      modules |= {node.module}
    elif isinstance(node, ast.Call):
      calls.add(ast.unparse(node.func))
      for keyword in node.keywords:
        keywords.setdefault(keyword.arg, set()).add(ast.unparse(keyword.value))
  return modules, calls, keywords


@pytest.mark.parametrize(
  "path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES]
)
def test_no_file_can_run_what_it_reads(path):
  name = str(path.relative_to(ROOT))
  modules, calls, keywords = facts(path)
  benchmark = name.startswith("scripts/benchmark")  # compares with torch
  if not benchmark:
    names = modules | {m.split(".")[0] for m in modules}
    assert not names & FORBIDDEN_MODULES
    if "subprocess" in modules or "os.system" in calls:
      assert name in PROGRAMS or name.startswith("scripts/")
    if "importlib.import_module" in calls or "importlib.util" in modules:
      assert name in BY_NAME
  assert not calls & FORBIDDEN_CALLS
  assert not keywords.keys() & {"trust_remote_code", "shell"}
  assert keywords.get("allow_pickle", {"False"}) == {"False"}
  for call in calls:  # numpy unpickles only where it is told to
    assert call not in ("np.loadtxt", "numpy.loadtxt", "torch.load")


def test_the_search_can_find_what_it_looks_for(tmp_path):
  path = tmp_path / "a.py"
  path.write_text(
    "import pickle\nfrom os import path\neval('1')\n"
    "np.load(f, allow_pickle=True)\nx.y(trust_remote_code=True)\n"
  )
  modules, calls, keywords = facts(path)
  assert "pickle" in modules and "eval" in calls
  assert keywords == {"allow_pickle": {"True"}, "trust_remote_code": {"True"}}


SECRETS = {
  "HF_TOKEN": "hf_Wq7secretone0001",
  "WANDB_API_KEY": "0a1b2c3d4e5f6secrettwo",
  "AWS_SECRET_ACCESS_KEY": "aws/secret+three",
  "MY_PASSWORD": "correct-horse-secret-four",
}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
  """Folder of a run that was trained, judged and asked, all of it watched."""
  place = tmp_path_factory.mktemp("lived")
  corpus = place / "corpus"
  write_corpus(corpus, pairs=48)
  config = f"--config=tests/faults/tiny.py:{corpus}"
  # Of the run's own kind, but with all that it can write.
  more = ["--config.data.cache_dir=" + str(place / "cache"),
          "--config.train.export=True", "--config.sample.prompts=2",
          "--config.sample.max_tokens=4", "--config.train.eval_every=5",
          "--config.reference.precompute=True"]  # fmt: skip
  model = f"--config.model.path={place / 'run' / 'model'}"
  commands = {
    "train": ["scripts/train.py", config, f"--workdir={place / 'run'}", *more],
    "evaluate": ["scripts/evaluate.py", config, model, *more[:1],
                 f"--config.reference.path={place / 'run' / 'model'}",
                 "--config.sample.prompts=2", "--config.sample.max_tokens=4"],
    "sample": ["scripts/sample.py", config, model, "--prompt=Hello",
               "--config.sample.max_tokens=4"],
    "check_data": ["scripts/check_data.py", config, *more[:1]],
    "missing": ["scripts/check_data.py", config,
                "--config.data.source=no_such_dataset_here"],
  }  # fmt: skip
  for name, command in commands.items():
    done = subprocess.run(
      [sys.executable, "tests/faults/watched.py",
       str(place / f"{name}.events"), *command],
      env=os.environ
      | SECRETS
      | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
         "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
      cwd=ROOT, capture_output=True, timeout=300,
    )  # fmt: skip
    (place / f"{name}.said").write_bytes(done.stdout + done.stderr)
    wanted = 2 if name == "missing" else 0
    assert done.returncode == wanted, done.stderr[-3000:].decode()
  return place


def events(lived, *kinds):
  found = []
  for path in sorted(lived.glob("*.events")):
    for line in path.read_text().splitlines():
      event, what = json.loads(line)
      if event in kinds or not kinds:
        found.append((path.stem, event, what))
  return found


def test_a_run_calls_nobody(lived):
  names = ("socket.", "urllib.")
  assert [e for e in events(lived) if e[1].startswith(names)] == []


def test_a_run_unpickles_nothing_and_runs_no_code_of_its_input(lived):
  assert events(lived, "pickle.find_class", "exec", "compile") == []


def test_a_run_starts_no_program(lived):
  started = events(
    lived, "subprocess.Popen", "os.system", "os.exec", "os.fork",
    "os.posix_spawn",
  )  # fmt: skip
  assert started == []


def test_the_watcher_sees_what_it_is_there_for(tmp_path):
  script = tmp_path / "bad.py"
  script.write_text(
    "import contextlib, os, pickle, socket\n"
    "with contextlib.suppress(OSError):\n"
    "  socket.create_connection(('127.0.0.1', 9), 1)\n"
    "pickle.loads(pickle.dumps(os.path.join))\n"
    "os.system('true')\n"
  )
  path = tmp_path / "events"
  subprocess.run(
    [sys.executable, str(ROOT / "tests/faults/watched.py"), str(path), script],
    check=True,
  )
  seen = {json.loads(line)[0] for line in path.read_text().splitlines()}
  assert {"pickle.find_class", "os.system"} < seen
  assert any(event.startswith("socket.") for event in seen)


def test_no_file_and_no_line_of_a_run_holds_the_environment(lived):
  read = 0
  for path in lived.rglob("*"):
    if path.is_file():
      data, read = path.read_bytes(), read + 1
      for name, secret in SECRETS.items():
        assert secret.encode() not in data, f"{path} holds {name}"
        assert name.encode() not in data, f"{path} names {name}"
  assert read > 15
  assert (lived / "run" / "report.html").exists()
