"""Runs of a sweep on this machine: which are started, how often, and by whom.

The runs are a script that does as it is told, so that these take seconds; whole
trainings are in tests/faults/test_sweep_killed.py.
"""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from sweeps import attempts, starts, sweep_of

from dpo_jax import sweep as grid
from dpo_jax.errors import ConfigError
from dpo_jax.lock import Lock
from dpo_jax.sweep.claims import claim, is_live
from dpo_jax.sweep.local import run_local
from dpo_jax.sweep.options import LocalOptions
from dpo_jax.sweep.status import State

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICK = LocalOptions(patience=0.01)


def seeds(*values):
  return grid.listed("seed", *values)


def states(sweep):
  return [sweep.place(run).state() for run in sweep.runs]


def wait_for(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.02)


def test_every_run_is_done_once_and_a_second_sweep_starts_none(tmp_path):
  sweep = sweep_of(tmp_path, seeds(1, 2, 3))
  assert not run_local(sweep, QUICK)
  assert not run_local(sweep, QUICK)
  assert states(sweep) == [State.DONE] * 3
  assert [starts(sweep, i) for i in range(3)] == [1, 1, 1]
  assert [row["event"] for row in attempts(sweep, 0)] == ["begun", "ended"]


def test_as_many_at_a_time_as_was_said(tmp_path):
  sweep = sweep_of(tmp_path, seeds(*range(5, 10)))
  run_local(sweep, LocalOptions(jobs=3))
  spans = [[row["time"] for row in attempts(sweep, i)] for i in range(5)]
  together = [sum(b <= t < e for b, e in spans) for t, _ in spans]
  assert max(together) == 3


def test_what_is_refused_is_not_tried_again_and_the_others_go_on(
  tmp_path, caplog
):
  sweep = sweep_of(tmp_path, seeds(10, 1))
  with caplog.at_level(logging.WARNING, "dpo_jax"):
    run_local(sweep, QUICK)
  assert states(sweep) == [State.FAILED, State.DONE]
  assert starts(sweep, 0) == 1
  assert "failed with status 2: error: no such file" in caplog.text


def test_a_crash_is_tried_again_so_many_times(tmp_path):
  sweep = sweep_of(tmp_path, seeds(11, 12))
  run_local(sweep, QUICK._replace(retries=2))
  assert states(sweep) == [State.FAILED, State.DONE]
  assert [starts(sweep, i) for i in range(2)] == [3, 2]
  assert "RuntimeError: broken" in sweep.place(sweep.runs[0]).last_line()


def test_a_failed_run_is_tried_again_by_the_next_sweep(tmp_path):
  sweep = sweep_of(tmp_path, seeds(12))
  run_local(sweep, QUICK._replace(retries=0))
  assert states(sweep) == [State.FAILED]
  run_local(sweep, QUICK._replace(retries=0))
  assert states(sweep) == [State.DONE]


def test_preemption_costs_no_retry_while_the_run_comes_further(tmp_path):
  sweep = sweep_of(tmp_path, seeds(13, 14))
  run_local(sweep, QUICK._replace(retries=1))
  assert states(sweep) == [State.DONE, State.STOPPED]
  assert [starts(sweep, i) for i in range(2)] == [6, 2]


def test_an_end_without_a_summary_is_a_stop(tmp_path):
  sweep = sweep_of(tmp_path, seeds(15))
  run_local(sweep, QUICK._replace(retries=0))
  assert states(sweep) == [State.DONE]
  assert starts(sweep, 0) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_every_run_once_and_starts_no_more(tmp_path, number):
  """Sent twice in a moment, as schedulers do, it is still one request."""
  sweep = sweep_of(tmp_path, [*seeds(16), {"seed": 16, "loss.beta": 0.3},
                              *seeds(1)])  # fmt: skip

  def ask():
    wait_for(lambda: all(_printed(sweep, i) for i in range(2)))
    signal.raise_signal(number)
    signal.raise_signal(number)

  threading.Thread(target=ask).start()
  before = signal.getsignal(number)
  assert run_local(sweep, QUICK._replace(jobs=2))
  assert signal.getsignal(number) is before
  assert states(sweep) == [State.STOPPED, State.STOPPED, State.NEW]
  assert attempts(sweep, 0)[-1]["status"] == 75
  assert not run_local(sweep, QUICK._replace(jobs=2))
  assert states(sweep) == [State.DONE] * 3


def _printed(sweep, number):
  return sweep.place(sweep.runs[number]).last_line() == "started"


_SWEEP = """
import sys, pathlib
sys.path[:0] = sys.argv[2:]
from sweeps import sweep_of
from dpo_jax.sweep.local import run_local
from dpo_jax.sweep.options import LocalOptions
sweep = sweep_of(pathlib.Path(sys.argv[1]), [{"seed": 16}, {"seed": 5}])
run_local(sweep, LocalOptions(patience=0.01))
"""


def _sweep_process(root):
  path = [str(ROOT), str(ROOT / "tests")]
  return subprocess.Popen([sys.executable, "-c", _SWEEP, str(root), *path])


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for it")
def test_runs_of_a_killed_sweep_save_and_end_and_the_next_continues(tmp_path):
  process = _sweep_process(tmp_path)
  sweep = sweep_of(tmp_path, seeds(16, 5))
  place = sweep.place(sweep.runs[0])
  wait_for(lambda: _printed(sweep, 0))
  assert place.state() is State.RUNNING
  process.kill()
  process.wait()
  wait_for(lambda: not is_live(place.path))
  assert place.step() == 1
  assert place.state() is State.STOPPED
  run_local(sweep, QUICK)
  assert states(sweep) == [State.DONE] * 2
  assert [starts(sweep, i) for i in range(2)] == [2, 1]


def test_two_sweeps_of_one_directory_share_the_runs(tmp_path):
  sweep = sweep_of(tmp_path, seeds(5, 6, 7, 8))
  other = sweep_of(tmp_path, seeds(8, 7, 6, 5))
  script = _SWEEP.replace('[{"seed": 16}, {"seed": 5}]',
                          '[{"seed": i} for i in (8, 7, 6, 5)]')  # fmt: skip
  path = [str(ROOT), str(ROOT / "tests")]
  process = subprocess.Popen([sys.executable, "-c", script, tmp_path, *path])
  wait_for(lambda: starts(other, 0))
  run_local(sweep, QUICK)
  assert states(sweep) == [State.DONE] * 4  # also those of the other
  assert process.wait(20) == 0
  assert [starts(sweep, i) for i in range(4)] == [1] * 4
  hosts = {row.get("pid") for i in range(4) for row in attempts(sweep, i)}
  assert len(hosts - {None}) == 2


def test_a_claim_is_held_by_one_and_probed_without_harm(tmp_path):
  held = claim(tmp_path / "run")
  assert claim(tmp_path / "run") is None
  assert is_live(tmp_path / "run")
  held.release()
  assert not is_live(tmp_path / "run")
  again = claim(tmp_path / "run")
  assert again is not None
  again.release()
  assert not is_live(tmp_path / "never")


def test_a_run_that_was_started_otherwise_is_waited_for(tmp_path):
  """By hand, or on a cluster: it holds its directory itself."""
  sweep = sweep_of(tmp_path, seeds(1))
  place = sweep.place(sweep.runs[0])
  place.path.mkdir(parents=True)
  by_hand = Lock(place.path)
  by_hand.take()
  assert place.state() is State.RUNNING
  assert claim(place.path) is None

  def end():
    time.sleep(0.5)
    place.summary.write_text("{}")
    by_hand.release()

  threading.Thread(target=end).start()
  run_local(sweep, QUICK)
  assert place.state() is State.DONE
  assert starts(sweep, 0) == 0


def test_each_run_has_a_gpu_of_its_own_and_all_share_programs(
  tmp_path, monkeypatch
):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  runs = [{"seed": 17, "loss.beta": beta} for beta in (0.1, 0.2, 0.3)]
  sweep = sweep_of(tmp_path, runs)
  run_local(sweep, LocalOptions(jobs=2, gpus=("3", "5")))
  given = [
    json.loads((sweep.place(run).path / "given").read_text())
    for run in sweep.runs
  ]
  assert {g["CUDA_VISIBLE_DEVICES"] for g in given[:2]} == {"3", "5"}
  assert given[2]["CUDA_VISIBLE_DEVICES"] in ("3", "5")
  cache = str(tmp_path / "cache" / "programs")
  assert {g["JAX_COMPILATION_CACHE_DIR"] for g in given} == {cache}


def test_a_cache_of_programs_that_was_chosen_stays(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  assert LocalOptions().environment(0, tmp_path) == {"DPO_JAX_PROCESSES": "1"}
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(
  ("options", "told"),
  [
    (LocalOptions(jobs=0), "--jobs=0"),
    (LocalOptions(retries=-1), "--retries=-1"),
    (LocalOptions(jobs=3, gpus=("0", "1")), "3 runs at a time have 2 GPUs"),
  ],
)
def test_options_without_a_meaning_are_refused(options, told):
  with pytest.raises(ConfigError, match=told):
    options.check()


def test_a_row_of_attempts_that_a_kill_cut_short_is_left_out(tmp_path):
  sweep = sweep_of(tmp_path, seeds(1))
  run_local(sweep, QUICK)
  place = sweep.place(sweep.runs[0])
  with place.attempts.open("a") as file:
    file.write('{"time": 1')
  assert len(place.read_attempts()) == 2
