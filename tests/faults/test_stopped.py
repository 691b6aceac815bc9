"""SIGTERM and SIGINT, whenever they come: saved, status 75, continued."""

import signal
import time

import pytest

from faults.launch import STEPS_OF_TWO, checksums, launch, rows, saved

pytestmark = pytest.mark.slow


def ends_as_the_straight_run(corpus, xla, workdir, straight):
  assert launch(corpus, workdir, cache=xla).wait() == [0]
  assert checksums(workdir) == checksums(straight)
  train = [r for r in rows(workdir) if r["split"] == "train"]
  assert train == [r for r in rows(straight) if r["split"] == "train"]


@pytest.mark.parametrize(
  ("fault", "step"),
  [
    ("term 0 4", 4),  # the step under way is finished
    ("int 0 4", 4),
    ("save 0 5", 6),
    ("eval 0 3", 3),
  ],
)
def test_a_signal_saves_the_step_and_the_next_start_goes_on(
  corpus, xla, straight, tmp_path, fault, step
):
  flags = ["--config.train.eval_every=3"] if "eval" in fault else []
  run = launch(corpus, tmp_path / "run", *flags, cache=xla, fault=fault)
  assert run.wait(60) == [75]
  assert f"stopped at step {step}; the same command continues" in run.log()
  assert saved(tmp_path / "run")[-1] == step
  assert "Traceback" not in run.log()
  ends_as_the_straight_run(corpus, xla, tmp_path / "run", straight)


def test_a_signal_while_compiling_loses_nothing(
  corpus, xla, straight, tmp_path
):
  run = launch(corpus, tmp_path / "run", fault="compile 0 0")
  assert run.wait(60) == [75]
  assert "signal while compiling" in run.log()
  assert "Traceback" not in run.log()
  ends_as_the_straight_run(corpus, xla, tmp_path / "run", straight)


def test_a_second_request_ends_at_once(corpus, xla, tmp_path):
  never = "--config.train.checkpoint_every=0"
  run = launch(corpus, tmp_path / "run", never, cache=xla, fault="stall 0 5")
  run.until("step 1/")
  time.sleep(1)  # it sleeps before step 5
  run.kill(number=signal.SIGINT)
  time.sleep(1.5)
  run.kill(number=signal.SIGINT)
  assert run.wait(5) in ([-2], [1])
  assert saved(tmp_path / "run") == []


def test_one_of_two_processes_is_told_and_both_stop_at_the_same_step(
  corpus, xla, straight_of_two, tmp_path
):
  options = {"processes": 2, "cache": xla}
  workdir = tmp_path / "run"
  flags = (STEPS_OF_TWO, "--config.train.checkpoint_every=0")
  run = launch(corpus, workdir, *flags, **options, fault="term 1 4")
  assert run.wait(120) == [75, 75]
  (step,) = saved(workdir)
  assert 4 <= step < 40
  assert f"stopped at step {step}" in run.log(0)
  assert launch(corpus, workdir, *flags, **options).wait() == [0, 0]
  assert checksums(workdir) == checksums(straight_of_two)


def test_a_signal_while_two_processes_save_is_not_lost(corpus, xla, tmp_path):
  options = {"processes": 2, "cache": xla}
  flags = (
    STEPS_OF_TWO, "--config.train.checkpoint_every=5",
    "--config.train.eval_every=3",
  )  # fmt: skip
  run = launch(corpus, tmp_path / "run", *flags, **options, fault="save 0 10")
  assert run.wait(120) == [75, 75]
  assert 10 <= saved(tmp_path / "run")[-1] <= 13
  # Continued, the loop counts anew and steps do not.
  run = launch(corpus, tmp_path / "run", *flags, **options, fault="save 1 20")
  assert run.wait(120) == [75, 75]
  assert 20 <= saved(tmp_path / "run")[-1] <= 23
