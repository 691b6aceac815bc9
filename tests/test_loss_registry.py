"""The registry: losses by name, mixtures, modifiers, and what is refused."""

import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import NAMES, as_jax, random_inputs

from dpo_jax import losses
from dpo_jax.losses import registry as registry_module

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_needs_are_the_positional_parameters_of_the_signature():
  pair = ("policy_chosen_logps", "policy_rejected_logps")
  reference = ("reference_chosen_logps", "reference_rejected_logps")
  lengths = ("chosen_lengths", "rejected_lengths")
  expected = {
    "dpo": (pair + reference, "paired", True, False),
    "ipo": (pair + reference + lengths, "paired", True, False),
    "kto": (
      (
        "policy_logps", "reference_logps", "policy_kl_logps",
        "reference_kl_logps", "desirable", "weights",
      ),
      "unpaired", True, True,
    ),
    "orpo": (pair + lengths, "paired", False, False),
    "sft": (("policy_chosen_logps", "chosen_lengths"), "sft", False, False),
  }  # fmt: skip
  for name, facts in expected.items():
    x = losses.make(name)
    assert (x.needs, x.kind, x.needs_reference, x.batch_coupled) == facts


def test_a_made_loss_is_the_function_with_its_options_and_hashable():
  x = as_jax(random_inputs())
  made = losses.make("dpo", beta=0.3)
  plain = losses.dpo(*(x[key] for key in made.needs), beta=0.3)
  np.testing.assert_array_equal(made(**x).loss, plain.loss)
  assert made == losses.make("dpo", beta=0.3, label_smoothing=0.0)
  assert hash(made) == hash(losses.make("dpo", beta=0.3))
  assert made != losses.make("dpo")
  assert losses.make("dpo") == losses.make("dpo", beta=0.1)
  with pytest.raises(AttributeError):
    made.name = "ipo"


def test_defaults_are_those_of_the_signature():
  assert losses.defaults("dpo") == {"beta": 0.1, "label_smoothing": 0.0}
  assert losses.defaults("ipo") == {"beta": 0.1, "average": "sum"}
  assert losses.defaults("orpo") == {"lam": 0.1}
  assert losses.defaults("sft") == {}
  assert dict(losses.make("orpo").options) == {"lam": 0.1}


def test_a_whole_number_is_a_fine_float():
  made = losses.make("dpo", beta=1)
  assert made == losses.make("dpo", beta=1.0)
  assert isinstance(dict(made.options)["beta"], float)


def test_an_unknown_loss_is_refused_naming_the_known_ones():
  with pytest.raises(ValueError, match="unknown loss 'kt0'") as e:
    losses.make("kt0")
  assert "did you mean 'kto'?" in str(e.value)
  assert all(name in str(e.value) for name in NAMES)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("dpo", {"bet": 0.1}, ["'dpo'", "'bet'", "'beta'", "label_smoothing"]),
    ("sft", {"beta": 0.1}, ["'sft'", "'beta'", "none"]),
    ("orpo", {"beta": 0.1}, ["'orpo'", "'beta'", "lam"]),
    ("dpo", {"beta": "0.1"}, ["'dpo'", "beta='0.1'", "float"]),
    ("dpo", {"beta": True}, ["beta=True", "float"]),
    ("dpo", {"beta": None}, ["beta=None", "float"]),
    ("ipo", {"average": 1}, ["average=1", "str"]),
    ("ipo", {"average": "mean"}, ["average='mean'", "'sum'", "'tokens'"]),
    ("dpo", {"beta": -0.1}, ["beta=-0.1"]),
    ("dpo", {"beta": float("nan")}, ["beta=nan"]),
    ("dpo", {"label_smoothing": 0.6}, ["label_smoothing=0.6", "0.5"]),
    ("dpo", {"label_smoothing": -0.1}, ["label_smoothing=-0.1", "0.0"]),
    ("ipo", {"beta": 0}, ["beta=0"]),
    ("kto", {"beta": -1}, ["beta=-1"]),
    ("orpo", {"lam": -1}, ["lam=-1"]),
  ],
)
def test_a_wrong_hyper_parameter_is_refused_in_one_line(name, options, words):
  with pytest.raises(ValueError) as e:
    losses.make(name, **options)
  assert all(word in str(e.value) for word in words)
  assert "\n" not in str(e.value)


def test_a_missing_input_is_named():
  with pytest.raises(TypeError, match="reference_rejected_logps"):
    losses.make("dpo")(
      policy_chosen_logps=0.0,
      policy_rejected_logps=0.0,
      reference_chosen_logps=0.0,
    )


@pytest.fixture
def registry(monkeypatch):
  """A registry that forgets what a test adds."""
  held = dict(registry_module._REGISTRY)
  monkeypatch.setattr(registry_module, "_REGISTRY", held)


def test_a_loss_of_ones_own_is_made_by_name(registry):
  @losses.register
  def ramp(policy_chosen_logps, policy_rejected_logps, *, margin: float = 1.0):
    gap = policy_chosen_logps - policy_rejected_logps
    return losses.LossOutput(jnp.maximum(0.0, margin - gap), {})

  made = losses.make("ramp", margin=2.0)
  assert "ramp" in losses.names()
  assert made.kind == "paired"
  assert not made.needs_reference
  assert not made.batch_coupled
  x = as_jax(random_inputs()) | {
    "policy_chosen_logps": jnp.array([-3.0]),
    "policy_rejected_logps": jnp.array([-3.5]),
  }
  assert made(**x).loss == 2 - (-3 - -3.5)
  # Integers and halves are computed in float32 there too.
  assert ramp(jnp.array([1]), jnp.array([2], jnp.int8)).loss.dtype == "float32"


def test_a_loss_that_asks_for_what_nobody_has_is_refused(registry):
  def greedy(policy_chosen_logits):
    pass

  with pytest.raises(TypeError, match="'policy_chosen_logits'") as e:
    losses.register(greedy)
  assert "policy_chosen_logps" in str(e.value)
  assert "greedy" not in losses.names()


def test_a_hyper_parameter_without_a_default_is_refused(registry):
  def bare(policy_chosen_logps, *, beta):
    pass

  with pytest.raises(TypeError, match="'beta' needs a default"):
    losses.register(bare)


def test_open_ended_signatures_are_refused(registry):
  def anything(*args, **kwargs):
    pass

  with pytest.raises(TypeError, match="'args'"):
    losses.register(anything)


def test_a_name_is_not_taken_from_another_module(registry):
  def dpo(policy_chosen_logps):
    pass

  with pytest.raises(
    ValueError, match=r"already registered by dpo_jax\.losses"
  ):
    losses.register(dpo)
  assert losses.make("dpo").kind == "paired"


@pytest.mark.parametrize("wall", ["walled", "open"])
def test_the_losses_need_jax_and_nothing_else(wall):
  """With all else out of reach, and in reach but left alone."""
  script = """
    import sys

    FINE = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy"}
    FINE |= {"dpo_jax"} | set(sys.stdlib_module_names)

    class Wall:
      # Finds what is allowed; the rest is as if it were not installed.

      def __init__(self, finders):
        self.finders = finders

      def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in FINE or top.startswith("_sysconfigdata"):
          for finder in self.finders:
            if found := finder.find_spec(name, path, target):
              return found

    heavy = {"flax", "optax", "orbax", "tensorflow", "safetensors", "grain"}
    heavy |= {"absl", "ml_collections", "torch", "tokenizers", "jinja2"}
    if sys.argv[1] == "walled":
      sys.meta_path[:] = [Wall(sys.meta_path[:])]
      for absent in heavy:
        try:
          __import__(absent)
        except ModuleNotFoundError:
          continue
        raise SystemExit(f"the wall lets {absent} through")
    import jax
    from dpo_jax import losses
    assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    ours = {m for m in sys.modules if m.startswith("dpo_jax.")}
    assert all(m.startswith("dpo_jax.losses") for m in ours), ours
    for name in losses.names():
      loss = losses.make(name)
      def total(inputs):
        return loss(**inputs).loss.sum()
      inputs = dict.fromkeys(losses.INPUTS, jax.numpy.full(2, -1.0))
      inputs |= {k: jax.numpy.ones((2, 3)) for k in inputs if "ranked" in k}
      inputs |= {"state": loss.initial_state()}
      del inputs["training"]
      jax.jit(jax.grad(total))(inputs)
    print("fine", *losses.names())
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script), wall],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert out.stdout.split() == ["fine", *NAMES], out.stderr


def test_hyper_parameters_may_be_numpy_numbers_but_not_infinite():
  assert losses.make("dpo", beta=np.float32(0.5)) == losses.make(
    "dpo", beta=0.5
  )
  with pytest.raises(ValueError, match="beta=inf"):
    losses.make("dpo", beta=float("inf"))


def test_a_made_loss_takes_arrays_by_position_too():
  arrays = [jnp.array([float(i)]) for i in range(4)]
  ours = losses.make("dpo", beta=0.5)(*arrays)
  assert float(ours.loss[0]) == float(losses.dpo(*arrays, beta=0.5).loss[0])


def test_a_loss_that_returns_no_output_is_refused_when_made(registry):
  @losses.register
  def returns_an_array(policy_chosen_logps):
    return -policy_chosen_logps

  with pytest.raises(ValueError, match="LossOutput"):
    losses.make("returns_an_array")


def test_per_token_ipo_says_that_it_needs_lengths():
  one = jnp.ones(1)
  with pytest.raises(ValueError, match="chosen_lengths"):
    losses.ipo(one, one, one, one, average="tokens")


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_may_be_traced(name):
  """As in a sweep under vmap; the numbers are those of plain ones."""
  x, loss = as_jax(random_inputs()), losses.make(name)
  function = loss.terms[0].entry.function
  inputs = {k: x[k] for k in loss.needs if k in x}
  for key, value in loss.options:
    if not isinstance(value, float):
      continue
    values = [value, 0.5 * value + 0.1]
    got = jax.vmap(lambda v, key=key: function(**inputs, **{key: v}).loss)(
      jnp.array(values)
    )
    for v, each in zip(values, got, strict=True):
      expected = function(**inputs, **{key: v}).loss
      np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)


def test_a_number_that_is_no_tracer_is_checked_whatever_its_type():
  one = jnp.ones(1)
  for wrong in (0.5, np.float32(0.5), jnp.float32(0.5)):
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
      losses.robust(one, one, one, one, label_smoothing=wrong)


def test_float32_stays_float32_where_float64_is_to_be_had():
  with jax.enable_x64(True):
    logps = jnp.array([-1.0, -2.0], jnp.float32)
    out = losses.dpo(logps, logps, 0.0, 0.0, beta=np.float64(0.1))
    assert out.loss.dtype == jnp.float32
    state = losses.make("bco").initial_state()
    out = losses.bco(
      logps.astype(jnp.float64), 0.0, jnp.array([True, False]), state=state
    )
    assert out.loss.dtype == jnp.float64
    kept = jax.tree.map(lambda a, b: a.dtype == b.dtype, out.state, state)
    assert jax.tree.all(kept)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_weights_of_a_quarter_are_as_good_as_ones(name):
  x = as_jax(random_inputs(3))
  loss = losses.make(name)
  whole, part = (loss(**x | {"weights": jnp.full(3, w)}) for w in (1.0, 0.25))
  np.testing.assert_allclose(part.loss, whole.loss, rtol=1e-6)


def test_an_input_is_given_once_and_by_a_name_that_exists():
  one = jnp.ones(1)
  with pytest.raises(TypeError, match="'beta' is no input"):
    losses.make("dpo")(one, one, one, one, beta=5.0)
  with pytest.raises(TypeError, match="'policy_chosen_logps' is given twice"):
    losses.make("dpo")(one, one, one, one, policy_chosen_logps=one)
  lengths = dict.fromkeys(losses.make("ipo").needs[:4], one)
  with pytest.raises(TypeError, match="needs chosen_lengths"):
    losses.make("ipo+sft")(**lengths)  # optional for the one, not for the other


def test_more_arguments_than_a_loss_takes_are_not_dropped():
  one = jnp.ones(1)
  with pytest.raises(TypeError):
    losses.dpo(one, one, one, one, 0.2)  # beta goes by name
  with pytest.raises(TypeError, match="given: 5 arrays"):
    losses.make("dpo")(one, one, one, one, one)


# Mixtures and modifiers


def test_a_mixture_is_written_as_a_sum():
  made = losses.make("0.8*dpo + 0.2*bco_pair+sft", beta=0.3)
  assert made.name == "0.8*dpo+0.2*bco_pair+sft"
  assert [t.coefficient for t in made.terms] == [0.8, 0.2, 1.0]
  assert dict(made.options) == {
    "dpo.beta": 0.3,
    "dpo.label_smoothing": 0.0,
    "bco_pair.beta": 0.3,
  }
  assert made == losses.make(made.name, beta=0.3)
  assert made == losses.make(made.name, **dict(made.options))
  assert hash(made) != hash(losses.make(made.name))
  assert made.kind == "paired" and made.needs_reference
  assert not losses.make("simpo+sft").needs_reference


@pytest.mark.parametrize(
  "name",
  ["0.1*dpo", "1e-7*dpo+sft", "3e+20*dpo+2*sft", f"{1 / 3!r}*dpo"],
)
def test_a_name_is_read_back_as_it_is_written(name):
  made = losses.make(name)
  assert losses.make(made.name) == made
  assert made.terms[0].coefficient == float(name.partition("*")[0])


@pytest.mark.parametrize("name", [*NAMES, "dpo+exo+sppo", "0.5*dpo+sft"])
def test_defaults_are_what_is_made_without_options(name):
  assert losses.make(name, **losses.defaults(name)) == losses.make(name)


def test_the_nearest_word_on_a_hyper_parameter_counts():
  made = losses.make(
    "dpo(beta=0.5)+sppo+exo", **{"beta": 0.1, "sppo.beta": 0.2}
  )
  betas = {t.name: dict(t.options)["beta"] for t in made.terms}
  assert betas == {"dpo": 0.5, "sppo": 0.2, "exo": 0.1}
  per_token = losses.make("ipo(average=tokens, beta=1)")
  assert per_token == losses.make("ipo", average="tokens", beta=1.0)


def test_a_coefficient_counts_for_one_term_as_for_several():
  x = as_jax(random_inputs())
  whole, half = losses.make("dpo")(**x), losses.make("0.5*dpo")(**x)
  np.testing.assert_allclose(half.loss, 0.5 * whole.loss, rtol=1e-6)
  mixed = losses.mix((0.5, losses.make("dpo")))
  assert mixed == losses.make("0.5*dpo")


def test_a_mixture_logs_the_terms_it_minimises():
  x = as_jax(random_inputs())
  sums = losses.reduce(losses.make("dpo+0.3*sft")(**x))
  for name in ("dpo", "sft"):
    alone = losses.reduce(losses.make(name)(**x))["loss"].mean()
    np.testing.assert_allclose(sums[f"loss/{name}"].mean(), alone, rtol=1e-6)


def test_mix_gives_terms_options_of_their_own():
  mixed = losses.mix(
    (0.5, losses.make("dpo", beta=0.1)),
    (2, losses.make("0.1*bco_pair+sft", beta=0.01)),
    wpo=True,
  )
  assert mixed.name == "0.5*dpo+0.2*bco_pair+2*sft"
  assert dict(mixed.options)["bco_pair.beta"] == 0.01
  assert dict(mixed.options)["wpo"] is True
  assert "chosen_confidence" in mixed.needs


def test_a_loss_says_how_many_responses_an_example_has():
  expected = {"sft": 1, "kto": 1, "dpo+sft": 2, "plackett_luce": 2, "tpo_l": 3}
  assert {n: losses.make(n).responses for n in expected} == expected


def test_needs_follow_from_terms_and_modifiers():
  plain = losses.make("dpo").needs
  assert losses.make("dpo", ld_alpha=1.0, wpo=False).needs == plain
  tails = [n.replace("_logps", "_tail_logps") for n in plain]
  assert losses.make("dpo", ld_alpha=0.5).needs == (*plain, *tails)
  both = losses.make("dpo+sft", wpo=True).needs
  assert both == (
    *plain, "chosen_lengths", "chosen_confidence", "rejected_confidence"
  )  # fmt: skip


@pytest.mark.parametrize("alone", ["dpo", "ipo", "exo"])
def test_reverse_kl_is_no_modifier(alone):
  assert losses.make(alone, divergence="reverse_kl") == losses.make(alone)
  assert losses.make(alone, divergence_alpha=0.5) == losses.make(alone)


def test_alpha_goes_from_the_forward_to_the_reverse_kl():
  x = as_jax(random_inputs())
  loss = lambda **options: losses.make("dpo", **options)(**x).loss
  for alpha, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
    at = loss(divergence="alpha", divergence_alpha=alpha)
    np.testing.assert_allclose(at, loss(divergence=name), rtol=1e-6)
    near = loss(divergence="alpha", divergence_alpha=alpha + 1e-3)
    np.testing.assert_allclose(near, at, rtol=0.1, atol=1e-2)


def test_a_divergence_score_rises_for_ever_and_is_0_at_the_reference():
  h = jnp.linspace(-500.0, 500, 2001)
  for name in losses.DIVERGENCES:
    score = losses.divergence_score(h, name, 0.5)
    assert np.isfinite(score).all()
    assert (np.diff(score) >= 0).all()
    assert losses.divergence_score(jnp.zeros(()), name, 0.5) == 0
  # Where others clamp and lose the gradient, it goes on.
  slope = jax.grad(lambda h: losses.divergence_score(h, "forward_kl"))
  assert slope(-31.0) == slope(-500.0) > 1e12


def test_rewards_are_logged_as_log_ratios_under_any_divergence():
  x = as_jax(random_inputs())
  js, kl = (losses.make("dpo", divergence=d)(**x) for d in ("js", "reverse_kl"))
  assert js.metrics.keys() == kl.metrics.keys()
  for key, value in kl.metrics.items():
    np.testing.assert_array_equal(js.metrics[key], value)


def test_a_tail_is_what_the_longer_response_has_beyond_the_other():
  token_logps = jnp.array([[-9.0, -1, -2, -4, -8]])
  mask = jnp.array([[0, 1, 1, 1, 1]])  # after a prompt of one
  tails = [
    float(losses.tail_logps(token_logps, mask, jnp.array([n]))[0])
    for n in (0, 1, 3, 4, 9)
  ]
  assert tails == [-15, -14, -8, 0, 0]
  head = losses.desensitize(jnp.float32(-15), jnp.float32(-8), 0.25)
  assert head == -7 + 0.25 * -8


def test_a_sure_policy_has_weight_1_and_so_has_one_that_knows_nothing():
  mask = jnp.ones((1, 3))
  for p in (1.0, 1 / 7):  # one token certain; seven alike
    token_logps = jnp.full((1, 3), np.log(p))
    squares = jnp.full((1, 3), np.log(p))  # sum of p^2 = p in both
    sure = losses.confidence(token_logps, squares, mask)
    np.testing.assert_allclose(losses.wpo_weights(sure, sure), 1, rtol=1e-6)
  unlikely = losses.confidence(jnp.full((1, 3), -5.0), squares, mask)
  assert losses.wpo_weights(unlikely, sure) < 0.1
  assert losses.confidence(token_logps, squares, 0 * mask) == 0


def test_weights_of_the_policy_carry_no_gradient():
  loss, x = losses.make("dpo", wpo=True), as_jax(random_inputs())

  def total(confidence):
    return loss(**x | {"chosen_confidence": confidence}).loss.sum()

  assert not np.asarray(jax.grad(total)(x["chosen_confidence"])).any()
  assert total(x["chosen_confidence"] + 1) != total(x["chosen_confidence"])


def test_a_mixed_reference_keeps_its_dtype():
  reference = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}
  policy = {"a": jnp.full(2, 3.0), "b": jnp.ones(())}
  mixed = losses.mix_reference(reference, policy, 0.25)
  assert mixed["a"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(mixed["a"].astype(float), 1.5)
  assert mixed["b"] == 0.25
  copy = losses.mix_reference(reference, policy, 1.0)
  assert copy["b"] == 1.0


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("kto+sft", {}, ["labelled", "no batch holds both"]),
    ("dpo+bco", {}, ["labelled", "no batch holds both"]),
    ("dpo+tpo", {}, ["rankings", "pairs"]),
    ("reward+sft", {}, ["reward model"]),
    ("dpo+dpo", {}, ["'dpo+dpo'", "twice"]),
    ("dpo+x*sft", {}, ["'x' should be a number"]),
    ("0*dpo", {}, ["coefficient of 'dpo'"]),
    ("-1*dpo", {}, ["coefficient of 'dpo'"]),
    ("dpo+", {}, ["unknown loss ''"]),
    ("dpo+stf", {}, ["'stf'", "did you mean 'sft'"]),
    ("dpo+sft", {"gamma": 1.0}, ["'gamma'", "dpo.beta", "label_smoothing"]),
    ("dpo(bet=1)+sft", {}, ["'bet'", "did you mean 'beta'"]),
    ("dpo(beta)", {}, ["'beta' should be key=value"]),
    ("dpo)(", {}, ["should look like"]),
    ("dpo+sft", {"sft.beta": 1.0}, ["'sft.beta'"]),
    (losses.dpo, {}, ["should be a name"]),
    ("plackett_luce+dpo", {}, ["rankings", "pairs"]),
    ("tpo+sft", {}, ["'tpo' imitates the gold response"]),
    ("dpo", {"divergence_alpha": 0.9}, ["divergence='alpha' alone"]),
    ("simpo", {"ld_alpha": 0.5}, ["'simpo' divides by length"]),
    ("sigmoid_norm", {"ld_alpha": 0.5}, ["'sigmoid_norm' divides by length"]),
    ("cpo", {"ld_alpha": 0.5}, ["'cpo' reads no reference"]),
    ("dpo", {"beta": float("inf")}, ["beta=inf", "[0.0, inf)"]),
    ("dpo", {"divergence": "chi2"}, ["'chi2'", "reverse_kl, forward_kl, js"]),
    ("dpo", {"divergence_alpha": float("nan")}, ["divergence_alpha=nan"]),
    ("nca", {"divergence": "js"}, ["'nca'", "partition", "dpo"]),
    ("kto", {"divergence": "js"}, ["'kto'", "partition"]),
    ("orpo", {"divergence": "js"}, ["'orpo'", "reference"]),
    ("dpo+bco_pair", {"divergence": "js"}, ["'bco_pair'"]),
    ("sft", {"divergence": "js"}, ["'sft'"]),
    ("dpo", {"ld_alpha": 1.5}, ["ld_alpha=1.5", "1.0"]),
    ("sft", {"ld_alpha": 0.5}, ["'sft' does not read pairs"]),
    ("kto", {"ld_alpha": 0.5}, ["'kto' does not read pairs"]),
    ("plackett_luce", {"wpo": True}, ["does not read pairs"]),
    ("reward", {"wpo": True}, ["'reward' does not read pairs"]),
    ("aot", {"wpo": True}, ["'aot'", "belongs to no pair"]),
    ("dpo", {"wpo": 1}, ["wpo=1", "bool"]),
    ("robust", {"label_smoothing": 0.5}, ["label_smoothing=0.5"]),
    ("exo", {"label_smoothing": 0.0}, ["label_smoothing=0.0"]),
    ("bco", {"shift": "mean"}, ["shift='mean'", "'classes' or 'pooled'"]),
  ],
)
def test_what_has_no_meaning_is_refused_in_one_line(name, options, words):
  with pytest.raises(ValueError) as e:
    losses.make(name, **options)
  assert all(word in str(e.value) for word in words), str(e.value)
  assert "\n" not in str(e.value)


def test_a_mixture_is_not_mixed_from_modified_parts():
  with pytest.raises(ValueError, match="modifiers of its own"):
    losses.mix((1, losses.make("dpo", wpo=True)), (1, losses.make("sft")))
  with pytest.raises(ValueError, match="no modifier 'wop'"):
    losses.mix((1, losses.make("dpo")), wop=True)


def test_a_state_is_made_and_read_or_neither(registry):
  def reads(policy_chosen_logps, state=None):
    pass

  def makes(policy_chosen_logps):
    pass

  for function, options in ((reads, {}), (makes, {"state": lambda: 0.0})):
    with pytest.raises(TypeError, match="carries state"):
      losses.register(function, **options)


def test_one_term_carries_a_state_and_no_more(registry):
  @losses.register(state=lambda: jnp.zeros(()))
  def counting(policy_logps, desirable, weights=None, state=None):
    return losses.LossOutput(-policy_logps, {}, state=state)

  assert losses.make("counting").batch_coupled
  with pytest.raises(ValueError, match="one term at most"):
    losses.make("bco+counting")


def test_a_loss_of_the_wrong_shape_is_refused(registry):
  @losses.register
  def reduced(policy_chosen_logps):
    return losses.LossOutput(-policy_chosen_logps.mean(), {})

  with pytest.raises(ValueError, match="one entry an example"):
    losses.make("reduced")


def test_a_hyper_parameter_is_not_called_as_an_input(registry):
  def clash(policy_chosen_logps, *, weights: float = 1.0):
    pass

  with pytest.raises(TypeError, match="'weights' is that of an input"):
    losses.register(clash)


def test_a_mixture_of_nothing_is_refused():
  with pytest.raises(ValueError, match="needs a part"):
    losses.mix()


def test_a_reference_equal_to_the_policy_is_not_moved_by_rounding():
  r = jnp.asarray(np.random.default_rng(0).normal(size=999), jnp.bfloat16)
  for mixup in (0.01, 0.6, 1.0):
    np.testing.assert_array_equal(losses.mix_reference(r, r, mixup), r)
  with pytest.raises(ValueError, match=r"mixup=1\.5"):
    losses.mix_reference(r, r, 1.5)


def test_log_probs_under_ld_are_those_of_the_responses():
  x = as_jax(random_inputs())
  out, plain = losses.make("dpo", ld_alpha=0.2)(**x), losses.make("dpo")(**x)
  for side in ("chosen", "rejected"):
    key = f"logps/{side}"
    np.testing.assert_array_equal(out.metrics[key], plain.metrics[key])
    key = f"rewards/{side}"  # what is compared
    assert not np.allclose(out.metrics[key], plain.metrics[key])


def test_a_name_of_a_modifier_is_not_a_hyper_parameters(registry):
  def clash(policy_chosen_logps, *, wpo: bool = True):
    pass

  with pytest.raises(TypeError, match="'wpo' is that of a modifier"):
    losses.register(clash)


# The table


def test_the_table_has_a_line_for_every_loss(capsys):
  losses.describe()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ["loss", *NAMES]
  (kto,) = (line for line in lines if line.startswith("kto"))
  for word in ("labels", "mismatched completions", "beta=0.1", "2402.01306"):
    assert word in kto
  markdown = losses.table(markdown=True).splitlines()
  assert len(markdown) == len(NAMES) + 2
  assert len({line.count("|") for line in markdown}) == 1


def test_the_readme_shows_the_table_that_the_package_prints():
  done = subprocess.run(
    [sys.executable, "-m", "dpo_jax.losses", "--markdown"],
    capture_output=True, text=True, cwd=ROOT, check=True,
  )  # fmt: skip
  readme = (ROOT / "README.md").read_text()
  _, _, after = readme.partition("<!-- python -m dpo_jax.losses --markdown -->")
  table, end, _ = after.partition("<!-- end -->")
  assert end and table.strip() == done.stdout.strip()
  for line in table.strip().splitlines()[2:]:
    path = line.partition("](")[2].partition(")")[0]
    assert (ROOT / path).is_file()
