"""What a person or a pod log sees while a run goes on."""

import io
import time

import pytest

from dpo_jax.progress import Progress, byte_bar, row_bar

VALUES = {
  "loss": 0.43118,
  "rewards/accuracies": 0.8125,
  "rewards/margins": 0.5,
  "grad_norm": 9.0,
}


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def run(total, start, seconds, **kwargs):
  clock, stream = Clock(), io.StringIO()
  progress = Progress(total, start, stream, clock=clock, **kwargs)
  for step in range(start + 1, total + 1):
    clock.now += seconds
    progress.update(step, VALUES)
  progress.close()
  return stream.getvalue().splitlines()


def test_a_plain_line_shows_the_key_numbers():
  values = VALUES | {"pairs_per_second": 12.08}
  clock, stream = Clock(), io.StringIO()
  progress = Progress(126, 39, stream, clock=clock)
  clock.now += 2
  progress.update(40, values)
  assert stream.getvalue() == (
    "step 40/126  loss 0.4312  rewards/accuracies 0.81"
    "  rewards/margins 0.500  12.1 pairs/s  eta 0:02:52\n"
  )


def test_lines_come_at_most_every_interval_and_first_and_last_always():
  lines = run(total=23, start=0, seconds=1.0, interval=10)
  steps = [int(line.split()[1].split("/")[0]) for line in lines]
  assert steps == [1, 11, 21, 23]


def test_the_last_line_is_not_repeated_by_close():
  assert len(run(total=2, start=0, seconds=20.0)) == 2


def test_the_last_step_is_shown_without_waiting_for_close():
  stream = io.StringIO()
  progress = Progress(3, 0, stream, clock=Clock())
  for step in (1, 2, 3):
    progress.update(step)
  assert stream.getvalue().splitlines()[-1].startswith("step 3/3")


def test_close_shows_the_step_a_run_stopped_at():
  stream = io.StringIO()
  with Progress(100, 0, stream, clock=Clock()) as progress:
    for step in range(1, 8):
      progress.update(step)
  lines = stream.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ["1/100", "7/100"]


def test_speed_counts_only_steps_of_this_process():
  clock, stream = Clock(), io.StringIO()
  progress = Progress(1000, 900, stream, clock=clock, batch_size=8)
  for step in range(901, 911):
    clock.now += 2.0
    progress.update(step)
  assert progress.steps_per_second() == pytest.approx(0.5)
  progress.close()
  last = stream.getvalue().splitlines()[-1]
  assert "4.0 pairs/s" in last
  assert "eta 0:03:00" in last


def test_the_first_step_with_its_compilation_does_not_spoil_the_estimate():
  clock = Clock()
  progress = Progress(100, 50, io.StringIO(), clock=clock)
  clock.now += 50.0
  progress.update(51)
  assert progress.steps_per_second() == pytest.approx(0.02)
  clock.now += 0.5
  progress.update(52)
  assert progress.steps_per_second() == pytest.approx(2.0)


def test_values_are_not_read_for_steps_that_are_not_shown():
  class Counted:
    reads = 0

    def __float__(self):
      Counted.reads += 1
      return 1.0

  progress = Progress(1000, 0, io.StringIO(), clock=Clock())
  for step in range(1, 500):
    progress.update(step, {"loss": Counted()})
  assert Counted.reads == 1


def test_a_terminal_gets_a_bar_that_starts_at_the_resumed_step():
  pytest.importorskip("tqdm")
  stream = Terminal()
  with Progress(126, 39, stream) as progress:
    progress.update(40, VALUES)
    progress.message("checkpoint saved")
  text = stream.getvalue()
  assert "\r" in text
  assert "step 39/126" in text
  assert "step 40/126" in text
  assert "loss 0.4312" in text
  assert "acc 0.81" in text
  assert "checkpoint saved\n" in text


def test_a_stream_that_went_away_does_not_stop_training():
  stream = io.StringIO()
  progress = Progress(10, 0, stream)
  stream.close()
  progress.update(1, VALUES)
  progress.close()


def test_bytes_are_a_bar_on_a_terminal_and_nothing_elsewhere():
  terminal, log = Terminal(), io.StringIO()
  for stream in (terminal, log):
    with byte_bar(3 * 2**30, "loading m", stream, delay=0) as advance:
      for _ in range(2):
        time.sleep(0.15)  # a bar is drawn at most every 0.1 s
        advance(2**30)
  assert "loading m" in terminal.getvalue()
  assert "2.00G/3.00G" in terminal.getvalue()
  assert log.getvalue() == ""


def test_rows_are_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere():
  terminal, log, clock = Terminal(), io.StringIO(), Clock()
  with row_bar("encoding", terminal, delay=0) as done:
    for rows in (1000, 2000):
      time.sleep(0.15)  # a bar is drawn at most every 0.1 s
      done(rows)
  assert "encoding: 2000 rows" in terminal.getvalue()
  with row_bar("encoding", log, clock=clock) as done:
    for rows in range(1000, 70_001, 1000):
      clock.now += 1
      done(rows)
  lines = log.getvalue().splitlines()
  assert lines == [
    "encoding: 30,000 rows, 1,000 a second",
    "encoding: 60,000 rows, 1,000 a second",
  ]


def test_bytes_that_take_no_time_show_nothing():
  stream = Terminal()
  with byte_bar(100, "loading m", stream) as advance:
    advance(100)
  assert "loading" not in stream.getvalue()
