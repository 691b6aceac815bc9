"""Chat templates: the ids and the masks of transformers."""

import json
import random

import jinja2
import pytest

from dpo_jax.data.chat import TemplateRefused, render
from dpo_jax.data.encode import EncodeSettings
from dpo_jax.data.encode_pool import encode_rows
from dpo_jax.data.sources import read_rows
from dpo_jax.data.tokenizer import ByteTokenizer, HFTokenizer

from .live import WHY

transformers = pytest.importorskip("transformers", reason=WHY)

from chat_templates import (  # noqa: E402
  CHAT_TOKENS,
  SPECIAL,
  TEMPLATES,
)
from shared import SHARED, needs_shared  # noqa: E402

from tests.parity.live import SEED  # noqa: E402

pytestmark = pytest.mark.parity
REFUSALS = jinja2.exceptions.TemplateError


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
  """Our tokenizer and theirs, of one folder with the template."""
  path = tmp_path_factory.mktemp("chat")
  ByteTokenizer().save(path)
  file = path / "tokenizer.json"
  backend = json.loads(file.read_text())
  backend["added_tokens"] += [
    backend["added_tokens"][0] | {"content": text, "id": 259 + i}
    for i, text in enumerate(CHAT_TOKENS)
  ]
  file.write_text(json.dumps(backend))
  template, changes = TEMPLATES[request.param]
  config = SPECIAL | changes
  config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  (path / "chat_template.jinja").write_text(template)
  (path / "generation_config.json").unlink()
  theirs = transformers.AutoTokenizer.from_pretrained(str(path))
  return request.param, HFTokenizer.load(str(path)), theirs


def drawn_chats(count):
  """Conversations; some break the rules that some templates have."""
  print(f"PARITY_SEED={SEED}")
  rng = random.Random(SEED)
  pieces = [
    "a", " ", "\n", "é", "🙂", "<think>", "\n</think>\n\n", "{{ x }}", "[Q]",
    "<|end|>", "{% raw %}", "'", '"', "\\", "<b>&", "<result>x</result>", "%s",
  ]  # fmt: skip

  def text():
    return "".join(rng.choices(pieces, k=rng.randrange(7)))

  for _ in range(count):
    roles = ["user", "assistant"] * rng.randrange(1, 4)
    roles = roles[: rng.choice([len(roles), len(roles) - 1])]
    if rng.random() < 0.4:
      roles = ["system", *roles]
    if rng.random() < 0.1:
      roles[rng.randrange(len(roles))] = rng.choice(["user", "system", "tool"])
    yield [{"role": role, "content": text()} for role in roles]


def compare(ours, theirs, messages, opening):
  """Whether the template takes these messages; then the ids are equal."""
  text = None
  try:
    text = render(ours.chat_template, messages, ours.special_tokens, opening)
  except TemplateRefused:
    with pytest.raises(REFUSALS):
      theirs.apply_chat_template(messages, add_generation_prompt=opening)
    return False
  found = theirs.apply_chat_template(messages, add_generation_prompt=opening)
  assert ours.encode([text])[0] == found["input_ids"]
  return True


def test_drawn_conversations_give_their_ids(both):
  _, ours, theirs = both
  taken = [
    compare(ours, theirs, messages, opening)
    for messages in drawn_chats(150)
    for opening in (True, False)
  ]
  assert sum(taken) > 50


@needs_shared
def test_real_conversations_give_their_ids(both):
  _, ours, theirs = both
  source = str(SHARED / "data" / "chat_demo" / "pairs_messages.jsonl.gz")
  taken = 0
  for _, row in list(read_rows(source))[:60]:
    taken += compare(ours, theirs, row["prompt"], True)
    for side in ("chosen", "rejected"):
      taken += compare(ours, theirs, row["prompt"] + row[side], False)
  assert taken > 90


CALL = {"name": "f", "arguments": {"é": [1, None], "b": "<&>"}}
TOOLS = [
  {"role": "user", "content": "q"},
  {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
  {"role": "tool", "content": "12"},
  {"role": "assistant", "content": "twelve"},
]


def test_calls_of_tools_give_their_ids(both):
  name, ours, theirs = both
  taken = compare(ours, theirs, TOOLS, False)
  assert taken == (name not in ("inst", "last_user", "turns"))


def sft(tokenizer, messages):
  """Prompt and response in training, when the last turn is what is learnt."""
  settings = EncodeSettings(kind="sft", max_length=4096)
  encoded = encode_rows([("f:0", {"messages": messages})], tokenizer, settings)
  if not len(encoded):
    return None
  prompt = encoded.prompt_lengths[0]
  tokens = encoded.tokens.tolist()
  return tokens[:prompt], tokens[prompt:]


@pytest.mark.parametrize("both", ["marked"], indirect=True)
def test_every_assistant_turn_is_what_their_mask_marks(both):
  _, ours, theirs = both
  turns = 0
  for messages in drawn_chats(200):
    try:
      found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
      )
    except REFUSALS:
      continue
    ids, mask = found["input_ids"], found["assistant_masks"]
    edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    runs = list(zip(edges[::2], [*edges[1::2], len(mask)], strict=False))
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(runs) == len(said)
    for (start, end), i in zip(runs, said, strict=True):
      split = sft(ours, messages[: i + 1])
      if split is None or "<|end|>" in messages[i]["content"]:
        continue  # nothing but white space, or an end token of its own
      assert split == (ids[:start], ids[start:end])
      turns += 1
  assert turns > 100


# What "wide" says of a turn depends on later turns.
@pytest.mark.parametrize("both", [*TEMPLATES][:-1], indirect=True)
def test_the_prompt_is_their_opening_and_the_answer_what_follows(both):
  name, ours, theirs = both
  compared = 0
  for messages in drawn_chats(200):
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
      continue
    try:
      opening = theirs.apply_chat_template(
        messages[:-1], add_generation_prompt=True
      )["input_ids"]
      whole = theirs.apply_chat_template(messages)["input_ids"]
    except REFUSALS:
      continue
    split = sft(ours, messages)
    if split is None:
      continue
    prompt, response = split
    if ours.adds_bos:
      while whole[0] == opening[0] == ours.bos_id:
        whole, opening = whole[1:], opening[1:]
      opening, whole = [ours.bos_id, *opening], [ours.bos_id, *whole]
    if name == "last_user" and messages[0]["role"] == "system":
      continue  # it puts the system's words into the last turn alone
    shared = len(prompt)
    assert prompt == opening[:shared] == whole[:shared]
    # Behind its end token a response has nothing, and it always has one.
    assert response[-1] == ours.eos_id
    said = response[:-1]
    assert whole[shared : shared + len(said)] == said
    rest = whole[shared + len(said) :]
    assert not ours.decode(rest).strip()
    compared += 1
  assert compared > 20
