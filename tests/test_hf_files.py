"""Thousands of damaged files: each is read as it is, or refused in one line."""

import json
import time

import numpy as np
import pytest
import safetensors.numpy
from hf_cases import random_folder, refused

from dpo_jax.errors import CheckpointError
from dpo_jax.models.hf_files import INDEX, SINGLE, Folder


def small():
  """(header as an object, the bytes behind it)."""
  tensors = {
    f"model.layers.{i}.w": np.arange(6, dtype=np.float32).reshape(2, 3) + i
    for i in range(4)
  }
  data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  size = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def pack(header, body, size=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (
    (len(text) if size is None else size).to_bytes(8, "little") + text + body
  )


ODD = (
  -1, 0, 1, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308, None,
  True, "", "0", "\u0000", "F8_E4M3", "I8", "I64", "BOOL", "f32", "F33", "U8",
  "BF16", "F16", "F64", "C64", [], {}, [0], [0, 0], [24, 0], [0, 25], [-24, 0],
  [2**62, 4], [2, 3, 2**62], [0, 2**64 - 1], [[0, 24]], ["0", "24"],
  [0, 24, 48],
)  # fmt: skip


def damaged(rng, header, body):
  """One seeded mutation of a file."""
  names = [name for name in header if name != "__metadata__"]
  name = names[rng.integers(len(names))]
  odd = ODD[rng.integers(len(ODD))]
  kind = rng.integers(9)
  if kind == 0:  # cut
    data = pack(header, body)
    return data[: rng.integers(len(data))]
  if kind == 1:  # a length that lies
    size = [0, 1, 2**31, 2**62, 2**64 - 1, 10**8, int(rng.integers(1000))]
    return pack(header, body, size[rng.integers(len(size))])
  if kind == 2:  # any byte
    data = bytearray(pack(header, body))
    for _ in range(rng.integers(1, 4)):
      data[rng.integers(len(data) - len(body))] = rng.integers(256)
    return bytes(data)
  if kind == 3:  # a field that is something else
    field = ("dtype", "shape", "data_offsets")[rng.integers(3)]
    return pack(header | {name: header[name] | {field: odd}}, body)
  if kind == 4:  # a field that is missing, or one too many
    about = dict(header[name])
    about.pop(list(about)[rng.integers(len(about))])
    return pack(header | {name: about if rng.integers(2) else odd}, body)
  if kind == 5:  # two tensors at one place, or a gap
    move = int(rng.integers(-24, 25))
    begin, end = header[name]["data_offsets"]
    moved = header[name] | {"data_offsets": [begin + move, end + move]}
    return pack(header | {name: moved}, body)
  if kind == 6:  # a name twice
    text = json.dumps(header).encode()
    other = names[rng.integers(len(names))]
    return pack(text.replace(other.encode(), name.encode()), body)
  if kind == 7:  # no object, or none that ends
    texts = (
      b"", b"[]", b"null", b"3", b"{", b"[" * 10**5, b'{"a":' * 10**4,
      b"\xff\xfe{}", b'{"\xff": {}}', json.dumps(odd).encode(),
    )  # fmt: skip
    return pack(texts[rng.integers(len(texts))], body)
  meta = header | {"__metadata__": odd}
  extra = bytes(int(rng.integers(0, 3)))
  return pack(meta if rng.integers(2) else header, body + extra)


def test_two_thousand_damaged_files_are_read_as_they_stand_or_refused(tmp_path):
  header, body = small()
  rng = np.random.default_rng(19)
  file = tmp_path / SINGLE
  ended = {"read": 0, "refused": 0}
  slowest = 0.0
  for _ in range(2000):
    data = damaged(rng, header, body)
    file.write_bytes(data)
    begun = time.perf_counter()
    try:
      folder = Folder(tmp_path)
      for name, stored in folder.tensors.items():
        array = folder.view(name).copy()
        # Whatever is read lies inside the file, behind its header.
        size = int.from_bytes(data[:8], "little")
        assert 8 + size <= stored.begin <= stored.end <= len(data)
        assert array.tobytes() == data[stored.begin : stored.end]
        folder.forget(name)
      ended["read"] += 1
    except CheckpointError as e:
      assert "\n" not in str(e) and str(tmp_path) in str(e)
      assert len(str(e)) < 1000
      ended["refused"] += 1
    slowest = max(slowest, time.perf_counter() - begun)
  assert slowest < 5
  # Both ends are met: a fuzz that only ever fails, or never, tests little.
  assert ended["refused"] > 1000 and ended["read"] > 50


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_a_type_that_is_no_float_is_named(kind, tmp_path):
  about = {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}
  (tmp_path / SINGLE).write_bytes(pack({"w": about}, bytes(4)))
  with pytest.raises(CheckpointError, match=f"w is of type {kind}.*BF16"):
    Folder(tmp_path).view("w")


def test_a_name_that_stands_twice_is_refused(tmp_path):
  about = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
  text = b'{"w": ' + about + b', "w": ' + about + b"}"
  (tmp_path / SINGLE).write_bytes(pack(text, bytes(4)))
  with pytest.raises(CheckpointError, match="cannot read weights"):
    Folder(tmp_path)


def test_hundreds_of_damaged_indices_are_refused_or_read(tmp_path):
  random_folder(tmp_path / "m")
  names = list(Folder(tmp_path / "m").tensors)
  rng = np.random.default_rng(23)
  odd = (*ODD, "../model.safetensors", "/etc/passwd", "..", ".", "config.json",
         "none.safetensors", "a/../model.safetensors", "x" * 5000)  # fmt: skip
  good = {"weight_map": dict.fromkeys(names, SINGLE)}
  file = tmp_path / "m" / INDEX
  refusals = 0
  for _ in range(300):
    value = odd[rng.integers(len(odd))]
    map_ = good["weight_map"]
    name = names[rng.integers(len(names))]
    index = (
      {"weight_map": map_ | {name: value}},
      {"weight_map": map_ | {"other": SINGLE}},
      {"weight_map": value},
      {"weight_map": {str(value): SINGLE}},
      value,
    )[rng.integers(5)]
    text = json.dumps(index).encode()
    if rng.integers(4) == 0:
      text = text[: rng.integers(len(text))]
    file.write_bytes(text)
    try:
      Folder(tmp_path / "m")
    except CheckpointError as e:
      assert "\n" not in str(e) and str(file.parent) in str(e)
      assert len(str(e)) < 1000
      refusals += 1
  assert refusals > 250
  file.write_text(json.dumps(good))
  Folder(tmp_path / "m")


def test_a_file_that_ends_while_it_is_named_whole_is_refused(tmp_path):
  random_folder(tmp_path / "m")
  file = tmp_path / "m" / SINGLE
  file.write_bytes(file.read_bytes()[:-1])
  refused(tmp_path / "m", "cannot read weights")
