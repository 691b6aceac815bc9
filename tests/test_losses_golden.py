"""The numbers of TRL's own code, from the losses, the head and the step."""

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
from dpo_jax.train_step import TrainState, train_step

FILE = SHARED / "golden" / "losses_trl.json"
pytestmark = pytest.mark.skipif(
  not FILE.exists(), reason=f"golden numbers {FILE} are not on this machine"
)
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {"entries": []}

# Most programs here run once; optimising them would take longer.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# What TRL calls a loss, where we have it under any name.
COVERED = {"dpo", "ipo", "kto", "odds_ratio", "orpo", "sft", "sigmoid"}
COVERED |= {"unpaired"}  # the pairing of KTO's mismatched completions
NOT_YET = {
  "aot": "sorts across the batch",
  "aot_unpaired": "sorts across the batch",
  "apo_down": "not a registered loss",
  "apo_zero": "not a registered loss",
  "apo_zero+ipo+hinge": "mixtures",
  "apo_zero_unpaired": "not a registered loss",
  "bco": "keeps a running mean",
  "bco_pair": "not a registered loss",
  "discopop": "not a registered loss",
  "exo_pair": "not a registered loss",
  "hinge": "not a registered loss",
  "nca_pair": "not a registered loss",
  "preference": "padded rows and their truncation; ours are packed",
  "robust": "not a registered loss",
  "sigmoid+bco_pair": "mixtures",
  "sigmoid+bco_pair+sft": "mixtures",
  "sigmoid+nca_pair": "mixtures",
  "sigmoid+sft": "mixtures",
  "sigmoid_norm": "not a registered loss",
  "simpo": "not a registered loss",
  "sppo_hard": "not a registered loss",
  "tpo-l": "not a registered loss",
  "tr_dpo_soft_update": "the reference is fixed",
}
# Hyper-parameters that turn a covered loss into another, but at this value.
NOT_YET_OPTIONS = {
  "cpo_alpha": (0.0, "mixtures"),
  "f_divergence_type": ("reverse_kl", "reverse KL alone"),
  "ld_alpha": (1.0, "no length desensitisation"),
  "tpo_alpha": (0.0, "mixtures"),
  "use_weighting": (False, "no weights from the policy"),
}
# Metrics of TRL that need full logits, or are differences of ours.
NOT_OURS = {
  "entropy", "epoch", "learning_rate", "logits/chosen", "logits/rejected",
  "mean_token_accuracy", "num_tokens",
}  # fmt: skip


def not_yet(entry):
  """Why an entry cannot be reproduced; None if it is below."""
  if entry["loss"] in NOT_YET:
    return NOT_YET[entry["loss"]]
  for key, value in entry["hyperparameters"].items():
    if key in NOT_YET_OPTIONS and value != NOT_YET_OPTIONS[key][0]:
      return NOT_YET_OPTIONS[key][1]
  return None


def entries(*levels, loss=None):
  """Covered entries of some levels, as parameters named by their ids."""
  return [
    pytest.param(e, id=e["id"])
    for e in GOLDEN["entries"]
    if e["level"] in levels
    and not_yet(e) is None
    and (e["loss"] == loss or (loss is None and e["loss"] != "orpo"))
  ]


def test_every_entry_is_reproduced_here_or_says_why_not():
  known = COVERED | NOT_YET.keys()
  assert {e["loss"] for e in GOLDEN["entries"]} <= known
  left = sum(not_yet(e) is not None for e in GOLDEN["entries"])
  run = (
    entries("sequence", "token", "logits", "training_steps")
    + entries("logits", loss="orpo")
    + entries("tokens", loss="unpaired")
  )
  assert len(run) + left == len(GOLDEN["entries"])
  assert len(run) > 50


def test_no_excuse_is_stale():
  used = {e["loss"] for e in GOLDEN["entries"]}
  assert used >= NOT_YET.keys()
  assert used >= COVERED
  assert not COVERED & NOT_YET.keys()
  assert not set(losses.names()) & NOT_YET.keys()
  options = {k for e in GOLDEN["entries"] for k in e["hyperparameters"]}
  assert NOT_YET_OPTIONS.keys() <= options
  ours = {k for name in losses.names() for k in losses.defaults(name)}
  assert not ours & NOT_YET_OPTIONS.keys()


def array(x):
  """Numbers as float64, among them the strings nan, inf and -inf."""
  return np.array(x, dtype=object).astype(np.float64)


def make_loss(entry):
  """Our loss for an entry."""
  h = entry["hyperparameters"]
  loss = entry["loss"]
  if isinstance(h.get("loss_type"), list):
    (loss,) = h["loss_type"]
  if loss == "kto":
    keys = ("beta", "desirable_weight", "undesirable_weight")
    return losses.make("kto", **{k: h[k] for k in keys if k in h})
  if loss in ("odds_ratio", "orpo"):
    return losses.make("orpo", lam=h["beta"])
  if loss == "ipo":
    # Log-probs that are means already, or sums on purpose, are not divided.
    means = entry["inputs"].get("logps_are_token_means", False)
    whole = means or entry["family"] == "dpo_legacy"
    average = "sum" if whole else "tokens"
    return losses.make("ipo", beta=h["beta"], average=average)
  if loss == "sft":
    return losses.make("sft")
  smoothing = h.get("label_smoothing", 0.0)
  if entry["family"] == "dpo":  # TRL 0.29 and later take it and ignore it
    smoothing = 0.0
  return losses.make("dpo", beta=h["beta"], label_smoothing=smoothing)


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
    means = {k: s.total / s.count for k, s in sums.items()}
    return means["loss"], (out, means)

  return quick_jit(jax.value_and_grad(mean, has_aux=True))


def check_metrics(entry, got, ties=0.0):
  """Means of metrics; `got` holds ours under TRL's names."""
  expected = dict(entry["outputs"]["metrics"])
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
  for key in expected.keys() & got.keys():
    value = array(expected[key]).mean()
    if key == "rewards/accuracies":
      value += 0.5 * ties  # one half here, nothing there
    np.testing.assert_allclose(got[key], value, rtol=2e-5, atol=2e-5)


def tolerance(entry, x64):
  if x64:
    return 1e-9
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
  if entry["loss"] != "sft":  # there TRL repeats the batch's mean
    close(each.loss, out["per_example"], rtol)
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
    for side in ("chosen", "rejected"):
      mask = x[f"{side}_mask"]
      out[f"{side}_lengths"] = mask.sum(axis=-1)
      for model, ours in (("policy", "policy"), ("ref", "reference")):
        each = x[f"{model}_{side}_token_logps"]
        out[f"{ours}_{side}_logps"] = (each * mask).sum(axis=-1)
    return out

  differentiated = [k for k in x if k.startswith("policy")]
  run_sequences(entry, x64, x, differentiated, sums)


def score_logits(logits, ids):
  """Token log-probs f[B T] of given logits, through the tiled head: hidden
  states that are the logits, and an unembedding that is the identity."""
  rows, length, vocabulary = logits.shape
  each = logps.token_logps(
    logits[:, :-1].reshape(-1, vocabulary),
    jnp.eye(vocabulary),
    ids[:, 1:].reshape(-1),
    tile=5,
  )
  return jnp.pad(each.reshape(rows, length - 1), ((0, 0), (1, 0)))


def halves(each, mask):
  """First half of the rows chosen, second rejected: sums and lengths."""
  logps = jnp.split((each * mask).sum(axis=1), 2)
  lengths = jnp.split(mask.sum(axis=1), 2)
  return dict(zip(("chosen", "rejected"), zip(logps, lengths), strict=True))


@pytest.mark.parametrize("entry", entries("logits"))
def test_logits_through_the_head(entry):
  loss, x, out = make_loss(entry), entry["inputs"], entry["outputs"]
  ids = np.array(x["input_ids"], np.int32)
  mask = np.array(x["completion_mask"], np.float32)
  reference = score_logits(jnp.float32(array(x["ref_logits"])), ids)

  def mean(logits):
    each = score_logits(logits, ids)
    inputs = {}
    for model, table in (("policy", each), ("reference", reference)):
      for side, (total, length) in halves(table, mask).items():
        inputs[f"{model}_{side}_logps"] = total
        inputs[f"{side}_lengths"] = length
    result = loss(**inputs)
    means = {k: s.mean() for k, s in losses.reduce(result).items()}
    return means["loss"], (result.loss, each, means)

  (value, (each_loss, each, means)), grad = quick_jit(
    jax.value_and_grad(mean, has_aux=True)
  )(jnp.float32(array(x["policy_logits"])))
  close(value, out["loss"], 1e-5)
  close(each_loss, out["per_example"], 1e-5)
  close((each * mask)[:, 1:], out["policy_token_logps"], 1e-5)
  close((reference * mask)[:, 1:], out["ref_token_logps"], 1e-5)
  close(grad, out["grads"]["policy_logits"], 1e-5)
  check_metrics(entry, means)


@pytest.mark.parametrize("entry", entries("logits", loss="orpo"))
def test_orpo_from_logits_with_trls_likelihood_of_prompt_and_response(entry):
  x, out = entry["inputs"], entry["outputs"]
  ids = np.array(x["input_ids"], np.int32)
  mask = np.array(x["completion_mask"], np.float32)
  seen = np.array(x["attention_mask"], np.float32)
  seen[:, 0] = 0  # nothing predicts the first token

  def mean(logits):
    each = score_logits(logits, ids)
    inputs = {}
    for side, (total, length) in halves(each, mask).items():
      inputs |= {f"policy_{side}_logps": total, f"{side}_lengths": length}
    odds = make_loss(entry)(**inputs)
    term = odds.loss - odds.metrics["nll_loss"]
    likelihood = losses.sft(*halves(each, seen)["chosen"])
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
    chosen_lengths=lengths[:, 1],
    rejected_lengths=lengths[:, 2],
    desirable=np.array([True] * n if desirable is None else desirable, bool),
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


@pytest.mark.parametrize("entry", entries("tokens", loss="unpaired"))
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
      score=score.make_score(model, tile=7),
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
