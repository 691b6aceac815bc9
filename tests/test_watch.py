"""Where a run hangs is written down; chosen steps leave a trace."""

import contextlib
import logging
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from runs import compile_once, small_config  # noqa: F401

from dpo_jax.config import from_dict
from dpo_jax.data.corpus import write_corpus
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError
from dpo_jax.train import train
from dpo_jax.watch import Trace, Watchdog, parse_steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp("corpus"), pairs=24)


def wait_for(path, text, seconds=60.0):
  """The file's content once it holds the text; what it has when time is up."""
  end = time.monotonic() + seconds
  content = ""
  while text not in content and time.monotonic() < end:
    time.sleep(0.01)
    content = path.read_text() if path.exists() else ""
  return content


def waits_in_vain(released):
  released.wait(20.0)


def test_a_silence_is_answered_with_the_stack_of_every_thread(tmp_path, caplog):
  released = threading.Event()
  stuck = threading.Thread(target=waits_in_vain, args=(released,))
  stuck.start()
  with caplog.at_level(logging.WARNING), Watchdog(0.05, tmp_path, 3) as dog:
    dog.beat(7)
    content = wait_for(tmp_path / "stacks-3.txt", "\n\n")
  released.set()
  stuck.join()
  assert "after step 7" in content
  assert "in waits_in_vain" in content
  assert "in wait_for" in content  # the main thread
  assert str(tmp_path / "stacks-3.txt") in caplog.messages[0]


def test_it_speaks_again_only_after_another_period(tmp_path):
  with Watchdog(0.1, tmp_path) as dog:
    begun = time.monotonic()
    path = tmp_path / "stacks-0.txt"
    while path.exists() is False or path.read_text().count("the start") < 2:
      assert time.monotonic() < begun + 20, "no second report"
      time.sleep(0.01)
    assert time.monotonic() - begun >= 0.2
  reports = path.read_text().count("the start")
  time.sleep(0.25)
  assert path.read_text().count("the start") == reports, (
    "not over with the block"
  )
  assert dog.path == path


def test_beats_keep_it_silent(tmp_path):
  with Watchdog(2.0, tmp_path) as dog:
    for step in range(24):
      dog.beat(step)
      time.sleep(0.1)
  assert not list(tmp_path.iterdir())


def test_no_seconds_start_no_thread(tmp_path):
  before = threading.active_count()
  with Watchdog(0, tmp_path):
    assert threading.active_count() == before
  with Watchdog(9, tmp_path):
    assert threading.active_count() == before + 1
  assert threading.active_count() == before


def test_stacks_that_cannot_be_written_end_nothing(tmp_path, caplog):
  with (
    caplog.at_level(logging.WARNING),
    Watchdog(0.05, tmp_path / "nowhere"),
  ):
    end = time.monotonic() + 20
    while len(caplog.messages) < 2 and time.monotonic() < end:
      time.sleep(0.01)
  assert len(caplog.messages) >= 2
  assert all("cannot be written" in message for message in caplog.messages)


def test_a_loader_that_hangs_is_found_by_name(corpus, tmp_path, monkeypatch):
  real, path = Plan.__getitem__, tmp_path / "run" / "stacks-0.txt"

  def a_slow_disk():
    assert "in a_slow_disk" in wait_for(path, "in a_slow_disk")

  def getitem(plan, step):
    if plan.shuffle and step == 4:
      a_slow_disk()
    return real(plan, step)

  monkeypatch.setattr(Plan, "__getitem__", getitem)
  config = small_config(
    corpus, **{"log.watchdog": 1.0, "train.eval_every": 0,
               "sample.prompts": 0, "train.export": False}
  )  # fmt: skip
  train(config, tmp_path / "run")
  report = path.read_text().partition("in a_slow_disk")[2]
  assert "in _loop" in report  # which waits for it


@pytest.mark.parametrize(
  "spec", ["x", "3-", "-3", "5-4", "0-2", "1,2", "1-2-3"]
)
def test_a_trace_of_no_steps_is_refused_with_its_value(spec):
  with pytest.raises(ConfigError, match=f"log.trace='{spec}'"):
    from_dict({"log": {"trace": spec}})


def test_each_batch_of_an_evaluation_is_a_sign_of_life(
  corpus, tmp_path, monkeypatch
):
  real, signs = Plan.__getitem__, []

  def getitem(plan, step):
    if not plan.shuffle:
      signs.append("batch")
    return real(plan, step)

  monkeypatch.setattr(Plan, "__getitem__", getitem)
  monkeypatch.setattr(Watchdog, "beat", lambda dog, step: signs.append(step))
  config = small_config(
    corpus, **{"train.steps": 2, "train.eval_every": 0, "data.eval_rows": 12,
               "sample.prompts": 0, "train.export": False}
  )  # fmt: skip
  train(config, tmp_path / "run")
  before, after = [0, "batch"] * 3, [2, "batch"] * 3
  assert signs == [*before, 1, 2, *after]


def test_steps_to_trace_are_a_range_or_one():
  assert parse_steps("20-22") == (20, 22)
  assert parse_steps("20") == (20, 20)
  assert parse_steps("") is None


class Profiler:
  """Stands in for that of jax."""

  def __init__(self, monkeypatch):
    self.calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", self.start)
    monkeypatch.setattr(jax.profiler, "stop_trace", self.stop)

  def start(self, path):
    self.calls.append(str(path))

  def stop(self):
    self.calls.append("stop")


def walk(trace, calls, steps):
  for step in steps:
    trace.step(step, calls.append, step)


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    (range(1, 8), [1, 2, "start", 3, 4, "stop", 5, 6, 7]),
    (range(4, 6), ["start", 4, "stop", 5]),  # resumed in the middle
    (range(1, 4), [1, 2, "start", 3, "stop"]),  # ended there
    (range(5, 7), [5, 6]),  # resumed behind it
  ],
)
def test_a_trace_holds_the_steps_it_was_asked_for(
  tmp_path, monkeypatch, steps, expected
):
  profiler = Profiler(monkeypatch)
  with Trace("3-4", tmp_path) as trace:
    walk(trace, profiler.calls, steps)
  start = str(tmp_path)
  assert profiler.calls == [start if c == "start" else c for c in expected]


def test_steps_are_told_of_the_time_that_a_trace_takes(tmp_path, monkeypatch):
  calls = Profiler(monkeypatch).calls

  @contextlib.contextmanager
  def around():
    calls.append("(")
    yield
    calls.append(")")

  with Trace("2", tmp_path, around) as trace:
    walk(trace, calls, [1, 2, 3])
  start = str(tmp_path)
  assert calls == [1, "(", start, ")", 2, "(", "stop", ")", 3]


def test_an_error_within_the_steps_stops_the_trace(tmp_path, monkeypatch):
  profiler = Profiler(monkeypatch)
  with contextlib.suppress(KeyError), Trace("1-9", tmp_path) as trace:
    trace.step(1, {}.__getitem__, 0)
  assert profiler.calls[-1] == "stop"


def test_a_profiler_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
  def start(path):
    raise RuntimeError("only one at a time")

  monkeypatch.setattr(jax.profiler, "start_trace", start)
  with caplog.at_level(logging.WARNING), Trace("1-2", tmp_path) as trace:
    assert trace.step(1, lambda x: x + 1, 1) == 2
    assert trace.step(2, lambda x: x + 1, 2) == 3
  assert [m for m in caplog.messages if "only one at a time" in m]
  assert len(caplog.messages) == 1


def test_a_real_trace_names_its_steps(tmp_path):
  double = jax.jit(lambda x: x @ x)
  with Trace("2", tmp_path) as trace:
    for step in (1, 2, 3):
      trace.step(step, double, jnp.ones((8, 8)))
  (file,) = tmp_path.rglob("*.xplane.pb")
  content = file.read_bytes()
  assert b"step_num" in content
  assert b"train" in content
