"""Rows come out as they went in, or an error says where they could not."""

import gzip
import itertools
import json
import pathlib
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from dpo_jax.data.sources import read_rows, scan_rows, source_digest
from dpo_jax.errors import DataError

ROWS = [{"prompt": f"p{i}", "n": i, "é": [None, True]} for i in range(10)]


def lines_of(rows):
  return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path, data):
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return str(path)


def refusal(source, split="train"):
  with pytest.raises(DataError) as caught:
    list(read_rows(source, split))
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_json_lines_are_read_with_their_line_numbers(tmp_path, name):
  data = b"\xef\xbb\xbf" + lines_of(ROWS[:2]) + b"\n\r\n" + lines_of(ROWS[2:])
  source = write(tmp_path / name, data)
  places, rows = zip(*read_rows(source))
  assert list(rows) == ROWS
  assert places[:3] == (f"{source}:1", f"{source}:2", f"{source}:5")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_list_is_read_with_its_row_numbers(tmp_path, name):
  source = write(tmp_path / name, json.dumps(ROWS, indent=1).encode())
  assert list(read_rows(source)) == [
    (f"{source}[{i}]", row) for i, row in enumerate(ROWS)
  ]


def test_parquet_rows_equal_what_was_written(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "a.parquet"
  rows = [{"prompt": "é", "chosen": [{"role": "a", "content": "b"}]}] * 3
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  assert [row for _, row in read_rows(str(path))] == rows
  path.write_bytes(b"PAR1 and nothing more")
  assert "not a readable .parquet" in refusal(str(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  source = write(tmp_path / "a.parquet", b"")
  assert "pip install 'dpo-jax[parquet]'" in refusal(source)


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    (b'{"a": 1', "not a JSON object"),
    (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": -Infinity}', "-Infinity is not JSON"),
    (b"[1]", "expected a JSON object, found a list"),
    (b"null", "expected a JSON object, found null"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    (b'\xef\xbb\xbf{"a": 1}', "not a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON object"),
  ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, expected):
  source = write(tmp_path / "a.jsonl", lines_of(ROWS[:3]) + line)
  message = refusal(source)
  assert message.startswith(f"{source}:4: ")
  assert expected in message


def test_scanning_goes_on_after_a_bad_line(tmp_path):
  data = lines_of(ROWS[:1]) + b"oh\n" + lines_of(ROWS[1:2])
  source = write(tmp_path / "a.jsonl", data)
  kinds = [isinstance(row, dict) for _, row in scan_rows(source)]
  assert kinds == [True, False, True]


@pytest.mark.parametrize(
  ("name", "data", "expected"),
  [
    ("a.json", b'[{"a": 1},\n {"a" 2}]', "a.json:2: not JSON"),
    ("a.json", b'[{"a": NaN}]', "NaN is not JSON"),
    ("a.json", b'{"a": 1}', "expected a list of objects, found an object"),
    ("a.json", b"[1]", "a.json[0]: expected an object, found a number"),
    ("a.json", b"\xff", "not UTF-8 at byte 0"),
    ("a.json", b"[]", "no rows"),
    ("a.jsonl", b"\n\n", "no rows"),
    ("a.csv", b"a,b\n", "unknown kind of file; expected .jsonl"),
  ],
)
def test_a_bad_file_is_named(tmp_path, name, data, expected):
  assert expected in refusal(write(tmp_path / name, data))


def test_a_cut_or_false_gzip_is_named(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(lines_of(ROWS * 100))[:-20])
  assert refusal(str(path)).startswith(f"{path}: cannot be read")
  path.write_bytes(lines_of(ROWS))
  assert refusal(str(path)).startswith(f"{path}: cannot be read")


def test_a_missing_source_is_named_without_asking_the_network(tmp_path):
  assert refusal(str(tmp_path / "no.jsonl")).endswith("no.jsonl: no such file")
  assert "no such file, directory or TFDS dataset" in refusal("./no/where")
  assert "no such file, directory or TFDS dataset" in refusal("no_such_data")
  assert "without dataset_info.json" in refusal(str(tmp_path))


def test_a_directory_with_a_false_dataset_info_is_refused(tmp_path):
  (tmp_path / "dataset_info.json").write_text("{")
  assert "TFDS cannot read it" in refusal(str(tmp_path))


@pytest.mark.parametrize(
  ("split", "expected"),
  [
    ("train", range(10)),
    ("train[3:]", range(3, 10)),
    ("train[:3]", range(3)),
    ("train[2:5]", range(2, 5)),
    ("train[-2:]", range(8, 10)),
    ("train[:-8]", range(2)),
    ("train[:25%]", range(2)),
    ("train[25%:]", range(2, 10)),
    ("train[-30%:]", range(7, 10)),
  ],
)
def test_a_file_is_sliced_as_a_split_is(tmp_path, split, expected):
  source = write(tmp_path / "a.jsonl", lines_of(ROWS))
  assert [row["n"] for _, row in read_rows(source, split)] == list(expected)


@pytest.mark.parametrize("split", ["test", "train[", "train[1]", "", "train+x"])
def test_an_unknown_split_of_a_file_names_the_known_one(tmp_path, split):
  source = write(tmp_path / "a.jsonl", lines_of(ROWS))
  assert "one split, 'train'" in refusal(source, split)


def test_the_digest_of_a_file_follows_its_bytes(tmp_path):
  source = write(tmp_path / "a.jsonl", lines_of(ROWS))
  before = source_digest(source)
  assert source_digest(source) == before
  write(tmp_path / "a.jsonl", lines_of(ROWS[::-1]))
  assert source_digest(source) != before
  with pytest.raises(DataError, match="no such file"):
    source_digest(str(tmp_path / "no.jsonl"))


@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  st.lists(
    st.one_of(
      st.binary(max_size=40),
      st.text(alphabet='{}[]":,0aé\\u\ud800 \n', max_size=30).map(
        lambda text: text.encode("utf-8", "surrogatepass")
      ),
      st.dictionaries(st.text(max_size=3), st.integers(), max_size=2).map(
        lambda row: json.dumps(row).encode()
      ),
    ),
    max_size=5,
  ),
  st.sampled_from(["f.jsonl", "f.json", "f.jsonl.gz"]),
)
def test_any_bytes_give_rows_or_a_data_error(tmp_path, pieces, name):
  path = tmp_path / name
  path.write_bytes(b"\n".join(pieces))
  try:
    rows = [row for _, row in itertools.islice(read_rows(str(path)), 50)]
    assert all(isinstance(row, dict) for row in rows)
  except DataError as error:
    assert str(error).startswith(str(path))


@needs_shared
def test_the_shared_files_hold_the_rows_they_should():
  counts = {
    "hh_harmless/raw_test.jsonl.gz": 2312,
    "hh_harmless/pairs.jsonl.gz": 2312,
    "tone_pairs/raw.json": 1100,
    "chat_demo/raw_kto_en_demo.json.gz": 300,
  }
  for name, count in counts.items():
    source = str(pathlib.Path(SHARED) / "data" / name)
    assert sum(1 for _ in read_rows(source)) == count
