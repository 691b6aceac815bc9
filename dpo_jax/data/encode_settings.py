"""How rows become examples: lengths, kind of training, what of bad rows."""

from dataclasses import dataclass

from dpo_jax.data import formats
from dpo_jax.errors import ConfigError

# Kind of training: the formats it can be fed.
KINDS = {
  "paired": (*formats.PAIRED, "ranked"),
  "unpaired": formats.UNPAIRED + formats.PAIRED,
  "sft": tuple(formats.FORMATS),
  "ranked": ("ranked",),
  "prompts": (*formats.FORMATS, formats.PROMPT),
}


@dataclass(frozen=True)
class EncodeSettings:
  """How rows become examples.

  Attributes:
    max_length: most tokens of a prompt with one response.
    max_prompt_length: most tokens of a prompt; 0 is half of `max_length`.
    kind: `paired` takes pairs, and the best and the worst of rankings;
      `unpaired` takes labelled completions, and pairs as two of them; `sft`
      takes completions, the best response of pairs and rankings, and what is
      labelled desirable; `ranked` takes rankings; `prompts` takes the prompts
      of all of these and rows of a prompt alone, and no answers.
    on_bad_row: `drop` counts a row that cannot be used and goes on, `error`
      stops at it.
  """

  max_length: int = 1024
  max_prompt_length: int = 0
  kind: str = "paired"
  on_bad_row: str = "drop"

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ConfigError(f"kind {self.kind!r}: expected {', '.join(KINDS)}")
    if self.on_bad_row not in ("drop", "error"):
      raise ConfigError(
        f"on_bad_row {self.on_bad_row!r}: expected drop or error"
      )
    if self.max_length < 4:
      raise ConfigError(f"max_length {self.max_length}: expected at least 4")
    if self.max_prompt_length >= self.max_length:
      raise ConfigError(
        f"max_prompt_length {self.max_prompt_length} with max_length "
        f"{self.max_length}: a prompt would fill the whole row"
      )
    if self.max_prompt_length < 0 or self.max_prompt_length == 1:
      raise ConfigError(
        f"max_prompt_length {self.max_prompt_length}: expected 0 (half of "
        "max_length) or at least 2"
      )

  @property
  def prompt_limit(self) -> int:
    return self.max_prompt_length or self.max_length // 2
