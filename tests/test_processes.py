"""Processes: how a run is asked to stop, and what is told to all."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax import processes
from dpo_jax.errors import ConfigError
from dpo_jax.processes import Stopped, StopSignal

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_between_steps_is_a_question(number):
  with StopSignal() as stop, stop.between_steps():
    assert not stop.requested()
    signal.raise_signal(number)
    assert stop.requested()


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_elsewhere_stops_at_once(number):
  with StopSignal() as stop, pytest.raises(Stopped, match=number.name):
    signal.raise_signal(number)
    stop.requested()


def test_one_request_may_arrive_twice(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
  with StopSignal() as stop, stop.between_steps():
    signal.raise_signal(signal.SIGTERM)
    now[0] += 0.02
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested()


def test_a_second_request_ends_at_once(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with StopSignal() as stop, stop.between_steps():
      signal.raise_signal(signal.SIGINT)
      now[0] += 2
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


def test_signals_are_given_back():
  before = [signal.getsignal(n) for n in BOTH]
  with StopSignal():
    assert [signal.getsignal(n) for n in BOTH] != before
  assert [signal.getsignal(n) for n in BOTH] == before


def test_an_address_without_a_port_is_refused():
  with pytest.raises(ConfigError, match="host:port"):
    processes.start("host0", 2, 0)


@pytest.mark.parametrize(
  "given",
  [
    ("127.0.0.1:1", 0, None),
    ("127.0.0.1:1", 2, None),
    ("", 2, 1),
    ("", 0, 1),
    ("", 2, None),
  ],
)
def test_half_of_an_address_is_refused(given):
  with pytest.raises(ConfigError, match="together"):
    processes.start(*given)


def test_one_process_starts_nothing(monkeypatch):
  monkeypatch.setattr(processes.jax.distributed, "initialize", pytest.fail)
  processes.start("", 1)
  assert processes.leads() and processes.count() == 1


def test_alone_everything_is_its_own():
  assert processes.lead(lambda: (1, 2)) == (1, 2)
  assert processes.all_agree(True) and not processes.all_agree(False)
  x = {"a": np.arange(3)}
  assert processes.share(x) is x
  np.testing.assert_array_equal(processes.gather(x)["a"], x["a"])


def _talk(address: str, process: int) -> None:
  """What one of two processes does; prints what it came to know."""
  processes.start(address, 2, process, heartbeat_seconds=10)
  told = processes.lead(lambda: {"pid": os.getpid(), "text": "ä" * 3})
  shared = processes.share(np.full((2, 3), process, np.int64))
  agreed = processes.all_agree(process == 0), processes.all_agree(True)
  error = None
  try:
    processes.lead(_fail)
  except ConfigError as e:
    error = str(e)
  print(sorted(told), told["text"], shared.tolist(), agreed, error)


def _fail():
  raise ConfigError("no such thing")


def test_what_the_leader_finds_all_know():
  from faults.launch import free_port

  address = f"127.0.0.1:{free_port()}"
  both = [
    subprocess.Popen(
      [sys.executable, __file__, address, str(i)],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ
      | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    for i in range(2)
  ]
  said = [p.communicate(timeout=120)[0].splitlines()[-1] for p in both]
  assert [p.returncode for p in both] == [0, 0]
  assert said[0] == said[1]
  assert "['pid', 'text'] äää [[0, 0, 0], [0, 0, 0]] (False, True)" in said[0]
  assert "no such thing" in said[0]


if __name__ == "__main__":
  _talk(sys.argv[1], int(sys.argv[2]))
