"""Hostile input, fed in a process of its own with a limit on memory and on the
time of each case: `python hostile.py GROUP FOLDER` prints what became of it.

An error that is not of the program's own kinds, a case beyond its time, or a
write outside of the folder ends the process with a traceback.
"""

import gzip
import inspect
import json
import os
import pathlib
import random
import resource
import signal
import sys
import time

GIBIBYTE = 1 << 30
SECONDS = 5
ROOT = pathlib.Path(__file__).resolve().parents[2]


class TooLong(BaseException):
  """Not an Exception, so that nobody takes it for bad input."""


def limit() -> None:
  """From here on a GiB more than what the imports took, and no more."""
  now = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  most = now * resource.getpagesize() + GIBIBYTE
  resource.setrlimit(resource.RLIMIT_AS, (most, most))

  def over(*_):
    raise TooLong

  signal.signal(signal.SIGALRM, over)


def guard(folder: str) -> None:
  """Nothing is written elsewhere, nothing is run, nobody is called."""

  def hook(event, args):
    if event == "open":
      path, mode, flags = args
      writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      if writes or any(c in str(mode or "") for c in "wax+"):
        _inside(path, folder)
    elif event in ("os.mkdir", "os.remove", "os.rename", "shutil.rmtree"):
      _inside(args[0], folder)
    elif event in _NEVER:
      raise AssertionError(f"{event} {args}")

  sys.addaudithook(hook)


_NEVER = (
  "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system",
  "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class",
  "marshal.loads.untrusted",
)  # fmt: skip


def _inside(path, folder):
  if isinstance(path, int) or str(path) == os.devnull:
    return
  real = os.path.realpath(os.fsdecode(path))
  if not real.startswith((folder, "/proc/self")):
    raise AssertionError(f"a write outside: {real}")


def feed(cases, run, own) -> dict:
  """Counts of what was taken and what was refused by its own errors."""
  ended = {"cases": 0, "taken": 0, "refused": 0, "slowest": 0.0}
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for case in cases:
    begun = time.perf_counter()
    signal.alarm(SECONDS)
    try:
      run(case)
      ended["taken"] += 1
    except own as e:
      assert "\n" not in str(e) and len(str(e)) < 5000, e
      ended["refused"] += 1
    except BaseException:
      print(f"case {ended['cases']}: {case!r:.2000}", file=sys.stderr)
      raise
    finally:
      signal.alarm(0)
    ended["cases"] += 1
    ended["slowest"] = max(ended["slowest"], time.perf_counter() - begun)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  return ended | {"peak_mib": peak >> 10}


ODD = [
  None, True, False, 0, -1, 1.5, 1e308, 10**30, "", " ", "x", "\ud800", "\0",
  "../../../etc/passwd", "<|eos|>", "é" * 500, [], {}, [None], [[[]]],
  {"role": "user"}, {"role": 1, "content": []}, [{"role": "a", "content": "b"}],
]  # fmt: skip
TEXT = [
  b"{", b"}", b"[", b'"', b"\\u", b"\\ud800", b"\xff", b"\0", b",", b":",
  b"NaN", b"1e999", b"null", b"9" * 400, b"\n", b"\r", b"\xef\xbb\xbf",
]  # fmt: skip


def lines(folder):
  """5000 random lines, ten to a file, with a good one before them."""
  from dpo_jax.data.encode import EncodeSettings
  from dpo_jax.data.store import load_examples
  from dpo_jax.data.tokenizer import ByteTokenizer
  from dpo_jax.errors import DataError

  rng, tokenizer = random.Random(0), ByteTokenizer()
  good = {
    "paired": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "unpaired": {"prompt": "p", "completion": "a", "label": True},
    "ranked": {"prompt": "p", "responses": ["a", "b", "c"]},
    "sft": {"messages": [{"role": "user", "content": "q"},
                         {"role": "assistant", "content": "a"}]},
  }  # fmt: skip
  keys = sorted({key for row in good.values() for key in row} | {
    "conversations", "scores", "subset", "instruction", "output"})  # fmt: skip

  def line(row):
    row, how = dict(row), rng.randrange(4)
    if how == 0:  # other values, other keys
      for _ in range(rng.randint(1, 3)):
        row[rng.choice(keys)] = rng.choice(ODD)
      return json.dumps(row).encode()
    if how == 1:  # no object
      return json.dumps(rng.choice(ODD)).encode()
    if how == 2:  # bytes of any kind
      return rng.randbytes(rng.randrange(80)).replace(b"\n", b"")
    data = bytearray(json.dumps(row).encode())
    for _ in range(rng.randint(1, 4)):
      at = rng.randrange(len(data))
      data[at : at + rng.randrange(4)] = rng.choice(TEXT)
    return bytes(data).replace(b"\n", b" ")

  def cases():
    for kind in list(good) * 125:
      rows = [json.dumps(good[kind]).encode()]
      rows += [line(good[kind]) for _ in range(10)]
      yield kind, b"\n".join(rows)

  def run(case):
    kind, data = case
    path = pathlib.Path(folder) / "rows.jsonl"
    path.write_bytes(data)
    settings = EncodeSettings(max_length=64, kind=kind)
    examples = load_examples(str(path), "train", tokenizer, settings)
    assert (examples.lengths[:, 0] > 0).all()

  limit(), guard(folder)
  return feed(cases(), run, DataError)


def bombs(folder):
  """Small files that stand for large ones."""
  from dpo_jax.data.sources import scan_rows
  from dpo_jax.errors import DataError

  block = gzip.compress(bytes(16 << 20), 1)
  digits = gzip.compress(b"9" * (16 << 20), 1)
  objects = gzip.compress(b"[{}," + b"{}," * (4 << 20), 1)
  row, end = gzip.compress(b'{"a": 1}\n'), gzip.compress(b"\n")
  bomb = {
    "a line of 640 MiB.jsonl.gz": row + digits * 40 + end + row,
    "a line of 4 GiB.jsonl.gz": row + block * 256,
    "4 GiB in one piece.json.gz": block * 256,
    "many objects in a line.jsonl.gz": row + objects + end + row,
    "deep.json.gz": gzip.compress(b"[" * (8 << 20)),
    "a long number.json.gz": gzip.compress(b"[" + b"9" * (8 << 20) + b"]"),
  }  # fmt: skip
  for name, data in bomb.items():
    (pathlib.Path(folder) / name).write_bytes(data)

  def run(name):
    rows = [r for _, r in scan_rows(str(pathlib.Path(folder) / name))]
    # What cannot be used is named, and what follows it read.
    assert [isinstance(r, DataError) for r in rows] == [False, True, False]

  limit(), guard(folder)
  return feed(bomb, run, DataError)


def templates(folder):
  from test_chat import HOSTILE, MESSAGES

  from dpo_jax.data.chat import render
  from dpo_jax.errors import DataError

  def run(template):
    render(template, MESSAGES, {}, True)

  limit(), guard(folder)
  return feed(HOSTILE.values(), run, DataError)


def files(folder):
  """The fuzzers of weights, indices and tokenizers, within the same limits."""
  import jax
  import test_hf_files as weights
  import test_tokenizer_damage as tokenizers

  some = [
    weights.test_two_thousand_damaged_files_are_read_as_they_stand_or_refused,
    weights.test_hundreds_of_damaged_indices_are_refused_or_read,
    tokenizers.test_a_damaged_tokenizer_file_is_a_data_error,
  ]

  def run(test):
    signal.alarm(0)  # thousands of cases, which look at their time themselves
    wants = inspect.signature(test).parameters
    test(*[pathlib.Path(folder)] * ("tmp_path" in wants))

  # The threads of the backend reserve a GiB of addresses and use little of it.
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  limit(), guard(folder)
  return feed(some, run, ())


def model_configs(folder):
  """500 `config.json` of models, and 300 of adapters."""
  from dpo_jax.errors import CheckpointError
  from dpo_jax.models import hf, peft

  rng, path = random.Random(1), pathlib.Path(folder)
  model = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu",
    "max_position_embeddings": 64, "attention_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                     "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
  }  # fmt: skip
  adapter = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
    "use_rslora": False, "target_modules": ["q_proj"],
  }  # fmt: skip
  families = list(hf.FAMILIES)

  def change(values):
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
      inside = values
      key = rng.choice(sorted(inside))
      if isinstance(inside[key], dict) and inside[key] and rng.random() < 0.7:
        inside, key = inside[key], rng.choice(sorted(inside[key]))
      if rng.random() < 0.15 and len(inside) > 1:
        inside.pop(key)
      else:
        inside[key] = rng.choice([*ODD, 10**12, -8, 3, 1e-320, "llama3"])
    return values

  def cases():
    for _ in range(500):
      kind = model | {"model_type": rng.choice(families)}
      yield "config.json", change(kind), hf.read_config
    for _ in range(300):
      yield "adapter_config.json", change(adapter), peft.read_config

  def run(case):
    name, values, read = case
    (path / name).write_text(json.dumps(values))
    read(folder)

  limit(), guard(folder)
  return feed(cases(), run, CheckpointError)


def overrides(folder):
  """500 command lines: settings that exist, values that should not."""
  from absl import flags
  from ml_collections import config_flags

  from dpo_jax import main
  from dpo_jax.build import build
  from dpo_jax.config import Config, flatten
  from dpo_jax.errors import UserError

  rng = random.Random(2)
  keys = [*flatten(Config().to_dict()), "loss.beta", "loss.label_smoothing"]
  odd = [
    "", " ", "nan", "inf", "-inf", "-1", "0", "1e999", "9" * 400, "1e-400",
    "True", "None", "x", "../../x", "/dev/null", "\0", "\ud83d", "'", '"', "[",
    "{}", "__import__('os').system('x')", "${HOME}", "%s%n", "dpo+", "dpo*dpo",
    "0.5*dpo(beta=)", "dpo(" * 50, "(" * 1500, "1_0", "0x10", "4294967296", "é",
    "a=b", "=", "llama", "bfloat16", "2", "7", "0.5",
  ]  # fmt: skip
  os.chdir(folder)

  def cases():
    for _ in range(500):
      chosen = []
      for _ in range(rng.randint(1, 3)):
        key = rng.choice(keys if rng.random() < 0.9 else odd)
        chosen.append(f"--config.{key}={rng.choice(odd)}")
      yield chosen

  real = flags.FLAGS

  def run(arguments):
    # Flags of its own each time: those of the process are parsed once.
    flags.FLAGS = flags.FlagValues()
    try:
      main._CONFIG = config_flags.DEFINE_config_file(
        "config", None, flag_values=flags.FLAGS
      )
      argv = ["train.py", f"--config={ROOT}/configs/dpo.py", *arguments]
      sys.argv = argv  # which is where settings of a config are looked for
      main._parse(argv)
      config = main._read_config()
    finally:
      flags.FLAGS = real
    config.make_loss()
    build(config)

  # No limit on the address space: the compiler's threads reserve a lot of it.
  signal.signal(signal.SIGALRM, _over)
  guard(folder)
  return feed(cases(), run, UserError)


def _over(*_):
  raise TooLong


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT / "tests"))
  sys.dont_write_bytecode = True
  group, folder = sys.argv[1], os.path.realpath(sys.argv[2])
  print(json.dumps(globals()[group](folder)))
