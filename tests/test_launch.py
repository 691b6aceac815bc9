"""What is sent to clusters, word for word, and that it does what it says.

The golden files are what `--dry_run` prints; `UPDATE_GOLDEN=1` writes them. A
real scheduler is in tests/faults/test_slurm.py; of the others there is none
here, so their files are parsed, and the TPU script runs with a gcloud that
starts the commands on this machine.
"""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from dpo_jax.errors import ConfigError
from dpo_jax.sweep import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"
TEMPLATES = ROOT / "scripts" / "launch"
CONFIG = """
from dpo_jax import sweep
from dpo_jax.config_file import defaults

def get_config():
  config = defaults(loss="dpo")
  config.data.cache_dir = ""
  return config

def get_sweep():
  return sweep.product(
    sweep.listed("loss.name", "dpo", "dpo+0.1*sft"),
    sweep.listed("optim.freeze", "embed|mlp", ""),
  )
"""
CASES = {
  "slurm_sweep": (
    "slurm", "--sweep=get_sweep", "--set=partition=gpu", "--set=time=8:00:00",
    "--set=at_once=2", "--set=directory=/home/me/dpo jax",
  ),
  "slurm_run": (
    "slurm", "--set=directory=/work", "--set=nodes=2", "--set=gpus=8",
    "--set=memory=0", "--set=account=lab", "--set=qos=low",
    "--config.loss.beta=0.3", "--python=.venv/bin/python",
  ),
  "gke_sweep": (
    "gke", "--sweep=get_sweep", "--set=image=example.org/dpo:1",
    "--set=queue=multislice-queue", "--set=volume=runs", "--set=spot",
  ),
  "gke_gpu_run": (
    "gke", "--set=image=example.org/dpo:1", "--set=gpus=8", "--set=hosts=1",
    "--set=accelerator=nvidia-h100-80gb",
  ),
  "sky_sweep": ("sky", "--sweep=get_sweep", "--set=bucket=s3://mine"),
  "sky_nodes_run": (
    "sky", "--set=nodes=2", "--set=accelerators=H100:8", "--set=spot=False",
    "--set=cloud=gcp/us-central1",
  ),
  "tpu_sweep": (
    "tpu", "--sweep=get_sweep", "--set=tpu=mine", "--set=zone=us-west4-a",
    "--set=project=my-project",
  ),
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("launch") / "config.py"
  path.write_text(CONFIG)
  return path


def send(config, to, *flags, workdir="/shared/some_runs", status=0, path=""):
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "PATH": f"{path}:{os.environ['PATH']}",
  }
  flags = [f"--to={to}", f"--config={config}", f"--workdir={workdir}", *flags]
  done = subprocess.run(
    [sys.executable, "scripts/launch.py", *flags],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment,
  )
  assert done.returncode == status, done.stderr
  assert "Traceback" not in done.stderr
  return done.stdout + done.stderr


@pytest.fixture(scope="module")
def printed(config):
  """What --dry_run prints of each case, the config's folder left out."""
  return {
    name: send(config, *flags, "--dry_run").replace(
      str(config), "configs/some.py"
    )
    for name, flags in CASES.items()
  }


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_golden_file(printed, name):
  path = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    path.write_text(printed[name])
  assert printed[name] == path.read_text()


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("gke")])
def test_job_sets_are_yaml_that_says_what_was_meant(printed, name):
  documents = [d for d in yaml.safe_load_all(printed[name]) if d]
  assert len(documents) == (4 if "sweep" in name else 1)
  assert len({d["metadata"]["name"] for d in documents}) == len(documents)
  for document in documents:
    (job,) = document["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert len(f"{document['metadata']['name']}-run-0-99-abcde") <= 63
    assert pods["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [
      75,
      143,
    ]
    (container,) = pods["template"]["spec"]["containers"]
    assert container["name"] == "main"
    assert container["command"][:2] == ["python", "scripts/train.py"]
    assert container["command"][-1].startswith("--workdir=/shared/some_runs")
  if name == "gke_sweep":
    assert (
      "--config.optim.freeze=embed|mlp"
      in (
        documents[0]["spec"]["replicatedJobs"][0]["template"]["spec"][
          "template"
        ]
      )["spec"]["containers"][0]["command"]
    )


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("sky")])
def test_tasks_of_sky_are_yaml_with_a_script_that_parses(printed, name):
  head = "# sky jobs launch --yes --detach-run "
  for part in printed[name].split(head)[1:]:
    file, _, text = part.partition("\n")
    task = yaml.safe_load(text)
    assert file == f"{task['name']}.yaml"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


@pytest.mark.parametrize(
  "name", [n for n in CASES if n.startswith(("slurm", "tpu"))]
)
def test_scripts_parse(printed, name):
  subprocess.run(["bash", "-n"], input=printed[name], text=True, check=True)


def test_each_task_of_the_array_has_its_own_words(printed):
  """Also those that a shell would take apart."""
  script = printed["slurm_sweep"]
  choice = script[script.index("case ") : script.index("esac")] + "esac"
  shown = f'{choice}\nprintf "%s\\n" "${{run[@]}}"'
  seen = set()
  for task in range(4):
    done = subprocess.run(
      ["bash", "-c", shown],
      env={"SLURM_ARRAY_TASK_ID": str(task)},
      capture_output=True,
      text=True,
      check=True,
    )
    words = done.stdout.splitlines()
    assert words[:2] == ["python", "scripts/train.py"]
    seen.add(tuple(words[-3:-1]))
  assert ("--config.loss.name=dpo", "--config.optim.freeze=embed|mlp") in seen
  assert ("--config.loss.name=dpo+0.1*sft", "--config.optim.freeze=") in seen
  assert len(seen) == 4


def command(folder, name, text):
  """A program of that name for the path."""
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_what_is_sent_is_what_a_dry_run_prints(config, tmp_path):
  got = tmp_path / "got"
  command(tmp_path / "bin", "sbatch", f'cat > "{got}"')
  workdir = tmp_path / "runs"
  flags = ("--sweep=get_sweep",)
  shown = send(config, "slurm", *flags, "--dry_run", workdir=workdir)
  assert not workdir.exists()
  send(config, "slurm", *flags, workdir=workdir, path=tmp_path / "bin")
  assert shown == f"# sbatch < slurm.sh\n{got.read_text()}"
  assert (workdir / "slurm").is_dir()  # for the logs


def test_each_run_is_sent_to_sky_by_itself(config, tmp_path):
  got = tmp_path / "got"
  command(
    tmp_path / "bin",
    "sky",
    f'echo "$@" >> "{got}"; cat "${{@: -1}}" >> "{got}"',
  )
  send(config, "sky", "--sweep=get_sweep", path=tmp_path / "bin")
  lines = got.read_text().splitlines()
  sent = [line for line in lines if line.startswith("jobs launch --yes")]
  assert len(sent) == 4
  assert sum(line.startswith("  exec python") for line in lines) == 4


def test_complete_runs_are_left_out(config, tmp_path):
  workdir = tmp_path / "runs"
  flags = ("--sweep=get_sweep", "--dry_run")
  shown = send(config, "sky", *flags, workdir=workdir)
  ids = [x[2:] for x in shown.splitlines() if x.startswith("# name=")]
  assert len(ids) == 4
  for number, name in enumerate(ids):
    (workdir / "runs" / name).mkdir(parents=True)
    (workdir / "runs" / name / "summary.json").write_text("{}")
    shown = send(config, "sky", *flags, workdir=workdir)
    assert shown.count("\nname: ") == 3 - number
  assert shown == "all runs are done\n"


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (("slurm", "--set=partitoin=x"), "did you mean 'partition'?"),
    (("slurm", "--set=nodes=two"), "--set=nodes=two should be of type int"),
    (("sky", "--set=spot=maybe"), "should be of type bool"),
    (("gke",), "gke needs --set=image=..."),
    (("tpu", "--set=tpu=x"), "tpu needs --set=zone=..."),
    (("slurm", "--sweep=none"), "has no function 'none'"),
  ],
)
def test_what_is_wrong_is_one_line(config, flags, told):
  err = send(config, *flags, status=2)
  assert told in err
  assert err.count("\n") == 1


def test_a_scheduler_that_refuses_or_is_missing_is_one_line(config, tmp_path):
  command(tmp_path / "bin", "sbatch", "exit 3")
  workdir = tmp_path / "runs"
  err = send(config, "slurm", status=2, workdir=workdir, path=tmp_path / "bin")
  assert "sbatch ended with status 3" in err
  with pytest.raises(ConfigError, match="'no_such_thing' is not installed"):
    launch._call(["no_such_thing"], "")


# Stops by SIGTERM with status 75 until it was started so often; its name says
# when. Ends well after that.
_RUN = """
import pathlib, signal, sys, time
flags = dict(a.split("=", 1) for a in sys.argv[1:])
place = pathlib.Path(flags["--workdir"])
place.mkdir(exist_ok=True)
starts = place / "starts"
starts.write_text("x" * (len(starts.read_text()) + 1 if starts.exists() else 1))
count = len(starts.read_text())
if place.name == "wrong": sys.exit(2)
if place.name == "crashes": sys.exit(1)
if place.name == "preempted" and count < 4: sys.exit(75)
def stop(*_):
  (place / "saved").write_text("")
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if place.name == "long" and count < 2:
  (place / "ready").write_text("")
  time.sleep(60)
(place / "summary.json").write_text("{}")
"""
# Takes --command and does it here; {name} of a TPU VM goes in its log.
_GCLOUD = 'for word in "$@"; do case "$word" in --command=*) exec bash -c \
"${word#--command=}";; esac; done'


@pytest.fixture
def tpu(tmp_path):
  """Starts the TPU script for runs of these names."""
  (tmp_path / "run.py").write_text(_RUN)
  command(tmp_path / "bin", "gcloud", _GCLOUD)

  def start(*names):
    tasks = [
      launch.Task(n, n, [sys.executable, "run.py", f"--workdir={tmp_path / n}"])
      for n in names
    ]
    settings = ["tpu=mine", "zone=z", f"directory={tmp_path}", "pause=0"]
    options = launch.parse_options("tpu", settings)
    name = f"test-{os.getpid()}"
    files = launch.render("tpu", TEMPLATES, name, tmp_path, tasks, options)
    (tmp_path / "tpu.sh").write_text(files["tpu.sh"])
    return subprocess.Popen(
      ["bash", str(tmp_path / "tpu.sh")],
      env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
      start_new_session=True,
    )

  yield start
  pathlib.Path(f"/tmp/test-{os.getpid()}.pid").unlink(missing_ok=True)


def starts(place):
  return len((place / "starts").read_text())


def test_the_tpu_script_continues_what_stopped_and_goes_on_after_failures(
  tpu, tmp_path
):
  process = tpu("wrong", "crashes", "preempted", "good")
  assert process.wait(30) == 1  # some failed
  assert starts(tmp_path / "wrong") == 1
  assert starts(tmp_path / "crashes") == 3
  assert starts(tmp_path / "preempted") == 4
  assert (tmp_path / "preempted" / "summary.json").exists()
  assert (tmp_path / "good" / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_tpu_script_passes_a_signal_on_and_waits_for_the_checkpoint(
  tpu, tmp_path, number
):
  """To the whole group, as a terminal does."""
  process = tpu("long", "good")
  deadline = time.monotonic() + 120
  while not (tmp_path / "long" / "ready").exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  os.killpg(process.pid, number)
  assert process.wait(120) == 75
  assert (tmp_path / "long" / "saved").exists()
  assert not (tmp_path / "good").exists()
  assert tpu("long", "good").wait(120) == 0
  assert (tmp_path / "long" / "summary.json").exists()
  assert (tmp_path / "good" / "summary.json").exists()
