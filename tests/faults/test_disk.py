"""Disks that are full, slow, missing, damaged or somebody else's."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from faults.launch import ROOT, TINY, checksums, launch, rows, saved


@pytest.mark.slow
def test_a_full_disk_is_said_at_once_and_leaves_the_steps_before(
  corpus, xla, straight, tmp_path
):
  """Saves at every step; from the fourth on no file may pass 32 kB:
  the log stays below, and of the files that the state is cut into, by chance,
  one is larger."""
  workdir = tmp_path / "run"
  often = "--config.train.checkpoint_every=1"
  run = launch(corpus, workdir, often, cache=xla, fault="full 0 4")
  assert run.wait() == [2], run.log()
  (error,) = [x for x in run.log().splitlines() if x.startswith("error:")]
  assert error.startswith(f"error: {workdir}/checkpoints: saving failed")
  assert "bytes free" in error and "is there to continue from" in error
  assert saved(workdir)[-1] in (2, 3, 4)
  assert launch(corpus, workdir, cache=xla).wait() == [0]
  assert checksums(workdir) == checksums(straight)


@pytest.mark.slow
@pytest.mark.skipif(
  os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount"
)
def test_a_small_file_system_that_fills_up_is_said_with_its_free_bytes(
  corpus, xla, tmp_path
):
  place = tmp_path / "small"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("mounting a tmpfs is not allowed here")
  try:
    run = launch(
      corpus, place / "run", "--config.train.checkpoint_every=1",
      "--config.train.keep_checkpoints=9", cache=xla,
    )  # fmt: skip
    assert run.wait() == [2]
    assert "saving failed" in run.log() and "bytes free" in run.log()
    intact = saved(place / "run")
    assert intact
  finally:
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["a file", "no permission", "below a file"])
def test_a_work_directory_that_cannot_be_is_refused_before_compiling(
  corpus, tmp_path, kind
):
  place = tmp_path / "there"
  if kind == "no permission":
    if os.geteuid() == 0:
      place = "/proc/run"  # where not even root writes
    else:
      place.mkdir(mode=0o500)
  else:
    place.write_text("mine")
  workdir = f"{place}/run" if kind != "a file" else place
  done = subprocess.run(
    [
      sys.executable, str(ROOT / "scripts" / "train.py"),
      f"--config={TINY}:{corpus}", f"--workdir={workdir}",
    ],
    capture_output=True, text=True, check=False, cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 2
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: work directory ") and "step" not in done.stdout


def test_a_second_run_in_one_directory_is_refused_while_the_first_lives(
  corpus, xla, tmp_path
):
  first = launch(corpus, tmp_path / "run", cache=xla, fault="hang 0 5")
  first.until("step 1/")
  second = launch(corpus, tmp_path / "run", cache=xla)
  assert second.wait(60) == [2]
  pid = first.processes[0].pid
  assert f"a run is going on in it (process {pid} on" in second.log()
  assert first.processes[0].poll() is None
  first.kill()
  first.wait()
  third = launch(corpus, tmp_path / "run", cache=xla)
  third.until("left by a run that died")
  third.kill()
  third.wait()


def damaged_copy(straight, workdir, damage):
  """The straight run without its end, the newest checkpoint damaged."""
  shutil.copytree(straight, workdir)
  for name in ("summary.json", "report.html"):
    (workdir / name).unlink()
  state = workdir / "checkpoints" / "10" / "state"
  largest = max(
    (p for p in state.rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 16
  if damage == "bit":
    largest.write_bytes(content)
  elif damage == "half":
    largest.write_bytes(content[: len(content) // 2])
  else:
    largest.unlink()


@pytest.mark.parametrize("damage", ["bit", "half", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
  corpus, xla, straight, tmp_path, damage
):
  workdir = tmp_path / "run"
  damaged_copy(straight, workdir, damage)
  run = launch(corpus, workdir, cache=xla)
  assert run.wait() == [0]
  assert "DAMAGED CHECKPOINT, kept as damaged-10" in run.log()
  assert "continuing at step 5 of 10" in run.log()
  assert checksums(workdir) == checksums(straight)
  assert rows(workdir) == rows(straight)


def test_a_damaged_checkpoint_stops_a_run_that_asked_for_it(
  corpus, xla, straight, tmp_path
):
  workdir = tmp_path / "run"
  damaged_copy(straight, workdir, "bit")
  stop = "--config.train.on_damaged_checkpoint=stop"
  run = launch(corpus, workdir, stop, cache=xla)
  assert run.wait() == [2]
  assert "checkpoints/10: cannot be restored" in run.log()
  assert saved(workdir) == [5, 10]


@pytest.mark.slow
def test_a_stalled_reader_is_waited_for_and_its_stack_is_written(
  corpus, xla, straight, tmp_path
):
  workdir = tmp_path / "run"
  run = launch(
    corpus, workdir, "--config.log.watchdog=1.5", cache=xla, fault="stall 0 7"
  )
  assert run.wait() == [0]
  assert "in guilty_function" in (workdir / "stacks-0.txt").read_text()
  assert checksums(workdir) == checksums(straight)


@pytest.mark.slow
def test_saves_slower_than_their_interval_do_not_overlap(
  corpus, xla, straight, tmp_path
):
  """A save at every step of milliseconds, each of which takes longer."""
  workdir = tmp_path / "run"
  often = ("--config.train.checkpoint_every=1",)
  keep = ("--config.train.keep_checkpoints=20",)
  assert launch(corpus, workdir, *often, *keep, cache=xla).wait() == [0]
  assert saved(workdir) == list(range(1, 11))
  assert checksums(workdir) == checksums(straight)


@pytest.mark.slow
def test_settings_may_change_where_they_are_allowed_by_name(
  corpus, xla, straight, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  shutil.rmtree(workdir / "checkpoints" / "10")
  (workdir / "summary.json").unlink()
  slower = "--config.optim.learning_rate=0.0005"
  refused = launch(corpus, workdir, slower, cache=xla)
  assert refused.wait() == [2]
  assert "optim.learning_rate: 0.001 there, 0.0005 here" in refused.log()
  typo = launch(corpus, workdir, slower, "--allow=optim.lerning_rate")
  assert typo.wait() == [2]
  assert "did you mean 'optim.learning_rate'" in typo.log()
  allowed = launch(
    corpus, workdir, slower, "--allow=optim.learning_rate", cache=xla
  )
  assert allowed.wait() == [0]
  assert checksums(workdir) != checksums(straight)
  config = json.loads((workdir / "config.json").read_text())["config"]
  assert config["optim"]["learning_rate"] == 0.0005
