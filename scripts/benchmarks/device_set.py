"""Models that are measured on an accelerator, in bfloat16, with their batches.

Sizes are those of Qwen 2.5 0.5B and 1.5B and of Llama 3.1 8B, all as Llamas;
"tiny" ones try the same way out on a CPU.
"""

from benchmarks.problem import Problem

_HALF = {
  "width": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ffn": 4864,
  "vocab": 151_936, "tied": True,
}  # fmt: skip
_ONE_AND_A_HALF = {
  "width": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "ffn": 8960,
  "vocab": 151_936, "tied": True,
}  # fmt: skip
_EIGHT = {
  "width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14_336,
  "vocab": 128_256,
}  # fmt: skip
_TINY = {
  "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64,
  "vocab": 256, "head_tile": 128,
}  # fmt: skip
MODELS = {
  "0.5b": _HALF,
  "1.5b": _ONE_AND_A_HALF,
  "8b-lora": _EIGHT | {"lora": 16},
  "tiny": _TINY,
  "tiny-lora": _TINY | {"lora": 4},
}
_FIXED = {"prompt": 512, "response": 512, "pairs": 8}
_DRAWN = {"pairs": 16, "batches": 4}
_TINY_FIXED = {"prompt": 24, "response": 8, "pairs": 2}
_TINY_DRAWN = {"pairs": 2, "batches": 2}
DEFAULT_MODELS = "0.5b,1.5b,8b-lora"
DEFAULT_LENGTHS = "fixed,hh-like"
DEFAULT_VARIANTS = "ours,ours_remat,trl,trl_remat"


def settings(model: str, distribution: str) -> dict:
  """Fields of the `Problem` of a model and a distribution of lengths."""
  tiny, fixed = model.startswith("tiny"), distribution == "fixed"
  batches = (_DRAWN, _FIXED) if not tiny else (_TINY_DRAWN, _TINY_FIXED)
  # What a chip multiplies at full speed: rows of logits beyond a thousand.
  common = {"dtype": "bfloat16", "head_tile": 4096, "learning_rate": 1e-4}
  return common | MODELS[model] | batches[fixed]


def comparable(problem: Problem, rows: list[dict]) -> str:
  """What speaks against two variants having done the same; "" for nothing.

  In bfloat16 losses differ by rounding; the first is log 2 whatever the
  weights, so the first log-probs are compared, too.
  """
  measured = [row for row in rows if "error" not in row]
  for row in measured[1:]:
    first = measured[0]
    for what, most in (("losses", 0.1), ("logps", 0.02)):
      a, b = first[what][0], row[what][0]
      if abs(a - b) > most * max(1.0, abs(a)):
        return (
          f"not the same computation: {what} begin with {a} of"
          f" {first['variant']}, {b} of {row['variant']}"
        )
  return ""
