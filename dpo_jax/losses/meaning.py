"""What goes together, and the sentence that says why something does not."""

import jax
import jax.numpy as jnp

from dpo_jax.losses import registry
from dpo_jax.losses.base import check_range
from dpo_jax.losses.divergences import divergence_score
from dpo_jax.losses.loss import Loss


def check_meaning(loss: Loss) -> Loss:
  """Refuses what has no meaning, then traces the loss once, which checks the
  ranges of its hyper-parameters.

  Raises:
    ValueError: one sentence that says what does not go and why.
  """
  check_range("ld_alpha", loss.ld_alpha, 0.0, 1.0)
  divergence_score(jnp.zeros(()), loss.divergence)
  check_range("divergence_alpha", loss.divergence_alpha, -10.0, 10.0)
  if loss.divergence_alpha != 0.5 and loss.divergence != "alpha":
    raise ValueError(
      f"divergence_alpha={loss.divergence_alpha} is read by divergence='alpha'"
      f" alone, not by {loss.divergence!r}"
    )
  _check_terms(loss)
  about_pairs = [t for t in loss.terms if t.kind != "sft"]
  _check_divergence(loss, about_pairs)
  _check_pair_modifiers(loss, about_pairs)
  inputs = registry.abstract_inputs() | {"state": loss.initial_state()}
  out = jax.eval_shape(lambda inputs: loss(**inputs, training=True), inputs)
  if out.loss.shape != (1,):
    raise ValueError(
      f"loss {loss.name!r} should have one entry an example; for one example it"
      f" has shape {list(out.loss.shape)}"
    )
  return loss


def _check_terms(loss: Loss) -> None:
  kinds = {t.kind: t.name for t in loss.terms}
  if "unpaired" in kinds and len(kinds) > 1:
    other = next(n for kind, n in kinds.items() if kind != "unpaired")
    raise ValueError(
      f"{kinds['unpaired']!r} reads labelled completions and {other!r}"
      " preferred ones; no batch holds both"
    )
  if {"paired", "ranked"} <= kinds.keys():
    raise ValueError(
      f"{kinds['ranked']!r} reads rankings and {kinds['paired']!r} pairs; no"
      " batch holds both"
    )
  several = len(loss.terms) > 1
  scores = [t.name for t in loss.terms if "chosen_scores" in t.needs]
  if scores and several:
    raise ValueError(
      f"{scores[0]!r} trains a reward model, the other terms a policy; they"
      " have no model in common"
    )
  gold = [t.name for t in loss.terms if "policy_gold_logps" in t.needs]
  if gold and "sft" in kinds:
    raise ValueError(
      f"{gold[0]!r} imitates the gold response already; its hyper-parameter"
      f" 'alpha' does what {kinds['sft']!r} would"
    )
  if sum(t.entry.state is not None for t in loss.terms) > 1:
    raise ValueError(f"loss {loss.name!r}: one term at most may carry a state")
  if len({t.name for t in loss.terms}) < len(loss.terms):
    raise ValueError(f"loss {loss.name!r} names a term twice")


def _check_divergence(loss: Loss, about_pairs: list) -> None:
  if loss.divergence == "reverse_kl":
    return
  wrong = [t.name for t in about_pairs if not t.entry.divergences]
  if wrong or not about_pairs:
    fits = [n for n in registry.names() if registry.entry(n).divergences]
    raise ValueError(
      f"divergence={loss.divergence!r} does not go with"
      f" {(wrong or [loss.name])[0]!r}: only in the difference of two"
      " log-ratios to a reference does the partition function cancel; it goes"
      f" with {', '.join(fits)}"
    )


def _check_pair_modifiers(loss: Loss, about_pairs: list) -> None:
  """ld_alpha and wpo."""
  for key in ("ld_alpha", "wpo"):
    if key not in loss.modifiers:
      continue
    wrong = [
      t.name
      for t in about_pairs
      if t.kind != "paired" or "policy_rejected_logps" not in t.needs
    ]
    if wrong or not about_pairs:
      raise ValueError(
        f"{key} is about the two responses of a pair, and"
        f" {(wrong or [loss.name])[0]!r} does not read pairs"
      )
  if loss.ld_alpha != 1:
    for t in about_pairs:
      by_token = t.entry.aggregation == "mean"
      if by_token or "reference_chosen_logps" not in t.needs:
        why = "divides by length already" if by_token else "reads no reference"
        raise ValueError(
          f"ld_alpha shortens summed log-ratios to a reference, and {t.name!r}"
          f" {why}"
        )
  sorts = [t.name for t in about_pairs if "weights" in t.needs]
  if loss.wpo and sorts:
    raise ValueError(
      f"wpo weighs pairs, and {sorts[0]!r} takes them apart: the loss of a"
      " rank belongs to no pair"
    )
