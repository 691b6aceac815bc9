"""Writers of the caches are killed at any time; readers never see the half."""

import json
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from dpo_jax import reference_cache
from dpo_jax.batch import Scores
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import ByteTokenizer

KILLS = 20
SHAPE = (20_000, 2)  # big enough to be caught while it is written

_WRITER = """
import itertools, logging, pathlib, sys
import numpy as np
from dpo_jax import reference_cache
from dpo_jax.batch import Scores
from dpo_jax.data import cache
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import ByteTokenizer
folder, source = sys.argv[1:]
logps = np.arange(40_000, dtype=np.float32).reshape(20_000, 2)
settings = EncodeSettings(max_length=64)
print("ready", flush=True)
while True:
  reference_cache.find_or_score(
    folder, "reference-a", (20_000, 2), lambda: Scores(logps, -logps))
  load_examples(source, "train", ByteTokenizer(), settings, folder)
  for path in pathlib.Path(folder).iterdir():
    if path.is_dir() and "part-" not in path.name:
      cache.remove(folder, path.name)
"""


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [
    {"prompt": f"p{i}", "chosen": "c" * (i % 9 + 1), "rejected": "r"}
    for i in range(300)
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


@pytest.mark.slow
def test_a_writer_killed_at_any_time_leaves_a_whole_entry_or_none(
  source, tmp_path
):
  folder = tmp_path / "cache"
  settings = EncodeSettings(max_length=64)
  wanted = load_examples(str(source), "train", ByteTokenizer(), settings)
  logps = np.arange(40_000, dtype=np.float32).reshape(SHAPE)
  rng = random.Random(0)
  left = 0
  for _ in range(KILLS):
    writer = subprocess.Popen(
      [sys.executable, "-c", _WRITER, str(folder), str(source)],
      stdout=subprocess.PIPE,
    )
    writer.stdout.readline()
    time.sleep(rng.uniform(0, 0.2))
    writer.kill()
    writer.communicate()
    left += any("part-" in p.name or ".lock" in p.name for p in _all(folder))
    found = reference_cache.find_or_score(
      str(folder), "reference-a", SHAPE, lambda: Scores(logps, -logps)
    )
    np.testing.assert_array_equal(found.logps, logps)
    np.testing.assert_array_equal(found.tails, -logps)
    again = load_examples(
      str(source), "train", ByteTokenizer(), settings, str(folder)
    )
    assert again.fingerprint == wanted.fingerprint
    np.testing.assert_array_equal(again.tokens, wanted.tokens)
    np.testing.assert_array_equal(again.lengths, wanted.lengths)
    names = [p.name for p in _all(folder)]
    assert len(names) == 2 and not any("." in name for name in names)
  assert left > KILLS // 4  # they were caught in the act


def _all(folder: pathlib.Path) -> list[pathlib.Path]:
  return list(folder.iterdir()) if folder.exists() else []
