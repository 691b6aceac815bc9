"""Output that nobody reads: work goes on, and a report just ends."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
_HEAD = """
import os, sys
from dpo_jax.errors import UserError
from dpo_jax.main import guard
from dpo_jax.processes import Stopped
"""


def status_of(code, tmp_path, unread=("stdout", "stderr"), **streams):
  """Exit status of a program, the readers of whose streams have left; and what
  the other one got."""
  ends = {name: os.pipe() for name in unread}
  for read, _ in ends.values():
    os.close(read)
  streams |= {name: write for name, (_, write) in ends.items()}
  for name in {"stdout", "stderr"} - streams.keys():
    streams[name] = (tmp_path / name).open("w")
  done = subprocess.run(
    [sys.executable, "-c", _HEAD + code],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    check=False, cwd=tmp_path, **streams,
  )  # fmt: skip
  for _, write in ends.values():
    os.close(write)
  return done.returncode


def test_work_is_done_to_its_end_where_nobody_reads_what_it_prints(tmp_path):
  code = """
with guard(goes_on=True):
  for _ in range(3):
    print("x" * 100_000)  # more than is buffered
    print("so far", file=sys.stderr)
  open("done", "w").close()
"""
  assert status_of(code, tmp_path) == 0
  assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
  ("error", "status"),
  [
    ("Stopped('stopped at step 3')", 75),
    ("UserError('no such file')", 2),
    ("BrokenPipeError('of a file system far away')", 1),
    ("SystemExit(3)", 3),
  ],
)
def test_nobody_reading_changes_no_exit_status(tmp_path, error, status):
  code = f"""
with guard(goes_on=True):
  print("begun")
  raise {error}
"""
  assert status_of(code, tmp_path) == status


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_report_that_is_not_read_to_its_end_ends_in_silence(tmp_path, size):
  code = f"""
with guard():
  print("x" * {size})
"""
  assert status_of(code, tmp_path, unread=["stdout"]) == 0
  assert (tmp_path / "stderr").read_text() == ""


def test_a_broken_pipe_that_is_not_the_reports_own_is_an_error(tmp_path):
  code = """
with guard():
  raise BrokenPipeError("of a file system far away")
"""
  assert status_of(code, tmp_path, unread=[]) == 1
  assert "far away" in (tmp_path / "stderr").read_text()


@pytest.mark.skipif(
  not pathlib.Path("/dev/full").exists(), reason="needs /dev/full"
)
def test_a_full_disk_below_the_log_changes_no_exit_status(tmp_path):
  code = """
with guard(goes_on=True):
  print("begun")
  raise Stopped("stopped at step 3")
"""
  with open("/dev/full", "w") as full:
    status = status_of(code, tmp_path, unread=[], stdout=full, stderr=full)
  assert status == 75


def test_a_standard_output_that_was_closed_is_no_trouble(tmp_path):
  code = """
sys.stdout = sys.stderr = None  # as Python has it after `>&- 2>&-`
with guard(goes_on=True):
  print("begun")
  raise Stopped("stopped at step 3")
"""
  assert status_of(code, tmp_path, unread=[]) == 75


def test_a_library_that_logs_is_heard_once(tmp_path):
  code = """
from absl import app, logging
def main(argv):
  logging.error("saving failed")
with guard(goes_on=True):
  app.run(main)
"""
  assert status_of(code, tmp_path, unread=[]) == 0
  assert (tmp_path / "stderr").read_text().count("saving failed") == 1
