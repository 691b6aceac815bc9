"""What packing must be worth: little padding, of tokens and scored places."""

import pathlib
import sys

import numpy as np
import pytest
from shared import SHARED, needs_shared

from dpo_jax.data.encode_settings import EncodeSettings
from dpo_jax.data.store import load_examples
from dpo_jax.data.tokenizer import load_tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scripts.benchmarks import packing

HH = SHARED / "data" / "hh_harmless" / "pairs.jsonl.gz"


@needs_shared
def test_batches_of_sixteen_dialogues_are_full_and_a_third_of_padded_ones():
  tokenizer = load_tokenizer(str(SHARED / "data" / "stories260k" / "hf"))
  examples = load_examples(str(HH), "train", tokenizer, EncodeSettings(1024))
  found = packing.measure(examples, 16)
  assert found.fill >= 0.95
  assert found.scored_fill >= 0.92
  assert found.padded <= 0.30
  assert len(found.shapes.split(",")) <= 4


@pytest.mark.parametrize("batch_size", packing.SIZES)
@pytest.mark.parametrize(
  ("name", "padded"),
  [("HH-like", 0.30), ("TL;DR-like", 0.36), ("UltraFeedback-like", 0.30)],
)
def test_batches_of_generated_lengths_are_full(name, padded, batch_size):
  found = packing.measure(packing.generate(name, n=6000), batch_size)
  assert found.fill >= 0.95
  assert found.scored_fill >= 0.90
  assert found.padded <= padded
  assert len(found.shapes.split(",")) <= 4


def test_eight_devices_are_about_as_full():
  found = packing.measure(packing.generate("HH-like"), 128, rows_multiple=8)
  assert found.fill >= 0.92 and found.scored_fill >= 0.92


def test_the_padded_tokens_are_those_of_the_longest_of_each_batch():
  x = packing.generate("HH-like", n=32)
  # One batch of all pairs, twice: nothing depends on the order.
  longest = (x.prompt_lengths[:, None] + x.lengths).max()
  used = (x.prompt_lengths - 1).sum() + x.lengths.sum()
  found = packing.measure(x, 32)
  assert found.padded * found.fill == pytest.approx(
    float(used) / float(np.int64(2 * 32) * longest)
  )
