"""Lengths of the pairs of a benchmark: of real dialogues, or generated."""

import pathlib

import numpy as np

from benchmarks import packing
from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.store import load_examples

_SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
HH = _SHARED / "data" / "hh_harmless" / "pairs.jsonl.gz"
_LIKE = {
  "hh-like": "HH-like",
  "tldr-like": "TL;DR-like",
  "ultrafeedback-like": "UltraFeedback-like",
}
NAMES = ("fixed", "hh", *_LIKE)


def draw(
  name: str, n: int, *, longest: int, seed: int, data: str = ""
) -> tuple[tuple[int, int, int], ...]:
  """Lengths of n pairs; pairs are drawn without looking at their lengths.

  Args:
    name: "fixed" draws none; "hh" are those of a file of pairs under a
      byte-level BPE of 8192 pieces trained on it; the others are log-normal,
      see `packing.LIKE`.
    n: pairs.
    longest: tokens of prompt and response together; what is longer is cut, as
      the data pipeline does for "hh", and the prompt to half of it first for
      the others.
    seed: of the draw.
    data: the file of "hh"; "" is that of the shared test data.

  Returns:
    Tokens of prompt, chosen and rejected of each pair; () for "fixed".
  """
  if name == "fixed":
    return ()
  if name == "hh":
    path = data or str(HH)
    tokenizer = packing.trained_tokenizer(path)
    examples = load_examples(path, "train", tokenizer, EncodeSettings(longest))
  else:
    examples = packing.generate(_LIKE[name])
  rng = np.random.default_rng(seed)
  picked = rng.choice(len(examples), n, replace=False)
  prompts = examples.prompt_lengths[picked]
  responses = examples.lengths[picked]
  if name != "hh":
    prompts = np.minimum(prompts, longest // 2)
    responses = np.minimum(responses, longest - prompts[:, None])
  return tuple(
    (int(p), int(r[0]), int(r[1])) for p, r in zip(prompts, responses)
  )
