"""The command line: what it prints, its exit status, and what it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from shared import SHARED, needs_shared

from dpo_jax.build import build
from dpo_jax.config import Config, Model
from dpo_jax.models import hf
from dpo_jax.weights import load_variables

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORIES = SHARED / "data" / "stories260k"

# Parses many command lines in one process: most of a refusal's time is the
# import of jax. Each child is a fork, so flags are parsed afresh.
_REFUSE = """
import os, runpy, sys, json
import dpo_jax.main, dpo_jax.train, dpo_jax.judge, dpo_jax.answers
import dpo_jax.dry_run, dpo_jax.check_data
out = sys.argv[1]
for i, argv in enumerate(json.loads(sys.stdin.read())):
  pid = os.fork()
  if not pid:
    sys.argv = argv
    for fd, name in ((1, "out"), (2, "err")):
      os.dup2(os.open(f"{out}/{i}.{name}", os.O_WRONLY | os.O_CREAT), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
      runpy.run_path(argv[0], run_name="__main__")
      status = 0
    except SystemExit as e:
      status = e.code if isinstance(e.code, int) else e.code is not None
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(status)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def environment():
  path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
  return os.environ | {
    "PYTHONPATH": path,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs that run once
  }


@pytest.mark.parametrize("config", ["configs/reward.py:quickstart", "mine.py"])
def test_a_config_may_import_what_lies_where_the_command_is_run(
  config, tmp_path
):
  (tmp_path / "only").mkdir()  # no more of the checkout than is installed
  (tmp_path / "only" / "dpo_jax").symlink_to(ROOT / "dpo_jax")
  (tmp_path / "mine.py").write_text("import other\nget_config = other.get\n")
  (tmp_path / "other.py").write_text(
    "from dpo_jax.config_file import defaults\n"
    "def get():\n  return defaults(loss='ipo')\n"
  )
  script = str(ROOT / "scripts" / "train.py")
  done = subprocess.run(
    [sys.executable, script, f"--config={config}", "--print_config"],
    env=environment() | {"PYTHONPATH": str(tmp_path / "only")},
    cwd=tmp_path if config == "mine.py" else ROOT,
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "--config.loss.name=" in done.stdout


def run(*argv, stdin="", status=0):
  """Runs a script of the repository; returns its standard output."""
  done = subprocess.run(
    [sys.executable, *map(str, argv)],
    input=stdin,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment(),
  )
  assert done.returncode == status, done.stderr[-3000:]
  assert "Traceback" not in done.stderr
  return done.stdout if status == 0 else done.stderr


PAIRS = [
  {
    "prompt": f"Q{i}:",
    "chosen": " yes" * (1 + i % 3),
    "rejected": " no" * (1 + i % 2),
    "subset": "ab"[i % 2],
  }
  for i in range(12)
]


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


TRAIN = "scripts/train.py", "--config=configs/dpo.py"
PREPARED = (
  *TRAIN,
  "--config.data.source={}/pairs.jsonl",
  "--config.data.cache_dir=",
)
# Each with a word that the one line must have. {} is a folder with pairs.jsonl;
# every command names {}/run as its workdir, which must not appear.
REFUSED = {
  "no config": (["scripts/train.py"], "--config=configs/dpo.py"),
  "missing config": (["scripts/train.py", "--config=no.py"], "no.py"),
  "broken config": (["scripts/train.py", "--config={}/broken.py"], "broken.py"),
  "empty config": (["scripts/train.py", "--config={}/empty.py"], "get_config"),
  "odd config": (["scripts/train.py", "--config={}/odd.py"], "ConfigDict"),
  "odd config, set": (
    ["scripts/train.py", "--config={}/odd.py", "--config.train.steps=3"],
    "--config",
  ),
  "switch": (["scripts/train.py", "--config=configs/dpo.py:tnoe"], "'tnoe'"),
  "misspelt key": ([*TRAIN, "--config.train.bach_size=3"], "batch_size"),
  "misspelt section": ([*TRAIN, "--config.trian.steps=3"], "trian"),
  "misspelt flag": ([*TRAIN, "--wokdir=x"], "wokdir"),
  "bare word": ([*TRAIN, "train.steps=3"], "'train.steps=3'"),
  "wrong type": ([*TRAIN, "--config.train.steps=many"], "many"),
  "fraction": ([*TRAIN, "--config.train.steps=1.5"], "1.5"),
  "section": ([*TRAIN, "--config.train=3"], "config.train"),
  "range": ([*TRAIN, "--config.train.batch_size=0"], "batch_size=0"),
  "unknown loss": ([*TRAIN, "--config.loss.name=kt0"], "'kto'"),
  "option of another": ([*TRAIN, "--config.loss.lam=0.5"], "'lam'"),
  "loss range": ([*TRAIN, "--config.loss.beta=-1"], "beta"),
  "no source": ([*TRAIN], "config.data.source"),
  "missing file": ([*TRAIN, "--config.data.source={}/no.jsonl"], "no.jsonl"),
  "missing model": ([*TRAIN, "--config.model.path={}/none"], "none"),
  "dtype": ([*TRAIN, "--config.model.dtype=float64"], "float32, bfloat16"),
  "remat": ([*TRAIN, "--config.model.remat=all"], "remat"),
  "family": ([*TRAIN, "--config.model.family=gpt"], "known: llama"),
  "mesh": ([*TRAIN, "--config.mesh.fsdp=3"], "devices"),
  "optimizer": (
    [*PREPARED, "--config.data.eval_rows=2", "--config.optim.name=adam"],
    "adamw",
  ),
  "all held out": (PREPARED, "eval_rows=256"),
  "no workdir": ([*PREPARED, "--workdir="], "--workdir"),
  "workdir is a file": (
    [*PREPARED, "--workdir={}/pairs.jsonl"],
    "not a writable directory",
  ),
  "nothing to judge": (
    ["scripts/evaluate.py", "--config=configs/dpo.py"],
    "config.model.path",
  ),
  "nothing to sample": (
    ["scripts/sample.py", "--config=configs/dpo.py", "--prompt=x"],
    "config.model.path",
  ),
  "no prompt": (["scripts/sample.py", "--config=configs/dpo.py"], "--prompt"),
  "nothing to check": (
    ["scripts/check_data.py", "--config=configs/dpo.py"],
    "config.data.source",
  ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
  """(status, stdout, stderr) of every refused command line, and the folder."""
  folder = tmp_path_factory.mktemp("refused")
  out = tmp_path_factory.mktemp("out")
  write_rows(folder / "pairs.jsonl", PAIRS)
  (folder / "broken.py").write_text("def get_config(:\n")
  (folder / "empty.py").write_text("x = 1\n")
  (folder / "odd.py").write_text("def get_config():\n  return 3\n")
  before = sorted(p.name for p in folder.iterdir())
  lines = []
  for argv, _ in REFUSED.values():
    argv = [word.replace("{}", str(folder)) for word in argv]
    given = any(word.startswith("--workdir") for word in argv)
    if argv[0] == "scripts/train.py" and not given:
      argv.append(f"--workdir={folder}/run")
    lines.append(argv)
  statuses = run("-c", _REFUSE, out, stdin=json.dumps(lines)).split()
  assert sorted(p.name for p in folder.iterdir()) == before
  found = {}
  for i, (name, status) in enumerate(zip(REFUSED, statuses, strict=True)):
    texts = [(out / f"{i}.{end}").read_text() for end in ("out", "err")]
    found[name] = int(status), *texts
  return found


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gives_one_line_and_status_2(name, refusals):
  status, out, err = refusals[name]
  assert status == 2, err[-2000:]
  assert out == ""
  errors = [line for line in err.splitlines() if line.startswith("error:")]
  assert len(errors) == 1, err
  assert err.endswith(errors[0] + "\n")
  assert REFUSED[name][1] in errors[0], errors[0]
  assert "Traceback" not in err
  assert "  " not in errors[0]
  assert len(errors[0]) < 600


def test_print_config_shows_what_was_set_as_it_is_given(tmp_path):
  out = run(
    *TRAIN, "--print_config", f"--workdir={tmp_path}/run",
    "--config.loss.beta=0.25", "--config.train.steps=7",
  )  # fmt: skip
  lines = out.splitlines()
  assert "--config.train.steps=7" in lines
  assert "--config.loss.beta=0.25" in lines
  assert "--config.loss.name='dpo'" in lines
  assert all(line.startswith("--config.") for line in lines)
  assert not any("None" in line for line in lines)
  assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_shapes_and_the_first_row_and_writes_nothing(tmp_path):
  source = write_rows(tmp_path / "pairs.jsonl", PAIRS)
  out = run(
    *TRAIN, "--dry_run", f"--workdir={tmp_path}/run",
    f"--config.data.source={source}", "--config.model.tokenizer=bytes",
    "--config.model.width=16", "--config.model.layers=1",
    "--config.data.eval_rows=2", "--config.data.cache_dir=",
    "--config.train.batch_size=4", "--config.train.steps=3",
  )  # fmt: skip
  for line in (
    "loss        dpo {'beta': 0.1, 'label_smoothing': 0.0}, with a reference",
    "10 examples to train, 2 held out",
    "steps       3 of 4 examples",
    "GFLOP of products for the",
    "dropped     none",
    "MiB a device",
    "row 0",
    "prompt            'Q'",
    "0: first          ':' -> ' '",
    "0: second         ':' -> ' '",
  ):
    assert line in out, (line, out)
  assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_checking_data_counts_and_shows_what_training_sees(tmp_path):
  rows = [*PAIRS, {"prompt": "Q:", "chosen": " a", "rejected": ""}]
  source = write_rows(tmp_path / "pairs.jsonl", rows)
  out = run(
    "scripts/check_data.py", "--config=configs/dpo.py", "--visible",
    f"--config.data.source={source}", "--config.model.tokenizer=bytes",
    "--config.data.cache_dir=", "--config.train.batch_size=4",
  )  # fmt: skip
  assert "13 read, 12 examples" in out
  assert f"empty_response, first {source}:13" in out
  assert "subsets     a, b" in out
  assert "0: second" in out
  mask = out.partition("sees the key)\n")[2].splitlines()
  assert len({len(line) for line in mask}) == 1
  assert len(mask) == len(mask[0])
  for i, line in enumerate(mask):
    assert line.strip(".").strip("#") == ""  # one range of keys
    assert line[i] == "#"  # and itself


@needs_shared
def test_sampling_tells_the_story_as_json_lines():
  golden = json.loads((STORIES / "golden.json").read_text())
  out = run(
    "scripts/sample.py", "--config=configs/dpo.py",
    f"--config.model.path={STORIES / 'hf'}", "--config.sample.temperature=0",
    "--config.sample.max_tokens=40",
    stdin="Once upon a time\nLily\n",
  )  # fmt: skip
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["prompt"] for row in rows] == ["Once upon a time", "Lily"]
  story = rows[0]["prompt"] + rows[0]["response"]
  assert golden["greedy_text"].startswith(story)
  assert rows[0]["tokens"] == 40 and rows[0]["logp"] < 0


def test_judging_prints_and_writes_the_same_numbers(tmp_path):
  source = write_rows(tmp_path / "pairs.jsonl", PAIRS)
  config = Config(
    model=Model(
      tokenizer="bytes", width=8, layers=1, heads=2, kv_heads=1, ffn=8
    )
  )
  built = build(config)
  variables = load_variables(config, built)
  for name, factor in (("policy", 1.5), ("reference", 1.0)):
    scaled = jax.tree.map(lambda x, f=factor: x * f, variables)
    hf.save_checkpoint(
      tmp_path / name, built.family, built.model.config, scaled,
      save_tokenizer=built.tokenizer.save,
    )  # fmt: skip
  out = run(
    "scripts/evaluate.py", "--config=configs/dpo.py",
    f"--config.model.path={tmp_path}/policy",
    f"--config.reference.path={tmp_path}/reference",
    f"--config.data.source={source}", "--config.data.cache_dir=",
    "--config.sample.prompts=0", f"--output={tmp_path}/out.json",
  )  # fmt: skip
  result = json.loads((tmp_path / "out.json").read_text())
  assert result["examples"] == 12
  assert {k: v["examples"] for k, v in result["subsets"].items()} == {
    "a": 6,
    "b": 6,
  }
  assert f"{result['metrics']['loss']:.4f}" in out
  for name, row in result["subsets"].items():
    line = next(x for x in out.splitlines() if x.startswith(f"  {name} "))
    assert f"accuracy {row['accuracy']:.4f}" in line
    assert line.endswith("n=6")
