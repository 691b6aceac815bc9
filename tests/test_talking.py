"""A conversation: what the model is asked, what is shown, what is kept."""

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.asking import answer_texts
from dpo_jax.build import build
from dpo_jax.config import Config, Model, Sample
from dpo_jax.data.tokenizer import ByteTokenizer
from dpo_jax.errors import ConfigError
from dpo_jax.models import hf
from dpo_jax.talking import Conversation, open_conversation, talk
from dpo_jax.weights import load_variables

BYTES = ByteTokenizer()


pytestmark = pytest.mark.usefixtures("compile_quickly")


class Said:
  """A stream that says what it is told to, and keeps what it was asked."""

  def __init__(self, *answers):
    self.answers = [BYTES.encode([x])[0] for x in answers]
    self.asked = []

  def __call__(self, ids, number, room):
    self.asked.append((BYTES.decode(ids), number, room))
    assert ids[0] == BYTES.bos_id and BYTES.bos_id not in ids[1:]
    # Like a model, it does not end by itself.
    drawn = itertools.chain(self.answers[number], itertools.repeat(9))
    yield from itertools.islice(drawn, room)


def conversation(stream, **settings):
  settings = {"context": 1000, "max_tokens": 40} | settings
  return Conversation(stream, BYTES, **settings)


def dialogue(talking, *lines):
  """All that is written, when these lines are read and then the end."""
  lines = iter(lines)

  def read():
    line = next(lines, EOFError())
    if isinstance(line, BaseException):
      raise line
    return line

  written = []
  talk(talking, read, written.append)
  return "".join(written).partition("\n")[2]  # without the help


def test_every_question_comes_with_the_history_and_the_system_turn():
  stream = Said(" one<|eos|>", " two<|eos|>")
  shown = dialogue(conversation(stream, system="be"), "A", "", "B")
  assert shown == " one\n two\n\n"
  first = "system: be\nuser: A\nassistant:"
  assert stream.asked == [
    (first, 0, 40),
    (f"{first} one\nuser: B\nassistant:", 1, 40),
  ]


def test_pieces_are_shown_as_they_come_and_characters_never_in_half():
  talking = conversation(Said("é\U0001f600!<|eos|>"))
  _, pieces = talking.ask("x")
  assert list(pieces) == ["é", "\U0001f600", "!", ""]
  talking = conversation(Said("aé"), max_tokens=2)  # cut inside a character
  _, pieces = talking.ask("x")
  assert list(pieces) == ["a", "\ufffd"]


def test_reset_forgets_all_but_the_system_turn_and_quit_ends():
  stream = Said("1<|eos|>", "2<|eos|>")
  talking = conversation(stream, system="be")
  shown = dialogue(talking, "A", "/reset", "B", "/quit", "C")
  assert shown == "1\n(forgotten)\n2\n"
  assert stream.asked[1][0] == "system: be\nuser: B\nassistant:"
  assert "no such command; /reset" in dialogue(talking, "/rest now")


def test_the_oldest_turns_are_dropped_when_the_context_is_full():
  stream = Said(*(["a" * 8 + "<|eos|>"] * 4))
  talking = conversation(stream, system="be", context=100, max_tokens=20)
  shown = dialogue(talking, "A" * 9, "B" * 9, "C" * 9)
  assert "(the oldest 2 turns no longer fit and are forgotten)" in shown
  text = stream.asked[2][0]
  assert text.startswith("system: be\nuser: BBB") and "A" not in text
  assert [m["role"] for m in talking.messages] == [
    "system", "user", "assistant", "user", "assistant",
  ]  # fmt: skip


def test_a_turn_without_room_for_an_answer_is_refused_and_not_kept():
  stream = Said("ok<|eos|>")
  talking = conversation(stream, context=40)
  shown = dialogue(talking, "A" * 100, "B")
  assert "(these are 118 tokens, and the model was made for 40)" in shown
  # What room is left is used.
  assert stream.asked == [("user: B\nassistant:", 0, 40 - 19)]
  assert [m["content"] for m in talking.messages] == ["B", "ok"]


def test_an_interrupt_stops_the_answer_and_what_was_shown_stays():
  def stream(ids, number, room):
    yield from BYTES.encode(["half"])[0]
    if number == 0:
      raise KeyboardInterrupt
    yield BYTES.eos_id

  talking = conversation(stream)
  shown = dialogue(talking, "A", KeyboardInterrupt(), "B")
  assert shown.startswith("half (stopped)\n\n/reset")
  assert [m["content"] for m in talking.messages] == ["A", "half", "B", "half"]


def test_text_that_is_none_is_named_and_the_conversation_goes_on():
  shown = dialogue(conversation(Said("ok<|eos|>")), "a\ud800", "B")
  assert "half a surrogate pair" in shown and shown.endswith("ok\n\n")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A model folder with the byte tokenizer."""
  config = Config(
    model=Model(
      tokenizer="bytes", width=8, layers=1, heads=2, kv_heads=1, ffn=8
    )
  )
  built = build(config)
  path = tmp_path_factory.mktemp("model")
  hf.save_checkpoint(
    path, built.family, built.model.config, load_variables(config, built),
    save_tokenizer=built.tokenizer.save,
  )  # fmt: skip
  return Config(model=Model(path=str(path)), sample=Sample(max_tokens=12))


def test_a_model_answers_each_time_as_it_did_before(saved):
  talking = open_conversation(saved)
  first = dialogue(talking, "A", "B")
  assert first == dialogue(open_conversation(saved), "A", "B")
  talking.reset()
  assert first != dialogue(talking, "A", "B")  # drawn anew


def test_a_conversation_needs_a_model():
  with pytest.raises(ConfigError, match=r"config\.model\.path is empty"):
    open_conversation(Config())


def test_prompts_are_turns_of_a_user_after_the_systems(saved):
  plain, after = (
    answer_texts(saved, ["A", "B"], chat=True, system=system)
    for system in ("", "be")
  )
  assert [row["prompt"] for row in plain] == ["A", "B"]
  assert [row["logp"] for row in plain] != [row["logp"] for row in after]
  bare = answer_texts(saved, ["user: A\nassistant:"])
  assert bare[0] == plain[0] | {"prompt": "user: A\nassistant:"}


def test_the_script_talks_in_a_terminal(saved):
  ours, theirs = os.openpty()  # what a terminal's standard input is
  root = pathlib.Path(__file__).resolve().parents[1]
  process = subprocess.Popen(
    [
      sys.executable, "scripts/sample.py", "--config=configs/dpo.py", "--chat",
      f"--config.model.path={saved.model.path}", "--system=be",
      "--config.sample.max_tokens=3",
    ],
    stdin=theirs, stdout=subprocess.PIPE, text=True, cwd=root,
    env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  os.write(ours, b"hi\n/reset\n/quit\n")
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert "/quit or ctrl-D ends" in out and out.count("> ") == 3
  assert "(forgotten)" in out
