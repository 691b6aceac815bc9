"""One run in several processes: the same numbers, and no survivor alone."""

import shutil
import time

import numpy as np
import pytest

from faults.launch import STEPS_OF_TWO, checksums, launch, rows

pytestmark = pytest.mark.slow

# Sums over two devices do not depend on their order; over more, how the
# processes are cut decides where gloo begins to add.
LAYOUTS = [(1, 8), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def layouts(corpus, xla, tmp_path_factory):
  place = tmp_path_factory.mktemp("layouts")
  for processes, devices in LAYOUTS:
    run = launch(
      corpus, place / f"{processes}x{devices}",
      processes=processes, devices=devices, cache=xla,
    )  # fmt: skip
    assert run.wait(240) == [0] * processes
  return place


def losses(workdir):
  return np.array([r["loss"] for r in rows(workdir) if r["split"] == "train"])


def test_one_and_two_processes_are_equal_to_the_bit(layouts):
  assert checksums(layouts / "2x4") == checksums(layouts / "1x8")
  assert rows(layouts / "2x4") == rows(layouts / "1x8")


def test_four_processes_give_the_same_losses(layouts):
  ours, whole = losses(layouts / "4x2"), losses(layouts / "1x8")
  assert len(whole) == 10
  np.testing.assert_allclose(ours, whole, rtol=3e-6)
  np.testing.assert_allclose(ours[-1], whole[-1], rtol=1e-6)


def test_what_two_processes_saved_one_continues(corpus, xla, layouts, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(layouts / "2x4", workdir)
  shutil.rmtree(workdir / "checkpoints" / "10")
  (workdir / "summary.json").unlink()
  run = launch(corpus, workdir, devices=8, cache=xla)
  assert run.wait() == [0]
  assert "continuing at step 5 of 10" in run.log()
  ours, whole = losses(workdir), losses(layouts / "2x4")
  assert rows(workdir)[:5] == rows(layouts / "2x4")[:5]
  np.testing.assert_allclose(ours, whole, rtol=3e-6)
  np.testing.assert_allclose(ours[-1], whole[-1], rtol=1e-6)


def test_only_the_leader_writes(layouts):
  names = {p.name for p in (layouts / "2x4").iterdir()}
  assert names == {
    "checkpoints", "config.json", "metrics.jsonl", "report.html",
    "summary.json",
  }  # fmt: skip


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_process_that_raises_ends_all_and_says_why(
  corpus, xla, tmp_path, guilty
):
  run = launch(
    corpus, tmp_path / "run", STEPS_OF_TWO, processes=2, cache=xla, heartbeat=5,
    fault=f"raise {guilty} 4",
  )  # fmt: skip
  ends = run.wait()
  assert ends[guilty] == 1 and ends[1 - guilty] not in (0, 75)
  assert "RuntimeError: this one is guilty" in run.log(guilty)
  assert "in guilty_function" in run.log(guilty)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [9, 19], ids=["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_freezes_leaves_no_survivor(
  corpus, xla, tmp_path, victim, number
):
  heartbeat = 5
  run = launch(
    corpus, tmp_path / "run", STEPS_OF_TWO, processes=2, cache=xla,
    heartbeat=heartbeat, fault="slow 0 6",
  )  # fmt: skip
  run.until_saved(5)
  run.kill(process=victim, number=number)
  begun = time.monotonic()
  other = run.processes[1 - victim]
  assert other.wait(heartbeat + 10) not in (0, 75)
  assert time.monotonic() - begun < heartbeat + 10
  run.kill()  # who was frozen


def test_a_process_that_does_not_see_the_directory_is_told(
  corpus, xla, tmp_path
):
  run = launch(
    corpus, tmp_path / "run", processes=2, cache=xla, heartbeat=5,
    workdirs=["run", "elsewhere"],
  )  # fmt: skip
  assert run.wait(60) == [2, 2]
  assert "all processes of the run see it" in run.log(0) + run.log(1)


def test_processes_of_other_settings_are_told(corpus, xla, tmp_path):
  run = launch(
    corpus, tmp_path / "run", processes=2, cache=xla, heartbeat=5,
    last=["--config.optim.learning_rate=0.1"],
  )  # fmt: skip
  assert run.wait(60) == [2, 2]
  assert "have other settings, weights or data" in run.log(0)
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_half_of_an_address_is_one_line(corpus, tmp_path):
  run = launch(corpus, tmp_path / "run", "--processes=2")
  assert run.wait() == [2]
  assert run.log().startswith("error: --coordinator and --process missing")
  assert run.log().count("\n") == 1
