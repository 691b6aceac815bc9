"""A conversation in the terminal: history kept, answers shown as they come."""

from collections.abc import Callable, Iterator, Sequence

from dpo_jax import sample
from dpo_jax.asking import chat_ids, first_turn, require_model
from dpo_jax.build import build
from dpo_jax.config import Config
from dpo_jax.data.tokenizer import HFTokenizer
from dpo_jax.errors import ConfigError, UserError
from dpo_jax.weights import load_policy

HELP = "/reset forgets all, /quit or ctrl-D ends, ctrl-C stops an answer"
_UNFINISHED = "\ufffd"  # what decoding shows for half a character

# (prompt, number of the answer, most tokens) -> tokens as they are drawn.
Stream = Callable[[Sequence[int], int, int], Iterator[int]]


class Conversation:
  """Messages so far, and how the next one is answered.

  Attributes:
    messages: the system's turn, if there is one, and all others.
  """

  def __init__(
    self,
    stream: Stream,
    tokenizer: HFTokenizer,
    *,
    context: int,
    max_tokens: int,
    system: str = "",
  ):
    """An answer has at most `max_tokens`, and with all before it `context`."""
    self._stream = stream
    self._tokenizer = tokenizer
    self._context = context
    self._max_tokens = min(max_tokens, context - 1)
    self._system = first_turn("", system)[:-1]
    self._asked = 0
    self.reset()

  def reset(self) -> None:
    self.messages = list(self._system)

  def ask(self, text: str) -> tuple[int, Iterator[str]]:
    """Puts a user's turn; what is said of it so far stays in the history.

    Returns:
      How many turns had to be forgotten to make room, and the pieces of the
      answer, each text that no later token changes.

    Raises:
      UserError: the template takes no such turn, the text is none, or the turn
        alone leaves no room for an answer. It is not kept.
    """
    turn = first_turn(text)
    system, past = self._system, self.messages[len(self._system) :]
    forgotten = 0
    while True:
      ids = chat_ids(self._tokenizer, [*system, *past, *turn])
      if len(ids) + self._max_tokens <= self._context or not past:
        break
      past = past[2:]  # a question and its answer
      forgotten += 2
    room = min(self._max_tokens, self._context - len(ids))
    if room < 1:
      raise ConfigError(
        f"these are {len(ids)} tokens, and the model was made for"
        f" {self._context}"
      )
    answer = {"role": "assistant", "content": ""}
    self.messages = [*system, *past, *turn, answer]
    self._asked += 1
    return forgotten, self._answer(ids, room, answer)

  def _answer(
    self, ids: list[int], room: int, answer: dict[str, str]
  ) -> Iterator[str]:
    shown, drawn = "", []
    for token in self._stream(ids, self._asked - 1, room):
      if token in self._tokenizer.stop_ids:
        break
      drawn.append(token)
      text = self._tokenizer.decode(drawn)
      if text.endswith(_UNFINISHED) or not text.startswith(shown):
        continue
      # A template brings its own space in front.
      answer["content"] = text.strip()
      yield text[len(shown) :]
      shown = text
    text = self._tokenizer.decode(drawn)
    answer["content"] = text.strip()
    yield text[len(shown) :]


def talk(
  conversation: Conversation,
  read: Callable[[], str],
  write: Callable[[str], None],
) -> None:
  """Until `read` (a line, as `input`) raises EOFError or gives "/quit"."""
  write(f"{HELP}\n")
  while True:
    try:
      line = read().strip()
    except EOFError:
      write("\n")
      return
    except KeyboardInterrupt:
      write(f"\n{HELP}\n")
      continue
    if line == "/quit":
      return
    if line == "/reset":
      conversation.reset()
      write("(forgotten)\n")
    elif line.startswith("/"):
      write(f"{line.split()[0]}: no such command; {HELP}\n")
    elif line:
      _exchange(conversation, line, write)


def _exchange(
  conversation: Conversation, line: str, write: Callable[[str], None]
) -> None:
  try:
    forgotten, pieces = conversation.ask(line)
    if forgotten:
      write(f"(the oldest {forgotten} turns no longer fit and are forgotten)\n")
    for piece in pieces:
      write(piece)
  except KeyboardInterrupt:
    write(" (stopped)")
  except UserError as error:
    write(f"({error})")
  write("\n")


def open_conversation(config: Config, system: str = "") -> Conversation:
  """With `config.model.path`, answering as `config.sample` says.

  Raises:
    UserError: no model, or one without a chat template.
  """
  require_model(config)
  built = build(config)
  s, tokenizer = config.sample, built.tokenizer
  chat_ids(tokenizer, first_turn("x", system))  # before weights are loaded
  variables = load_policy(config, built)
  stream = sample.make_stream(
    built.model,
    temperature=s.temperature,
    top_k=s.top_k,
    top_p=s.top_p,
    mesh=built.mesh,
  )
  return Conversation(
    lambda ids, number, room: stream(
      variables, ids, config.seed + number, room
    ),
    tokenizer,
    context=built.model.config.max_length,
    max_tokens=s.max_tokens,
    system=system,
  )
