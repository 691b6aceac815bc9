"""One live run in a work directory, whatever became of those before."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from dpo_jax import lock
from dpo_jax.errors import ConfigError
from dpo_jax.lock import Lock

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from dpo_jax.lock import Lock
Lock(sys.argv[1]).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_live_run_is_named_and_left_alone(tmp_path, holder):
  before = (tmp_path / lock.NAME).read_text()
  with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
    Lock(tmp_path).take()
  assert (tmp_path / lock.NAME).read_text() == before


def test_what_a_killed_run_left_is_taken_over(tmp_path, holder):
  holder.kill()
  holder.wait()
  assert (tmp_path / lock.NAME).exists()
  with Lock(tmp_path):
    owner = json.loads((tmp_path / lock.NAME).read_text())
    assert owner["pid"] == os.getpid()
  assert not (tmp_path / lock.NAME).exists()


def test_the_same_process_takes_it_once(tmp_path):
  with Lock(tmp_path), pytest.raises(ConfigError, match=str(os.getpid())):
    Lock(tmp_path).take()
  with Lock(tmp_path):
    pass


def elsewhere(tmp_path):
  """The file of another machine, on a file system whose locks stay here."""
  path = tmp_path / lock.NAME
  path.write_text('{"host": "elsewhere", "pid": 7, "since": "today"}\n')
  return path


def test_another_machine_that_shows_life_is_left_alone(tmp_path, monkeypatch):
  path = elsewhere(tmp_path)
  real = time.sleep

  def sleep(seconds):
    real(0.01)
    os.utime(path)

  monkeypatch.setattr(lock.time, "sleep", sleep)
  with pytest.raises(ConfigError, match="process 7 on elsewhere"):
    Lock(tmp_path, stale_seconds=5).take()


def test_another_machine_without_life_is_taken_over(tmp_path):
  elsewhere(tmp_path)
  begun = time.monotonic()
  with Lock(tmp_path, stale_seconds=0.3):
    assert time.monotonic() - begun >= 0.3


def test_a_run_shows_life(tmp_path):
  with Lock(tmp_path, beat_seconds=0.05):
    first = os.stat(tmp_path / lock.NAME).st_mtime_ns
    ends = time.monotonic() + 5
    while os.stat(tmp_path / lock.NAME).st_mtime_ns == first:
      assert time.monotonic() < ends
      time.sleep(0.02)


def test_a_file_of_nonsense_is_taken_over(tmp_path):
  (tmp_path / lock.NAME).write_text("[1, 2")
  with Lock(tmp_path):
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"]
