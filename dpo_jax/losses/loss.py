"""A loss with its hyper-parameters fixed: one method, or a mixture of several,
and the modifiers that go with any of them."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import registry
from dpo_jax.losses.base import LossOutput, check_range
from dpo_jax.losses.divergences import divergence_score
from dpo_jax.losses.ld import desensitize
from dpo_jax.losses.registry import MODIFIERS
from dpo_jax.losses.wpo import wpo_weights

_SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Term:
  """One method of a loss, and how much it counts."""

  name: str
  options: tuple[tuple[str, Any], ...] = ()
  coefficient: float = 1.0

  @property
  def entry(self) -> registry.Entry:
    return registry.entry(self.name)

  @property
  def needs(self) -> tuple[str, ...]:
    return tuple(registry.positional(self.entry.function))

  def __call__(self, inputs: Mapping[str, Any]) -> LossOutput:
    taken = {name: inputs[name] for name in self.needs if name in inputs}
    return self.entry.function(**taken, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class Loss:
  """What to minimise; hashable, comparable. Made by `make` or `mix`.

  Call it with inputs by name, of which it takes those it needs and ignores the
  rest, or by position in the order of `needs`.
  """

  terms: tuple[Term, ...]
  divergence: str = "reverse_kl"
  divergence_alpha: float = 0.5
  ld_alpha: float = 1.0
  wpo: bool = False

  @property
  def name(self) -> str:
    """As `make` takes it: "dpo", "dpo+0.2*sft"."""
    parts = (
      t.name if t.coefficient == 1 else f"{t.coefficient:g}*{t.name}"
      for t in self.terms
    )
    return "+".join(parts)

  @property
  def options(self) -> tuple[tuple[str, Any], ...]:
    """All hyper-parameters, and the modifiers that change something. Those of
    a mixture are called "dpo.beta"."""
    alone = len(self.terms) == 1
    own = [
      (key if alone else f"{term.name}.{key}", value)
      for term in self.terms
      for key, value in term.options
    ]
    return tuple(own) + tuple(self.modifiers.items())

  @property
  def modifiers(self) -> dict[str, Any]:
    """Those that change something."""
    changed = {
      key: getattr(self, key)
      for key, neutral in MODIFIERS.items()
      if getattr(self, key) != neutral
    }
    if self.divergence != "alpha":
      changed.pop("divergence_alpha", None)
    return changed

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of what the loss reads, in the order of its signature."""
    needs = dict.fromkeys(name for term in self.terms for name in term.needs)
    if self.wpo:
      needs |= dict.fromkeys(f"{side}_confidence" for side in _SIDES)
    if self.ld_alpha != 1:
      needs |= dict.fromkeys(
        name.replace("_logps", "_tail_logps")
        for name in tuple(needs)
        if re.fullmatch("(policy|reference)_(chosen|rejected)_logps", name)
      )
    return tuple(needs)

  @property
  def needs_reference(self) -> bool:
    return any(name.startswith("reference_") for name in self.needs)

  @property
  def kind(self) -> str:
    """The data it trains on: "paired", "unpaired", "ranked" or "sft"."""
    return _kind(self.needs)

  @property
  def responses(self) -> int:
    """How many responses an example of its data has at least."""
    if "policy_gold_logps" in self.needs:
      return 3
    return 2 if self.kind in ("paired", "ranked") else 1

  @property
  def needs_scores(self) -> bool:
    """True where it trains a reward model, not a policy."""
    return "chosen_scores" in self.needs

  @property
  def batch_coupled(self) -> bool:
    """True where one example's loss depends on the others of the batch."""
    return "weights" in self.needs

  def initial_state(self) -> Any:
    """What to hand in as `state` with the first batch; None if it has none."""
    states = [t.entry.state() for t in self.terms if t.entry.state]
    return states[0] if states else None

  def __call__(self, *arrays: jax.Array, **inputs: Any) -> LossOutput:
    if len(arrays) > len(self.needs):
      raise TypeError(
        f"loss {self.name!r} takes {', '.join(self.needs)}; given:"
        f" {len(arrays)} arrays"
      )
    inputs |= dict(zip(self.needs, arrays, strict=False))
    self._check_complete(inputs)
    # As each registered function does: nothing below is computed in bfloat16.
    inputs = {k: registry.promote(k, x) for k, x in inputs.items()}
    outputs = [self._term(term, inputs) for term in self.terms]
    if len(outputs) == 1:
      return outputs[0]
    metrics: dict[str, Any] = {}
    for term, out in zip(self.terms, outputs, strict=True):
      metrics = {f"loss/{term.name}": out.loss} | out.metrics | metrics
    scaled = [
      (term.coefficient * out.loss, out.weights)
      for term, out in zip(self.terms, outputs, strict=True)
    ]
    states = [out.state for out in outputs if out.state is not None]
    return LossOutput(
      loss=sum(loss for loss, _ in scaled),
      metrics=metrics,
      state=states[0] if states else None,
      terms=tuple(scaled),
    )

  def _term(self, term: Term, inputs: dict[str, Any]) -> LossOutput:
    """A term under the modifiers; those are about pairs, so not about sft."""
    if _kind(term.needs) == "sft":
      return term(inputs)
    if self.ld_alpha != 1:
      inputs = inputs | {
        name: desensitize(
          inputs[name],
          inputs[name.replace("_logps", "_tail_logps")],
          self.ld_alpha,
        )
        for name in term.needs
        if re.fullmatch("(policy|reference)_(chosen|rejected)_logps", name)
      }
    out = term(inputs)
    if self.divergence != "reverse_kl" and term.entry.divergences:
      # Rewards are still logged as beta times the log-ratio, as in TRL.
      out = term(self._scored(inputs))._replace(metrics=out.metrics)
    if self.wpo:
      weights = wpo_weights(*(inputs[f"{side}_confidence"] for side in _SIDES))
      out = out._replace(
        loss=out.loss * weights, metrics=out.metrics | {"wpo_weights": weights}
      )
    return out

  def _scored(self, inputs):
    """Inputs whose log-ratios are the scores of the divergence."""
    scores = {}
    for side in _SIDES:
      policy, reference = f"policy_{side}_logps", f"reference_{side}_logps"
      scores[policy] = divergence_score(
        inputs[policy] - inputs[reference],
        self.divergence,
        self.divergence_alpha,
      )
      scores[reference] = jnp.zeros_like(scores[policy])
    return inputs | scores

  def _check_complete(self, inputs) -> None:
    optional = {
      name
      for term in self.terms
      for name, p in registry.positional(term.entry.function).items()
      if p.default is not inspect.Parameter.empty
    }
    missing = [n for n in self.needs if n not in inputs and n not in optional]
    if missing:
      raise TypeError(
        f"loss {self.name!r} needs {', '.join(missing)}; given:"
        f" {', '.join(inputs)}"
      )


def make(name: str, **options: Any) -> Loss:
  """Fixes a loss and its hyper-parameters.

  >>> make("dpo", beta=0.2)
  >>> make("dpo+0.005*sft", beta=0.2)            # a mixture (RPO)
  >>> make("dpo", divergence="js", wpo=True)     # modifiers
  >>> make("0.8*dpo + 0.2*bco_pair + sft")       # MPO

  Args:
    name: a registered loss, or several joined by "+", each with an optional
      coefficient; the mixture is the weighted sum of their means.
    **options: hyper-parameters; of a mixture, each goes to every term that has
      it (`mix` gives terms different ones). And the modifiers:
      divergence: "reverse_kl", "forward_kl", "js" or "alpha", see
        `divergence_score`; divergence_alpha is read by "alpha".
      ld_alpha: below 1 counts what exceeds the other response's length less,
        see `desensitize`.
      wpo: weighs pairs by the policy's confidence, see `wpo_weights`.

  Raises:
    ValueError: unknown name or hyper-parameter, a value of the wrong type or
      out of range, or a combination without a meaning.
  """
  parsed = _parse(name)
  known = defaults(name) | MODIFIERS
  for key in options:
    if key not in known:
      own = ", ".join(defaults(name)) or "none"
      raise ValueError(
        f"loss {name!r} has no hyper-parameter {key!r}"
        f"{registry.suggest(key, known)}; it has: {own}; and any loss the"
        f" modifiers {', '.join(MODIFIERS)}"
      )
  options = {
    key: registry.checked(f"loss {name!r}", key, value, known[key])
    for key, value in options.items()
  }
  terms = []
  for term, coefficient in parsed:
    own = registry.options_of(term)
    own |= {key: value for key, value in options.items() if key in own}
    terms.append(Term(term, tuple(sorted(own.items())), coefficient))
  modifiers = {k: v for k, v in options.items() if k in MODIFIERS}
  return _checked(Loss(tuple(terms), **modifiers))


def mix(*parts: tuple[float, Loss], **modifiers: Any) -> Loss:
  """The weighted sum of losses that were made one by one.

  >>> mix((0.8, make("dpo", beta=0.1)), (0.2, make("bco_pair", beta=0.01)))

  Args:
    *parts: (coefficient, loss).
    **modifiers: as in `make`; they hold for the whole mixture.

  Raises:
    ValueError: a part has modifiers of its own, or the combination has no
      meaning.
  """
  terms = []
  for coefficient, loss in parts:
    if loss.modifiers:
      raise ValueError(
        f"loss {loss.name!r} has modifiers of its own"
        f" ({', '.join(loss.modifiers)}); give them to the mixture"
      )
    check_range("coefficient", coefficient, 1e-9, float("inf"))
    terms += [
      dataclasses.replace(t, coefficient=float(coefficient * t.coefficient))
      for t in loss.terms
    ]
  for key, value in modifiers.items():
    if key not in MODIFIERS:
      raise ValueError(
        f"no modifier {key!r}{registry.suggest(key, MODIFIERS)}; there are"
        f" {', '.join(MODIFIERS)}"
      )
    modifiers[key] = registry.checked("mix", key, value, MODIFIERS[key])
  return _checked(Loss(tuple(terms), **modifiers))


def defaults(name: str) -> dict[str, Any]:
  """Hyper-parameters of a loss (of all terms of a mixture) and their defaults.

  Raises:
    ValueError: no loss of that name; the message names the known ones.
  """
  merged: dict[str, Any] = {}
  for term, _ in _parse(name):
    merged = registry.options_of(term) | merged
  return merged


def _parse(name: str) -> list[tuple[str, float]]:
  terms = []
  for part in name.split("+"):
    coefficient, star, term = part.rpartition("*")
    try:
      value = float(coefficient) if star else 1.0
    except ValueError:
      raise ValueError(
        f"loss {name!r}: {coefficient.strip()!r} should be a number, as in"
        " 'dpo+0.2*sft'"
      ) from None
    check_range(f"coefficient of {term.strip()!r}", value, 1e-9, float("inf"))
    registry.entry(term.strip())
    terms.append((term.strip(), value))
  return terms


def _kind(needs) -> str:
  if "desirable" in needs:
    return "unpaired"
  if "policy_ranked_logps" in needs or "policy_gold_logps" in needs:
    return "ranked"
  if {"policy_rejected_logps", "rejected_scores"} & set(needs):
    return "paired"
  return "sft"


def _checked(loss: Loss) -> Loss:
  """Refuses what has no meaning, then traces the loss once, which checks the
  ranges of its hyper-parameters."""
  check_range("ld_alpha", loss.ld_alpha, 0.0, 1.0)
  divergence_score(jnp.zeros(()), loss.divergence)
  check_range("divergence_alpha", loss.divergence_alpha, -10.0, 10.0)
  _check_mixture(loss)
  _check_modifiers(loss)
  out = jax.eval_shape(
    lambda inputs: loss(**inputs, training=True),
    {k: v for k, v in registry.abstract_inputs().items() if k != "training"},
  )
  if not isinstance(out, LossOutput):
    raise ValueError(
      f"loss {loss.name!r} should return losses.LossOutput(loss, metrics), not"
      " the loss alone"
    )
  return loss


def _check_mixture(loss: Loss) -> None:
  kinds = {_kind(t.needs): t.name for t in loss.terms}
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
  scores = [t.name for t in loss.terms if "chosen_scores" in t.needs]
  if scores and len(loss.terms) > 1:
    raise ValueError(
      f"{scores[0]!r} trains a reward model, the other terms a policy; they"
      " have no model in common"
    )
  if len({t.name for t in loss.terms}) < len(loss.terms):
    raise ValueError(f"loss {loss.name!r} names a term twice")


def _check_modifiers(loss: Loss) -> None:
  about_pairs = [t for t in loss.terms if _kind(t.needs) != "sft"]
  if loss.divergence != "reverse_kl":
    fits = [n for n in registry.names() if registry.entry(n).divergences]
    wrong = [t.name for t in about_pairs if not t.entry.divergences]
    if wrong or not about_pairs:
      name = (wrong or [loss.name])[0]
      raise ValueError(
        f"divergence={loss.divergence!r} does not go with {name!r}: only in the"
        " difference of two log-ratios to a reference does the partition"
        f" function cancel; it goes with {', '.join(fits)}"
      )
  for key in ("ld_alpha", "wpo"):
    if key not in loss.modifiers:
      continue
    wrong = [
      t.name
      for t in about_pairs
      if not {f"policy_{side}_logps" for side in _SIDES} <= set(t.needs)
      or _kind(t.needs) != "paired"
    ]
    if wrong or not about_pairs:
      raise ValueError(
        f"{key} is about the two responses of a pair, and"
        f" {(wrong or [loss.name])[0]!r} does not read pairs"
      )
    sorts = [t.name for t in about_pairs if "weights" in t.needs]
    if key == "wpo" and sorts:
      raise ValueError(
        f"wpo weighs pairs, and {sorts[0]!r} takes them apart: the loss of a"
        " rank belongs to no pair"
      )
