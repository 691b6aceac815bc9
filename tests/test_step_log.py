"""Rows of training steps: their speed, and what resuming keeps."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax import losses, metrics, step_log
from dpo_jax.config import Config, Log, Train
from dpo_jax.errors import UserError
from dpo_jax.metrics import CLOCKED
from dpo_jax.step_log import StepLog

STEPS, TOKENS, FLOPS = 8, 50, 6e12


class Clock:
  """Both clocks of the module, moved by hand."""

  def __init__(self, monkeypatch, now=1000.0):
    self.now = now
    clock = SimpleNamespace(time=self.read, perf_counter=self.read)
    monkeypatch.setattr(step_log, "time", clock)

  def read(self):
    return self.now


class Rows(list):
  def write(self, step, split, values):
    self.append({"step": step, "split": split} | values)


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def make_log(peak_tflops=4.0, started=None, rows=(1,) * STEPS, **train):
  config = Config(
    train=Train(batch_size=4, log_every=2, **train),
    log=Log(peak_tflops=peak_tflops),
  )
  run = SimpleNamespace(
    config=config,
    steps=STEPS,
    schedule=lambda step: 0.5 * step,
    train_plan=SimpleNamespace(
      tokens=lambda step: TOKENS + step, shape_of=lambda step: rows[step]
    ),
    ideal_flops=lambda step: FLOPS,
    seconds=lambda step: None,
    built=SimpleNamespace(mesh=SimpleNamespace(size=3)),
  )
  log = StepLog(run, started)
  log.writer = Rows()
  return log


def add(log, step, skipped=0.0):
  one = np.float32(1)
  log.add(
    SimpleNamespace(update=lambda *_: None),
    step,
    {
      "loss": losses.Sums(np.float32(step), one),
      "skipped": losses.Sums(np.float32(skipped), one),
    },
  )


def walk(log, clock, steps, seconds=2.0):
  for step in steps:
    clock.now += seconds
    add(log, step)


def test_speed_leaves_the_first_step_out(clock):
  log = make_log()
  clock.now += 60  # compiling
  add(log, 1)
  walk(log, clock, [2, 3, 4])
  first, second = log.writer
  assert first["pairs_per_second"] == 4 / 2
  assert first["tokens_per_second"] == (TOKENS + 1) / 2  # of step 2 alone
  assert second["pairs_per_second"] == 8 / 4
  assert second["tokens_per_second"] == (2 * TOKENS + 2 + 3) / 4
  # 3 devices of 4 TFLOP/s, of which a step uses 6 TFLOP in 2 s.
  assert second["mfu"] == pytest.approx(6 / 2 / (3 * 4))


def test_a_new_shape_compiles_and_is_not_timed(clock):
  log = make_log(rows=[1, 1, 1, 2, 1, 2, 1, 3])
  walk(log, clock, [1, 2])
  clock.now += 60  # step 4 is launched before the metrics of step 3 are read
  walk(log, clock, [3, 4])
  walk(log, clock, [5, 6])
  clock.now += 60
  walk(log, clock, [7])
  clock.now += 60  # or, where the step before was read at once, after it
  walk(log, clock, [8])
  speeds = [row.get("pairs_per_second") for row in log.writer]
  assert speeds == [2.0, None, 2.0, None]


def test_waiting_for_data_is_a_share_of_the_steps_that_are_timed(clock):
  log = make_log()

  def batches():
    # The first beside compiling, the third right after a pause.
    for step, seconds in enumerate([30, 0.5, 0, 1], 1):
      clock.now += seconds
      yield step

  for step in log.waited_for(batches()):
    walk(log, clock, [step], seconds=[2, 1.5, 2, 1][step - 1])
    if step == 3:
      with log.untimed():
        clock.now += 100
  assert [row["data_wait"] for row in log.writer] == [0.5 / 2, 1 / 4]


def test_one_step_that_only_compiled_has_no_speed(clock):
  log = make_log()
  walk(log, clock, [2])
  (row,) = log.writer
  assert row.keys() & CLOCKED == {"goodput"}
  assert row["goodput"] == 0.0


def test_mfu_is_left_out_where_the_peak_is_not_known(clock):
  log = make_log(peak_tflops=0.0)  # a CPU
  walk(log, clock, [1, 2])
  assert "mfu" not in log.writer[0]
  assert "pairs_per_second" in log.writer[0]


def test_goodput_is_the_share_of_time_in_steps_that_were_applied(clock):
  log = make_log(started=clock.now - 4)  # building took 4 s
  walk(log, clock, [1, 2])  # 2 s compile, 2 s count
  assert log.writer[0]["goodput"] == pytest.approx(2 / 8)
  with log.untimed():
    clock.now += 10
  walk(log, clock, [3])
  clock.now += 2
  add(log, 4, skipped=1.0)
  assert log.writer[1]["goodput"] == pytest.approx(4 / 22)
  assert log.writer[1]["pairs_per_second"] == 8 / 4  # evaluation left out


def test_a_resumed_run_writes_the_same_rows_and_counts_all_its_time(clock):
  whole = make_log()
  walk(whole, clock, range(1, 7))
  first = make_log()
  walk(first, clock, [1, 2, 3])
  kept = json.loads(json.dumps(first.pending()))
  walk(first, clock, [4, 5])  # lost: not in the checkpoint
  clock.now += 90
  second = make_log()
  second.restore(kept)
  walk(second, clock, [4, 5, 6])
  rows = first.writer[:1] + second.writer

  def fixed(rows):
    return [{k: v for k, v in r.items() if k not in CLOCKED} for r in rows]

  assert fixed(rows) == fixed(whole.writer)
  # Steps 2 and 3 before, 5 and 6 after; 10 s, 90 s and 6 s in all.
  assert rows[-1]["goodput"] == pytest.approx(8 / 106)
  assert whole.writer[-1]["goodput"] == pytest.approx(10 / 12)


def test_memory_is_that_of_the_fullest_device(clock, monkeypatch):
  def device(**stats):
    return SimpleNamespace(memory_stats=lambda: stats or None)

  devices = [device(peak_bytes_in_use=5), device(peak_bytes_in_use=9), device()]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  log = make_log()
  walk(log, clock, [1, 2])
  assert log.writer[0]["peak_memory_bytes"] == 9
  monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
  assert step_log.peak_memory() is None


def test_steps_in_a_row_that_are_not_finite_end_the_run(clock):
  log = make_log(max_skipped=2)
  add(log, 1, skipped=1.0)
  add(log, 2)
  add(log, 3, skipped=1.0)
  with pytest.raises(UserError, match="2 steps in a row, up to step 4"):
    add(log, 4, skipped=1.0)


def test_rows_are_due_every_so_often_and_at_the_end(clock):
  log = make_log()
  walk(log, clock, range(1, STEPS + 1))
  assert [row["step"] for row in log.writer] == [2, 4, 6, 8]
  assert log.writer[1]["loss"] == 3.5
  assert log.writer[1]["learning_rate"] == 1.5
  last = make_log()
  last._run.steps = 3
  walk(last, clock, [1, 2, 3])
  assert [row["step"] for row in last.writer] == [2, 3]


def test_a_summary_has_medians_the_last_goodput_and_the_highest_memory():
  rows = [
    {"step": step, "mfu": mfu, "goodput": step / 10, "peak_memory_bytes": 9 - i}
    for i, (step, mfu) in enumerate([(1, 0.1), (2, 0.5), (3, 0.3)])
  ]
  assert metrics.speed([{"loss": 1.0}, *rows]) == {
    "mfu": 0.3,
    "goodput": 0.3,
    "peak_memory_bytes": 9.0,
  }
  assert metrics.speed([{"loss": 1.0}]) is None
