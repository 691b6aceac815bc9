"""A pretrained model, aligned here and loaded there: transformers and PEFT say
what we sample."""

import pytest
from shared import SHARED, needs_shared

from configs import dpo
from dpo_jax.asking import answer_texts
from dpo_jax.config import from_dict
from dpo_jax.train import train

from .live import WHY

torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
their_peft = pytest.importorskip("peft", reason=WHY)

pytestmark = [pytest.mark.parity, needs_shared]

STORIES = str(SHARED / "data" / "stories260k" / "hf")
PAIRS = str(SHARED / "data" / "tone_pairs" / "pairs.jsonl.gz")
PROMPTS = ["Once upon a time", "The little dog was sad because", "Lily said"]


def settings(**changes):
  config = dpo.get_config("tone")
  config.model.path, config.data.source = STORIES, PAIRS
  config.data.cache_dir = ""
  config.data.eval_rows = 16
  config.train.steps, config.train.eval_every = 12, 0
  config.sample.prompts = 0
  config.sample.temperature, config.sample.max_tokens = 0.0, 40
  config.update_from_flattened_dict(changes)
  return from_dict(config.to_dict())


def theirs(model, folder):
  """Greedy answers of transformers, by its own tokenizer's text and ids."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  answers = []
  for prompt in PROMPTS:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :]
    answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
  return answers


def ours(**changes):
  rows = answer_texts(settings(**changes), PROMPTS)
  return [row["response"].strip() for row in rows]


def read(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()


def test_the_exported_model_generates_there_what_we_sample(tmp_path):
  train(settings(), tmp_path / "run")
  folder = str(tmp_path / "run" / "model")
  said = theirs(read(folder), folder)
  assert said == ours(**{"model.path": folder})
  assert said != ours()  # nor what it said before
  assert all(len(answer) > 20 for answer in said)


def test_exported_adapters_generate_there_what_we_sample(tmp_path):
  train(settings(**{"lora.rank": 4, "lora.alpha": 32.0}), tmp_path / "run")
  adapter = str(tmp_path / "run" / "adapter")
  model = str(tmp_path / "run" / "model")
  adapted = their_peft.PeftModel.from_pretrained(read(STORIES), adapter)
  said = theirs(adapted.eval(), STORIES)
  assert said == ours(**{"lora.path": adapter})
  assert said == ours(**{"model.path": model})
  assert said == theirs(read(model), model)
  assert said != ours()
