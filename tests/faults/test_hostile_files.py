"""Files and settings that mean harm end in errors of the program's own: soon,
within a GiB, and with nothing written elsewhere. See `hostile.py`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.data import sources
from dpo_jax.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "faults" / "hostile.py"
# What is fed; cases; the least of them to be taken and to be refused, since a
# fuzz that only ever fails, or never, tests little.
GROUPS = {
  "lines": (500, 500, 0),  # 5000 lines, of which those that are bad are dropped
  "bombs": (6, 2, 4),
  "templates": (40, 0, 40),
  "files": (3, 3, 0),  # 2000 of weights, hundreds of indices, 1000 tokenizers
  "model_configs": (800, 50, 500),
  "overrides": (500, 20, 300),
}


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_input_is_refused_in_time_and_memory(tmp_path, group):
  done = subprocess.run(
    [sys.executable, str(DRIVER), group, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    errors="replace",
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  cases, taken, refused = GROUPS[group]
  assert found["cases"] >= cases
  assert found["taken"] >= taken and found["refused"] >= refused
  assert found["slowest"] < 5 or group == "files"
  assert found["peak_mib"] < 1024


def test_a_line_that_is_too_long_is_named_and_the_next_one_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, "MAX_LINE", 1 << 20)
  path = tmp_path / "a.jsonl"
  long = json.dumps({"a": "x" * (3 << 20)})
  for size in (0, -1, 1):  # about the limit
    edge = '{"a": "' + "x" * ((1 << 20) - 10 + size) + '"}'
    path.write_text(f'{{"a": 1}}\n{long}\n{{"a": 2}}\n{edge}\n{{"a": 3}}')
    rows = [row for _, row in sources.scan_rows(str(path))]
    assert [isinstance(r, DataError) for r in rows] == [
      False, True, False, size > 0, False,
    ]  # fmt: skip
    assert str(rows[1]) == f"{path}:2: longer than 1 MiB"
    assert [rows[i]["a"] for i in (0, 2, 4)] == [1, 2, 3]


def test_a_json_that_is_too_long_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "MAX_WHOLE", 1 << 20)
  path = tmp_path / "a.json"
  path.write_text(json.dumps([{"a": "x" * (1 << 20)}]))
  with pytest.raises(DataError, match=r"more than 1 MiB; .*a \.jsonl file"):
    list(sources.scan_rows(str(path)))
