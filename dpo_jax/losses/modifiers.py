"""What acts on any loss of pairs from outside: on its inputs, or its output."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from dpo_jax.losses.base import LossOutput
from dpo_jax.losses.divergences import divergence_score
from dpo_jax.losses.ld import desensitize
from dpo_jax.losses.wpo import wpo_weights

SIDES = ("chosen", "rejected")
_LOGPS = tuple(
  f"{model}_{side}_logps" for model in ("policy", "reference") for side in SIDES
)


def logps_of_a_pair(names: Iterable[str]) -> list[str]:
  """Those of the names that are log-probs of one of a pair's responses."""
  return [name for name in names if name in _LOGPS]


def tail_of(name: str) -> str:
  """The input with what lies beyond the other response's length."""
  return name.replace("_logps", "_tail_logps")


def run_modified(loss: Any, term: Any, inputs: Mapping[str, Any]) -> LossOutput:
  """A term of a loss under the modifiers of that loss.

  They are about pairs, so a term of sft stays what it is. Rewards are logged as
  beta times the log-ratio under any divergence, as in TRL; under `ld_alpha` the
  rewards are those that are compared, and the log-probs those of the responses.

  Args:
    loss: a `Loss`, of which the modifiers are read.
    term: a `Term` of it.
    inputs: by name.
  """
  out = term(inputs)
  if term.kind == "sft":
    return out
  logged = out.metrics
  if loss.ld_alpha != 1:
    inputs = dict(inputs) | {
      name: desensitize(inputs[name], inputs[tail_of(name)], loss.ld_alpha)
      for name in logps_of_a_pair(loss.needs)
    }
    out = term(inputs)
    raw = {k: v for k, v in logged.items() if k.startswith("logps/")}
    logged = out.metrics | raw
  if loss.divergence != "reverse_kl":
    out = term(dict(inputs) | _scores(loss, inputs))
  if loss.wpo:
    weights = wpo_weights(*(inputs[f"{side}_confidence"] for side in SIDES))
    out = out._replace(loss=out.loss * weights)
    logged = logged | {"wpo_weights": weights}
  return out._replace(metrics=logged)


def _scores(loss, inputs):
  """Log-probs whose ratios are the scores of the divergence."""
  scores = {}
  for side in SIDES:
    policy, reference = f"policy_{side}_logps", f"reference_{side}_logps"
    scores[policy] = divergence_score(
      inputs[policy] - inputs[reference],
      loss.divergence,
      loss.divergence_alpha,
    )
    scores[reference] = jnp.zeros_like(scores[policy])
  return scores
