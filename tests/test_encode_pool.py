"""Rows encoded by many processes are those of one, and so are the errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.data import encode_pool
from dpo_jax.data.encode_pool import encode_rows
from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.sources import scan_rows
from dpo_jax.data.tokenizer import ByteTokenizer
from dpo_jax.errors import DataError

BYTES = ByteTokenizer()
SETTINGS = EncodeSettings(max_length=48)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Chunks of five rows, so that few rows are many chunks."""
  monkeypatch.setattr(encode_pool, "CHUNK", 5)
  monkeypatch.setattr(encode_pool, "_ALONE", 2)


def write(path, n=60):
  """Pairs of three subsets, cut ones, repeated ones, and rows of no use."""
  odd = {
    7: "{", 23: "[]", 31: '{"prompt": "p", "chosen": "a", "rejected": "a"}',
    44: '{"x": 1}', 52: '{"prompt": "p", "completion": "c", "label": true}',
  }  # fmt: skip
  lines = [
    odd.get(i)
    or json.dumps(
      {
        "prompt": f"p{i} " * (i % 17),
        "chosen": "é" * (i % 40 + 1),
        "rejected": f"r{i}",
        "subset": "cab"[i // 20],
        "margin": i / 8,
      }
    )
    for i in range(n)
  ]
  path.write_text("\n".join(lines))
  return str(path)


def encoded(source, workers, settings=SETTINGS, progress=None):
  items = scan_rows(source)
  return encode_rows(items, BYTES, settings, progress, workers=workers)


def test_many_processes_give_the_same_bits_in_the_same_order(tmp_path):
  source, told = write(tmp_path / "a.jsonl"), []
  alone = encoded(source, 1)
  many = encoded(source, 2, progress=told.append)
  for field in dataclasses.fields(alone):
    assert getattr(many, field.name) == getattr(alone, field.name), field.name
  assert list(many.first_dropped) == list(alone.first_dropped)
  assert many.rows == 60 and len(many) == 55
  assert told == list(range(5, 61, 5))


def test_few_rows_start_no_process(tmp_path, monkeypatch):
  monkeypatch.setattr(encode_pool.futures, "ProcessPoolExecutor", None)
  assert len(encoded(write(tmp_path / "a.jsonl", 7), 4)) == 7
  assert len(encoded(write(tmp_path / "b.jsonl", 10), 4)) == 9
  assert len(encoded(write(tmp_path / "c.jsonl"), 1)) == 55


def test_the_first_bad_row_of_a_worker_is_named_by_file_and_line(tmp_path):
  source = write(tmp_path / "a.jsonl")
  lines = (tmp_path / "a.jsonl").read_text().split("\n")
  for good in (7, 23):
    lines[good] = lines[0]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  strict = EncodeSettings(max_length=48, on_bad_row="error")
  messages = []
  for workers in (1, 2):
    with pytest.raises(DataError) as caught:
      encoded(source, workers, strict)
    messages.append(str(caught.value))
  assert messages[0] == messages[1]
  assert messages[0].startswith(f"{source}:32: chosen equals rejected")


def test_rows_before_damage_are_looked_at_before_it_is_told(tmp_path):
  source = write(tmp_path / "a.jsonl")

  def cut(after):
    for number, item in enumerate(scan_rows(source)):
      if number == after:
        raise DataError(f"{source}: cannot be read (cut)")
      yield item

  strict = EncodeSettings(max_length=48, on_bad_row="error")
  for settings, message in ((strict, "a.jsonl:8: "), (SETTINGS, "(cut)")):
    for workers in (1, 2):
      with pytest.raises(DataError) as caught:
        encode_rows(cut(33), BYTES, settings, workers=workers)
      assert message in str(caught.value)


def test_what_breaks_in_a_worker_names_the_rows(tmp_path):
  source = write(tmp_path / "a.jsonl")
  items = list(scan_rows(source))
  items[37] = items[37][:1]  # no row, which the package does not expect
  with pytest.raises(ValueError) as caught:
    encode_rows(items, BYTES, SETTINGS, workers=2)
  assert f"while encoding {source}:36 to {source}:40" in caught.value.__notes__


PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
print("main", flush=True)  # once: workers do not run the program
from test_encode_pool import *
encode_pool.CHUNK, encode_pool._ALONE = 5, 1
def rows():
  for i in range(60):
    yield f"f:{{i}}", {{"prompt": "p", "chosen": f"a{{i}}", "rejected": "b"}}
    if i == 40 and {stay}:
      print("there", flush=True)
      time.sleep(60)
print(len(encode_rows(rows(), BYTES, SETTINGS, workers=2)), flush=True)
"""


def program(tmp_path, stay):
  path = tmp_path / "program.py"
  tests = os.path.dirname(__file__)
  root = os.path.dirname(tests)
  path.write_text(PROGRAM.format(root=root, tests=tests, stay=stay))
  return subprocess.Popen(
    [sys.executable, str(path)], stdout=subprocess.PIPE, text=True
  )


def test_a_program_without_a_guard_is_not_run_again(tmp_path):
  out, _ = program(tmp_path, stay=False).communicate(timeout=60)
  assert out.split() == ["main", "60"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_who_started_them(tmp_path):
  run = program(tmp_path, stay=True)
  assert [run.stdout.readline().strip() for _ in range(2)] == ["main", "there"]
  deadline = time.monotonic() + 30
  while not (workers := _workers(run.pid)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert workers
  run.send_signal(signal.SIGKILL)
  run.wait()
  while any(map(_runs, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(_runs, workers))


def _workers(pid):
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    children = [int(x) for x in file.read().split()]
  return [x for x in children if "spawn_main" in _command(x)]


def _command(pid):
  try:
    with open(f"/proc/{pid}/cmdline") as file:
      return file.read()
  except OSError:
    return ""


def _runs(pid):
  return "spawn_main" in _command(pid)
