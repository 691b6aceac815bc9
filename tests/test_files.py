"""Files are whole or not there, and a full disk is one sentence."""

import pytest

from dpo_jax.errors import DataError
from dpo_jax.files import write_whole


def full(descriptor):
  raise OSError(28, "No space left on device")


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_the_old_one(
  tmp_path, monkeypatch
):
  path = tmp_path / "summary.json"
  write_whole(path, "old")
  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(
    DataError, match=r"summary.json: cannot be written: No space left on device"
  ):
    write_whole(path, "new")
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
  assert path.read_text() == "old"


def test_text_that_utf8_cannot_carry_is_written_all_the_same(tmp_path):
  write_whole(tmp_path / "page", "a \ud800 b")
  assert (tmp_path / "page").read_text() == "a ? b"
  write_whole(tmp_path / "page", b"\x00\xff")
  assert (tmp_path / "page").read_bytes() == b"\x00\xff"
