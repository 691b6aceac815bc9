"""The numbers of TRL's own code, from the losses, the head and the step."""

import collections
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from shared import SHARED

from dpo_jax import logps, losses, score
from dpo_jax.data.plan import Plan
from dpo_jax.data.store import Examples
from dpo_jax.models import hf, llama
from dpo_jax.train_step import train_step
from dpo_jax.update import TrainState

FILE = SHARED / "golden" / "losses_trl.json"
pytestmark = pytest.mark.skipif(
  not FILE.exists(), reason=f"golden numbers {FILE} are not on this machine"
)
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {"entries": []}

# Most programs here run once; optimising them would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# What TRL calls a loss, where we have it under another name.
RENAMED_LOSSES = {
  "sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo",
  "odds_ratio": "orpo", "tpo-l": "tpo_l",
}  # fmt: skip
COVERED = set(losses.names()) | RENAMED_LOSSES.keys()
COVERED |= {"unpaired"}  # the pairing of KTO's mismatched completions
COVERED |= {"tr_dpo_soft_update"}  # `losses.mix_reference`
# What has no counterpart here, by entry: reason and how many.
NOT_OURS_BY_DESIGN = {
  "padded rows and their truncation; ours are packed": 4,
  "a running mean as delta of pairs, given up by TRL as well": 1,
}
# Metrics of TRL that need full logits, or are differences of ours.
NOT_OURS = {
  "entropy", "epoch", "learning_rate", "logits/chosen", "logits/rejected",
  "mean_token_accuracy", "num_tokens",
}  # fmt: skip
# Kinds of entries that a test of their own reads.
BY_HAND = {"orpo", "bco", "tr_dpo_soft_update", "unpaired"}


def without_counterpart(entry):
  """Why an entry cannot be reproduced; None if it is below."""
  if entry["loss"] == "preference":
    return "padded rows and their truncation; ours are packed"
  if (entry["family"], entry["loss"]) == ("dpo_legacy", "bco_pair"):
    return "a running mean as delta of pairs, given up by TRL as well"
  return None


def adds_likelihood(entry):
  """Whether the loss has a term that only token means give as TRL does."""
  return entry["level"] == "logits" and entry["family"] in ("cpo", "tpo")


def entries(*levels, only=None):
  """Entries of some levels, as parameters named by their ids; those of BY_HAND
  and with a likelihood only where asked for."""
  only = only or (lambda e: e["loss"] not in BY_HAND and not adds_likelihood(e))
  return [
    pytest.param(e, id=e["id"])
    for e in GOLDEN["entries"]
    if e["level"] in levels and not without_counterpart(e) and only(e)
  ]


def entries_of(loss, *levels):
  return entries(*levels, only=lambda e: e["loss"] == loss)


def test_every_entry_is_reproduced_here_or_says_why_not():
  run = (
    entries("sequence", "token", "logits", "training_steps")
    + entries("logits", only=adds_likelihood)
    + entries_of("orpo", "logits")
    + entries_of("unpaired", "tokens")
    + entries_of("bco", "sequence")
    + entries_of("tr_dpo_soft_update", "parameters")
  )
  left = collections.Counter(
    filter(None, map(without_counterpart, GOLDEN["entries"]))
  )
  ids = [p.values[0]["id"] for p in run]
  assert len(ids) == len(set(ids))
  assert left == NOT_OURS_BY_DESIGN
  assert len(run) + left.total() == len(GOLDEN["entries"]) == 184


def test_every_loss_of_trl_is_one_of_ours():
  theirs = {
    name for e in GOLDEN["entries"] for name in e["loss"].split("+")
  } - {"preference"}
  assert theirs <= COVERED


def array(x):
  """Numbers as float64, among them the strings nan, inf and -inf."""
  return np.array(x, dtype=object).astype(np.float64)


def make_loss(entry):
  """Our loss for an entry."""
  h = entry["hyperparameters"]
  named = entry["loss"].split("+")
  if isinstance(h.get("loss_type"), list):
    named = h["loss_type"]
  weights = h.get("loss_weights", [1.0] * len(named))
  parts = [
    (weight, make_one(name, entry))
    for weight, name in zip(weights, named, strict=True)
  ]
  modifiers = {}
  if "f_divergence_type" in h:
    modifiers["divergence"] = {
      "forward_kl": "forward_kl",
      "js_divergence": "js",
      "alpha_divergence": "alpha",
    }[h["f_divergence_type"]]
    alpha = h.get("f_alpha_divergence_coef", 0.5)
    if "f_divergence_params" in h:  # (1 - u^-a) / a
      alpha = 1 - h["f_divergence_params"]["alpha_divergence_coef"]
    modifiers["divergence_alpha"] = float(alpha)
  if "ld_alpha" in h:
    modifiers["ld_alpha"] = float(h["ld_alpha"])
  if "use_weighting" in h:
    modifiers["wpo"] = h["use_weighting"]
  return losses.mix(*parts, **modifiers)


def make_one(name, entry):
  h, ours = entry["hyperparameters"], RENAMED_LOSSES.get(name, name)
  options = {
    key: h[theirs]
    for key, theirs in (
      ("beta", "beta"),
      ("lam", "beta"),
      ("tau", "discopop_tau"),
      ("label_smoothing", "label_smoothing"),
      ("desirable_weight", "desirable_weight"),
      ("undesirable_weight", "undesirable_weight"),
      ("gamma", "simpo_gamma"),
      ("gamma", "tpo_l_gamma"),
    )
    if theirs in h
  }
  if entry["family"] == "cpo":
    ours = {"dpo": "cpo"}.get(ours, ours)
    if "alpha" in h:
      ours, options["alpha"] = "alphapo", h["alpha"]
  if entry["family"] == "tpo":
    ours = {"dpo": "tpo"}.get(ours, ours)
  if ours in ("cpo", "tpo", "tpo_l"):  # the likelihood is another term
    options["alpha"] = 0.0
  if ours == "ipo":
    # Log-probs that are means already, or sums on purpose, are not divided.
    means = entry["inputs"].get("logps_are_token_means", False)
    whole = means or entry["family"] == "dpo_legacy"
    options["average"] = "sum" if whole else "tokens"
  # TRL 0.29 and later take a smoothing for dpo and ignore it.
  ignored = {"label_smoothing"} if entry["family"] == "dpo" else set()
  known = losses.defaults(ours).keys()
  if ours == "dpo":
    known = known - ignored
  return losses.make(ours, **{k: v for k, v in options.items() if k in known})


RENAMED = {
  "labels": "desirable",
  "policy_KL_logps": "policy_kl_logps",
  "ref_KL_logps": "reference_kl_logps",
  "ref_chosen_logps": "reference_chosen_logps",
  "ref_logps": "reference_logps",
  "ref_rejected_logps": "reference_rejected_logps",
}


def make_inputs(entry):
  """Inputs of our loss from an entry of level "sequence"."""
  x = {
    RENAMED.get(key, key): array(value)
    for key, value in entry["inputs"].items()
    if isinstance(value, list)
  }
  n = len(next(iter(x.values())))
  x |= {"policy_gold_logps": np.zeros(n), "gold_lengths": np.ones(n)}
  if "desirable" in x:
    x["desirable"] = x["desirable"].astype(bool)
  free = entry["hyperparameters"].get("reference_free", False)
  for side in ("chosen", "rejected"):  # CPO is DPO against a flat reference
    if free or f"reference_{side}_logps" not in x:
      x[f"reference_{side}_logps"] = np.zeros(n)
    x.setdefault(f"{side}_lengths", np.ones(n))
  return x


@functools.cache
def compiled(loss, term):
  """(differentiated arrays, the rest) -> each loss, means, gradients."""

  def mean(policy, rest):
    out = loss(**policy, **rest)
    if term == "odds_ratio":  # without the likelihood
      out = out._replace(loss=out.loss - out.metrics["nll_loss"])
    sums = losses.reduce(out)
    means = {k: (s.total / s.count).sum() for k, s in sums.items()}
    return means["loss"], (out, means)

  return quick_jit(jax.value_and_grad(mean, has_aux=True))


def check_metrics(entry, got, ties=0.0):
  """Means of metrics; `got` holds ours under TRL's names."""
  expected = dict(entry["outputs"]["metrics"])
  if entry["loss"] == "apo_zero_unpaired":
    assert expected.pop("kl") == 0  # not estimated
  if ties is None:  # computed at another precision, where ties are others
    expected.pop("rewards/accuracies", None)
  if entry["hyperparameters"].get("reference_free"):
    # Logged with the reference that the loss leaves out.
    expected = {}
  unknown = expected.keys() - got.keys() - NOT_OURS
  unknown -= {"rewards/margins"}  # KTO's: a difference of two of the others
  if entry["loss"] == "sft":  # TRL logs rewards of a reference it has
    unknown = {k for k in unknown if not k.startswith(("rewards", "logps"))}
  assert not unknown
  if entry["hyperparameters"].get("ld_alpha", 1.0) != 1:
    # Logged with a tail that counts less; ours are those of the responses.
    expected = {k: v for k, v in expected.items() if k[:5] != "logps"}
  for key in expected.keys() & got.keys():
    value = array(expected[key]).mean()
    if key == "rewards/accuracies":
      value += 0.5 * ties  # one half here, nothing there
    np.testing.assert_allclose(got[key], value, rtol=2e-5, atol=2e-5)


def tolerance(entry, x64):
  if x64:
    # Of exo TRL keeps the smoothing in float32.
    return 1e-6 if entry["loss"] == "exo_pair" else 1e-9
  return 1e-5 if "random" in entry["id"] else 1e-4


def close(got, expected, rtol):
  expected = array(expected)
  there = np.isfinite(expected)  # where TRL overflows, ours need not
  np.testing.assert_allclose(
    np.asarray(got, np.float64)[there],
    expected[there],
    rtol=rtol,
    atol=rtol * 0.1 * max(1.0, np.abs(expected[there]).max(initial=0)),
  )


def check_each(entry, loss, each, rtol):
  """Losses of examples, term by term."""
  out = entry["outputs"]
  terms = [
    np.asarray(x) / t.coefficient for t, (x, _) in zip(loss.terms, each.terms)
  ]
  expected = out.get("per_example_by_loss_type", [out.get("per_example")])
  for term, got, theirs in zip(
    loss.terms, terms or [each.loss], expected, strict=True
  ):
    if term.name == "sft":  # there TRL repeats the batch's mean
      continue
    if term.name.startswith("aot"):  # TRL's are in the order of their ranks
      got, theirs = np.sort(got), np.sort(array(theirs))
    close(got, theirs, rtol)


def run_sequences(entry, x64, x, differentiated, assemble=lambda x: x):
  """Checks an entry whose inputs become those of a loss by `assemble`."""
  loss, rtol = make_loss(entry), tolerance(entry, x64)
  out = entry["outputs"]
  with jax.enable_x64(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    x = {
      k: jnp.asarray(v, bool if k == "desirable" else dtype)
      for k, v in x.items()
    }
    policy = {k: x.pop(k) for k in differentiated}

    def whole(**inputs):
      return loss(**assemble(inputs))

    key = loss if assemble is identity else whole
    (mean, (each, means)), grads = compiled(key, entry["loss"])(policy, x)
    margins = each.metrics.get("rewards/margins", jnp.ones(1))
    ties = float((margins == 0).mean())
  if np.isfinite(array(out["loss"])):
    close(mean, out["loss"], rtol)
  assert np.isfinite(mean)
  check_each(entry, loss, each, rtol)
  for name, grad in grads.items():
    theirs = {ours: trl for trl, ours in RENAMED.items()}.get(name, name)
    if theirs in out["grads"]:
      close(grad, out["grads"][theirs], rtol)
    else:
      assert not np.asarray(grad).any()
    assert np.isfinite(grad).all()
  if "zero_logp" not in entry["id"]:
    same = x64 == (entry["dtype"] == "float64")
    check_metrics(entry, means, ties if same else None)


def identity(x):
  return x


@pytest.mark.parametrize("x64", [True, False], ids=["f64", "f32"])
@pytest.mark.parametrize("entry", entries("sequence"))
def test_sequences(entry, x64):
  if x64 and entry["dtype"] == "float32":
    x64 = False  # recorded in float32: no better is known
  x = make_inputs(entry)
  loss = make_loss(entry)
  differentiated = [k for k in loss.needs if k.startswith("policy_")]
  run_sequences(entry, x64, x, differentiated, identity)


@pytest.mark.parametrize("x64", [True, False], ids=["f64", "f32"])
@pytest.mark.parametrize("entry", entries("token"))
def test_tokens(entry, x64):
  x = {k: array(v) for k, v in entry["inputs"].items()}

  def sums(x):
    """What a loss reads of token arrays: sums over the response, lengths."""
    out = {}
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
      mask = x[f"{side}_mask"]
      out[f"{side}_lengths"] = mask.sum(axis=-1)
      for model, ours in (("policy", "policy"), ("ref", "reference")):
        each = x[f"{model}_{side}_token_logps"]
        out[f"{ours}_{side}_logps"] = (each * mask).sum(axis=-1)
        out[f"{ours}_{side}_tail_logps"] = losses.tail_logps(
          each, mask, x[f"{other}_mask"].sum(axis=-1)
        )
      squares = f"policy_{side}_token_log_sum_sq_probs"
      if squares in x:
        out[f"{side}_confidence"] = losses.confidence(
          x[f"policy_{side}_token_logps"], x[squares], mask
        )
    return out

  differentiated = [
    k for k in x if k.startswith("policy") and k.endswith("token_logps")
  ]
  run_sequences(entry, x64, x, differentiated, sums)


def score_logits(logits, ids):
  """Token log-probs and log sums of squares f[B T] of given logits, through the
  tiled head: hidden states that are the logits, an identity as unembedding."""
  rows, length, vocabulary = logits.shape
  both = logps.token_logps_and_squares(
    logits[:, :-1].reshape(-1, vocabulary),
    jnp.eye(vocabulary),
    ids[:, 1:].reshape(-1),
    tile=5,
  )
  shift = ((0, 0), (1, 0))
  return [jnp.pad(x.reshape(rows, length - 1), shift) for x in both]


def parts_of(model, tokens, squares, mask, sides=("chosen", "rejected")):
  """What a loss reads of rows that hold one side after the other."""
  tokens, squares, mask = (
    jnp.split(x, len(sides)) for x in (tokens, squares, mask)
  )
  inputs = {}
  for i, side in enumerate(sides):
    inputs[f"{model}_{side}_logps"] = (tokens[i] * mask[i]).sum(axis=1)
    inputs[f"{side}_lengths"] = mask[i].sum(axis=1)
    if i < 2:
      other = mask[1 - i].sum(axis=1)
      inputs[f"{model}_{side}_tail_logps"] = losses.tail_logps(
        tokens[i], mask[i], other
      )
    if model == "policy" and side != "gold":
      inputs[f"{side}_confidence"] = losses.confidence(
        tokens[i], squares[i], mask[i]
      )
  return inputs


@pytest.mark.parametrize("entry", entries("logits"))
def test_logits_through_the_head(entry):
  loss, x, out = make_loss(entry), entry["inputs"], entry["outputs"]
  ids = np.array(x["input_ids"], np.int32)
  mask = np.array(x["completion_mask"], np.float32)
  reference = score_logits(jnp.float32(array(x["ref_logits"])), ids)

  def mean(logits):
    each = score_logits(logits, ids)
    inputs = parts_of("policy", *each, mask)
    inputs |= parts_of("reference", *reference, mask)
    result = loss(**inputs)
    means = {k: s.mean() for k, s in losses.reduce(result).items()}
    return means["loss"], (result, each[0], means)

  (value, (result, each, means)), grad = quick_jit(
    jax.value_and_grad(mean, has_aux=True)
  )(jnp.float32(array(x["policy_logits"])))
  close(value, out["loss"], 1e-5)
  check_each(entry, loss, result, 1e-5)
  close((each * mask)[:, 1:], out["policy_token_logps"], 1e-5)
  close((reference[0] * mask)[:, 1:], out["ref_token_logps"], 1e-5)
  close(grad, out["grads"]["policy_logits"], 1e-5)
  check_metrics(entry, means)


@pytest.mark.parametrize("entry", entries("logits", only=adds_likelihood))
def test_likelihoods_beside_a_preference_from_logits(entry):
  """TRL's NLL of CPO and TPO is a mean over all tokens, which is `sft`'s; our
  own, in `cpo` and `tpo`, is one a response."""
  h, x, out = entry["hyperparameters"], entry["inputs"], entry["outputs"]
  ids = np.array(x["input_ids"], np.int32)
  mask = np.array(x["completion_mask"], np.float32)
  sides = ("chosen", "rejected", "gold")[: 3 if entry["family"] == "tpo" else 2]
  alpha = h.get("cpo_alpha", h.get("tpo_alpha"))
  loss = make_loss(entry)
  # Log-probs a token, where TRL's version of a loss has them and ours has not.
  divided = entry["loss"] == "ipo"

  def mean(logits):
    inputs = parts_of("policy", *score_logits(logits, ids), mask, sides)
    zeros = jnp.zeros_like(inputs["policy_chosen_logps"])
    inputs |= {f"reference_{side}_logps": zeros for side in sides[:2]}
    result = loss(**inputs)
    imitated = sides[-1] if len(sides) == 3 else "chosen"
    nll = losses.sft(
      inputs[f"policy_{imitated}_logps"], inputs[f"{imitated}_lengths"]
    )
    means = {k: s.mean() for k, s in losses.reduce(result).items()}
    nll = losses.reduce(nll)["loss"].mean()
    means["nll_loss"] = alpha * nll if alpha == 0 else nll
    if divided or entry["loss"] in ("simpo", "tpo-l"):  # as TRL logs them
      for side in ("chosen", "rejected"):
        each = inputs[f"policy_{side}_logps"] / inputs[f"{side}_lengths"]
        means[f"logps/{side}"] = each.mean()
        means[f"rewards/{side}"] = h["beta"] * each.mean()
      means["rewards/margins"] = (
        means["rewards/chosen"] - means["rewards/rejected"]
      )
    return means["loss"] + alpha * nll, (result.loss, means)

  (value, (each, means)), grad = quick_jit(
    jax.value_and_grad(mean, has_aux=True)
  )(jnp.float32(array(x["policy_logits"])))
  close(value, out["loss"], 1e-5)
  close(each, out["per_example_preference_term"], 1e-5)
  close(grad, out["grads"]["policy_logits"], 1e-5)
  check_metrics(entry, means)


@pytest.mark.parametrize("entry", entries_of("bco", "sequence"))
def test_bco_over_consecutive_batches(entry):
  """TRL's delta is one mean of all rewards, kept in float32."""
  h = entry["hyperparameters"]
  loss, state = losses.make("bco", beta=h["beta"], shift="pooled"), None
  with jax.enable_x64(True):
    for step in entry["outputs"]["steps"]:
      x, out = step["inputs"], step["outputs"]
      liked, disliked = (
        array(x[f"policy_{side}_logps"]) for side in ("chosen", "rejected")
      )
      ratios = np.ones(len(liked) + len(disliked))
      if "udm" in h:  # odds of belonging to the prompts of the desirable ones
        p = array(x["prob_rejected_prompt_is_from_desirable_set"])
        limits = h["min_density_ratio"], h["max_density_ratio"]
        ratios[len(liked) :] = np.clip(p / (1 - p + 1e-8), *limits)
      known = [array(x[f"ref_{side}_logps"]) for side in ("chosen", "rejected")]

      inputs = {
        "reference_logps": np.concatenate(known),
        "desirable": np.arange(len(ratios)) < len(liked),
        "density_ratios": ratios,
        "state": state,
      }

      def mean(policy, inputs=inputs):
        result = loss(policy_logps=policy, **inputs)
        return losses.reduce(result)["loss"].mean(), result

      policy = jnp.asarray(np.concatenate([liked, disliked]))
      (value, result), grad = jax.value_and_grad(mean, has_aux=True)(policy)
      state = result.state
      close(value, out["loss"], 1e-6)
      close(result.loss, out["per_example_chosen_then_rejected"], 1e-6)
      close(result.metrics["delta"][0], out["delta"], 1e-6)
      assert sum(s.count for s in state) == out["running"]["count"]
      close(grad[: len(liked)], out["grads"]["policy_chosen_logps"], 1e-6)
      close(grad[len(liked) :], out["grads"]["policy_rejected_logps"], 1e-6)


@pytest.mark.parametrize(
  "entry", entries_of("tr_dpo_soft_update", "parameters")
)
def test_a_reference_mixed_with_the_policy(entry):
  with jax.enable_x64(True):
    mixed = losses.mix_reference(
      *(
        jnp.asarray(array(entry["inputs"][k])) for k in ("reference", "policy")
      ),
      entry["hyperparameters"]["ref_model_mixup_alpha"],
    )
    close(mixed, entry["outputs"]["reference_after"], 1e-9)


@pytest.mark.parametrize("entry", entries_of("orpo", "logits"))
def test_orpo_from_logits_with_trls_likelihood_of_prompt_and_response(entry):
  x, out = entry["inputs"], entry["outputs"]
  ids = np.array(x["input_ids"], np.int32)
  mask = np.array(x["completion_mask"], np.float32)
  seen = np.array(x["attention_mask"], np.float32)
  seen[:, 0] = 0  # nothing predicts the first token

  def mean(logits):
    each = score_logits(logits, ids)
    inputs = parts_of("policy", *each, mask)
    odds = make_loss(entry)(**inputs)
    term = odds.loss - odds.metrics["nll_loss"]
    whole = parts_of("policy", *each, seen)
    likelihood = losses.sft(
      whole["policy_chosen_logps"], whole["chosen_lengths"]
    )
    nll = losses.reduce(likelihood)["loss"].mean()
    means = {k: s.mean() for k, s in losses.reduce(odds).items()}
    for side in ("chosen", "rejected"):  # TRL logs means a token here
      length = inputs[f"{side}_lengths"]
      means[f"logps/{side}"] = (inputs[f"policy_{side}_logps"] / length).mean()
    return nll + term.mean(), (term, means | {"nll_loss": nll})

  (value, (term, means)), grad = quick_jit(
    jax.value_and_grad(mean, has_aux=True)
  )(jnp.float32(array(x["policy_logits"])))
  close(value, out["loss"], 1e-5)
  close(-term, out["per_example_minus_preference_term"], 1e-5)
  close(grad, out["grads"]["policy_logits"], 1e-5)
  check_metrics(entry, means)


# Whole training runs


def make_examples(rows, kind, desirable=None):
  """Examples of (prompt, first, second) lists of token ids."""
  lengths = np.array([[len(x) for x in row] for row in rows], np.int32)
  n = len(rows)
  flat = [t for row in rows for x in row for t in x]
  return Examples(
    tokens=np.array(flat, np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths.sum(axis=1))]),
    prompt_lengths=lengths[:, 0],
    lengths=lengths[:, 1:],
    desirable=np.array([True] * n if desirable is None else desirable, bool),
    margins=np.zeros(n, np.float32),
    rows=np.arange(n),
    subsets=np.zeros(n, np.int32),
    subset_names=("",),
    kind=kind,
    format="golden",
    report={},
    fingerprint="",
  )


def split_rows(batch, prefix=""):
  """(prompt, response) of every padded row of a batch of TRL's."""
  out = []
  for ids, attended, scored in zip(
    batch[f"{prefix}input_ids"],
    batch[f"{prefix}attention_mask"],
    batch[f"{prefix}completion_mask"],
    strict=True,
  ):
    prompt = sum(attended) - sum(scored)
    out.append((ids[:prompt], ids[prompt : sum(attended)]))
  return out


def make_plan(batches):
  """Our plan over TRL's batches, in their order."""
  rows, labels, kind = [], [], "paired"
  for batch in batches:
    both = split_rows(batch)
    if "label" in batch:
      kind = "unpaired"
      rows += [(p, y, []) for p, y in both]
      labels += batch["label"]
    else:
      half = len(both) // 2
      assert [p for p, _ in both[:half]] == [p for p, _ in both[half:]]
      rows += [(*a, b[1]) for a, b in zip(both[:half], both[half:])]
      labels += [True] * half
  size = len(rows) // len(batches)
  examples = make_examples(rows, kind, labels)
  return Plan(examples, batch_size=size, shuffle=False, rows_multiple=2)


def second_branches(planned):
  """Response of branch 1 of every example, by its index."""
  batch, ids = planned
  return {
    int(ids[row, place]): batch.target[
      row, batch.slot[row] == 2 * place + 1
    ].tolist()
    for row, place in np.argwhere(ids >= 0)
  }


@pytest.mark.parametrize("entry", entries_of("unpaired", "tokens"))
def test_mismatched_completions_are_those_of_trls_collator(entry):
  examples = entry["inputs"]["examples"]
  plan = Plan(
    make_examples(
      [(x["prompt_ids"], x["completion_ids"], []) for x in examples],
      "unpaired",
    ),
    batch_size=len(examples),
    shuffle=False,
  )
  assert second_branches(plan[0]) == {
    i: x["KL_completion_ids"] for i, x in enumerate(examples)
  }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The golden model, and variables of policy and reference, read as any
  checkpoint is."""
  golden = GOLDEN["models"]["tiny_llama_dev"]
  config = llama.config_from_hf(golden["config"])
  model = llama.Model(config)
  abstract = jax.eval_shape(model.init_variables, jax.random.key(0))
  variables = []
  for which in ("policy_init", "reference"):
    folder = tmp_path_factory.mktemp(which)
    safetensors.numpy.save_file(
      {k: np.array(v, np.float32) for k, v in golden[which].items()},
      folder / "model.safetensors",
    )
    variables.append(hf.load_variables(folder, llama.HF_NAMES, abstract))
  return model, *variables


@functools.cache
def compiled_step(model, loss, microbatches, rate):
  return quick_jit(
    functools.partial(
      train_step,
      score=score.Score(model, tile=7),
      loss=loss,
      tx=optax.sgd(rate),
      microbatches=microbatches,
    )
  )


@pytest.mark.parametrize(
  ("entry", "microbatches"),
  [
    pytest.param(*p.values, n, id=f"{p.id}-{n}")
    for p in entries("training_steps")
    for n in ((1, 2) if "kto" in p.id else (1,))  # z0 couples the parts
  ],
)
def test_three_training_steps(entry, microbatches, tiny, tmp_path):
  model, policy, reference = tiny
  batches = entry["inputs"]["batches"]
  plan = make_plan(batches)
  if "label" in batches[0]:  # KTO: the same completions are mismatched
    for s, batch in enumerate(batches):
      theirs = [y for _, y in split_rows(batch, "KL_")]
      mine = second_branches(plan[s])
      assert [mine[i] for i in sorted(mine)] == theirs

  h = entry["hyperparameters"]
  step = compiled_step(
    model, make_loss(entry), microbatches, h["learning_rate"]
  )
  zero = jnp.int32(0)
  state = TrainState(zero, policy, optax.sgd(1.0).init(policy), zero)
  logs = entry["outputs"]["logs_per_step"]
  assert len(logs) == h["steps"] == 3
  for s, log in enumerate(logs):
    state, sums = step(state, reference, plan[s % len(plan)].batch)
    means = {k: float(v.mean()) for k, v in sums.items()}
    shared = log.keys() & means.keys()
    assert log.keys() - shared <= NOT_OURS | {"rewards/margins"}
    for key in shared:
      np.testing.assert_allclose(
        means[key], log[key], rtol=1e-5, atol=2e-5, err_msg=f"{key} step {s}"
      )
    if "kl" in log:
      np.testing.assert_allclose(
        means["rewards/chosen"] - means["rewards/rejected"],
        log["rewards/margins"],
        rtol=1e-5,
        atol=2e-5,
      )

  hf.save_checkpoint(tmp_path / "after", llama, model.config, state.params)
  after = safetensors.numpy.load_file(tmp_path / "after" / "model.safetensors")
  norms = entry["outputs"]["final_param_l2_norms"]
  assert after.keys() == norms.keys()
  for key, norm in norms.items():
    np.testing.assert_allclose(np.linalg.norm(after[key]), norm, rtol=1e-6)
  np.testing.assert_allclose(
    after["lm_head.weight"][4],
    entry["outputs"]["final_lm_head_row4"],
    rtol=1e-5,
    atol=1e-6,
  )


def test_the_tiny_models_give_the_golden_logits(tiny):
  model, policy, reference = tiny
  (entry, *_) = (p.values[0] for p in entries("training_steps"))
  ids = np.array(entry["inputs"]["batches"][0]["input_ids"][:1], np.int32)
  at = np.arange(ids.shape[1], dtype=np.int32)[None]
  for variables, key in ((policy, "policy"), (reference, "reference")):
    hidden = model.apply(variables, ids, at, 0 * at, at + 1)
    np.testing.assert_allclose(
      (hidden @ model.unembed(variables).T)[0],
      entry["outputs"][f"{key}_logits_first_batch_row0"],
      rtol=1e-5,
      atol=1e-5,
    )
