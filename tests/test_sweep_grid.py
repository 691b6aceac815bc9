"""Which runs a sweep has, what they are called, and what is refused."""

import re

import pytest
from sweeps import base

from dpo_jax import sweep
from dpo_jax.errors import ConfigError
from dpo_jax.sweep.expand import expand, flags_of, read_function


def test_a_product_takes_each_with_each_and_the_last_changes_fastest():
  names = sweep.listed("loss.name", "dpo", "ipo")
  betas = sweep.listed("loss.beta", 0.1, 0.3)
  assert sweep.product(names, betas) == [
    {"loss.name": "dpo", "loss.beta": 0.1},
    {"loss.name": "dpo", "loss.beta": 0.3},
    {"loss.name": "ipo", "loss.beta": 0.1},
    {"loss.name": "ipo", "loss.beta": 0.3},
  ]


def test_zipped_lists_go_together():
  rates = sweep.listed("optim.learning_rate", 1e-4, 1e-3)
  steps = sweep.listed("train.steps", 20, 10)
  assert sweep.zipped(rates, steps) == [
    {"optim.learning_rate": 1e-4, "train.steps": 20},
    {"optim.learning_rate": 1e-3, "train.steps": 10},
  ]


def test_zipped_lists_of_other_lengths_are_refused():
  with pytest.raises(ConfigError, match="equally long, not 2 and 1"):
    sweep.zipped(sweep.listed("seed", 1, 2), sweep.listed("loss.beta", 0.1))


@pytest.mark.parametrize("combine", [sweep.product, sweep.zipped])
def test_a_key_that_two_lists_set_is_refused(combine):
  with pytest.raises(ConfigError, match="'seed' is set by two"):
    combine(sweep.listed("seed", 1, 2), sweep.listed("seed", 3, 4))


def test_an_id_depends_on_its_run_alone():
  """Not on the order of the keys, other runs, or what changes no number."""
  one = {"loss.name": "ipo", "loss.beta": 0.3}
  (alone,) = expand(base(), [one])
  turned = dict(reversed(one.items()))
  among = expand(base(**{"train.log_every": 3}), [{"seed": 1}, turned])[1]
  assert alone.id == among.id
  assert alone.id.startswith("beta=0.3,name=ipo-")
  assert re.fullmatch(r"[0-9a-f]{8}", alone.id.rpartition("-")[2])


def test_ids_of_other_numbers_are_others():
  runs = [
    *expand(base(), [{"loss.beta": 0.3}, {"loss.beta": 0.1, "seed": 1}]),
    *expand(base(**{"train.steps": 7}), [{"loss.beta": 0.3}]),
    *expand(base(loss="ipo"), [{"loss.beta": 0.3}]),
  ]
  assert len({run.id.rpartition("-")[2] for run in runs}) == 4


def test_an_id_is_fit_for_a_file_whatever_a_value_holds():
  override = {"loss.name": "dpo+0.1*sft", "data.source": f"../a b/{'x' * 99}|"}
  (run,) = expand(base(), [override])
  assert re.fullmatch(r"[\w=,.+-]{1,89}", run.id)
  assert "source=.._a_b_x" in run.id


def test_keys_that_end_alike_are_named_in_full():
  override = {"model.path": "a", "reference.path": "b", "seed": 1}
  (run,) = expand(base(), [override])
  assert run.id.startswith("model.path=a,reference.path=b,seed=1-")


def test_a_swept_setting_that_changes_no_number_tells_runs_apart():
  runs = expand(base(), sweep.listed("model.remat", "none", "block"))
  assert runs[0].id != runs[1].id


def test_the_same_run_twice_is_refused():
  twice = [{"seed": 1}, {"loss.beta": 0.1}, {"loss.beta": 0.1, "seed": 0}]
  with pytest.raises(ConfigError, match=r"beta=0.1.* are the same run"):
    expand(base(), twice)


def test_a_default_that_is_spelt_out_is_the_same_run():
  with pytest.raises(ConfigError, match="are the same run"):
    expand(base(), [{"loss.beta": 0.1}, {}])


def test_everything_wrong_is_said_at_once_in_one_line():
  wrong = [
    {"loss.beta": 0.1},
    {"loss.betta": 0.1},
    {"train.steps": "many"},
    {"loss.beta": -1.0},
    {"loss.name": "orpo", "loss.beta": 0.1},
    {"loss.beta": None},
    "beta=3",
    {"seed": -1},
  ]
  with pytest.raises(ConfigError) as caught:
    expand(base(), wrong)
  message = str(caught.value)
  assert "\n" not in message
  assert "run 1 " not in message
  assert "run 2 (loss.betta=0.1)" in message
  assert "did you mean 'loss.beta'?" in message
  assert "run 3 (train.steps=many)" in message
  assert "run 4 (loss.beta=-1.0)" in message
  assert "run 5 (loss.name=orpo, loss.beta=0.1)" in message
  assert "run 6 (loss.beta=None)" in message
  assert message.endswith("; and 2 more")


def test_what_a_run_would_refuse_is_refused_before_any_starts():
  precomputed = base(**{"reference.precompute": True})
  with pytest.raises(ConfigError, match=r"run 2 .*does not go with 'kto'"):
    expand(precomputed, sweep.listed("loss.name", "dpo", "kto"))


def test_no_override_at_all_is_refused():
  with pytest.raises(ConfigError, match="yields no overrides"):
    expand(base(), [])


def test_values_are_of_the_type_of_their_setting():
  (run,) = expand(base(), [{"loss.beta": 1, "optim.learning_rate": 1}])
  assert dict(run.config.make_loss().options)["beta"] == 1.0
  assert flags_of(run.overrides) == [
    "--config.loss.beta=1.0",
    "--config.optim.learning_rate=1.0",
  ]


def test_a_function_is_read_from_the_config_file(tmp_path):
  file = tmp_path / "some.py"
  file.write_text(
    "def get_sweep(arg=None):\n"
    "  yield {'loss.beta': 0.1, 'model.path': arg}\n"
    "def other():\n"
    "  return [{'seed': 3}]\n"
  )
  assert read_function(f"{file}:x=1,y") == [
    {"loss.beta": 0.1, "model.path": "x=1,y"}
  ]
  assert read_function(str(file), "other") == [{"seed": 3}]
  with pytest.raises(ConfigError, match="no function 'missing'"):
    read_function(str(file), "missing")
