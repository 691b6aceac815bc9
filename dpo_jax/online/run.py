"""A run whose data are its policy's own answers."""

import functools
import math
import time
from typing import Any

import jax
import numpy as np

from dpo_jax import flops, losses, optim, sharding
from dpo_jax.build import Data, load_data
from dpo_jax.config import Config
from dpo_jax.decode import bucket
from dpo_jax.models import hf
from dpo_jax.online import value
from dpo_jax.online.held_out import TRAINING, HeldOut
from dpo_jax.online.methods import Done, OfPairs, OfTokens, Scorer
from dpo_jax.online.objective import Objective
from dpo_jax.online.packing import Packer
from dpo_jax.online.prompts import PromptPlan, Used
from dpo_jax.online.rewards import Rewards
from dpo_jax.online.rollout import Roller, Rollout
from dpo_jax.online_checks import answers, check_online
from dpo_jax.run import Run, router_balance
from dpo_jax.trainable import VALUE
from dpo_jax.update import Sums, TrainState


class OnlineRun(Run):
  """Its step answers the prompts of a step, scores the answers and trains on
  them: a function of state, seed and step, as any other."""

  def __init__(self, config: Config, built: Any = None):
    """As `Run`, and imports the reward function or loads the reward model."""
    check_online(config)
    self.answers = answers(config.online)
    super().__init__(config, built)

  @property
  def method(self) -> str:
    """What summary and report call it."""
    name = self.config.online.method
    return f"online {self.loss.name}" if name == "pairs" else name

  def policy(self, frozen: Any, params: Any) -> Any:
    """As of `Run`, without the value model."""
    return super().policy(frozen, _without_value(params))

  def identity(self) -> dict[str, Any]:
    """As of `Run`, and which reward model it is."""
    path = self.config.online.reward_model
    return super().identity() | {
      "reward_model": hf.fingerprint(path) if path else None
    }

  def seconds(self, step: int) -> float | None:
    """What step `step`, counted from 1, took: it ends when it is done."""
    return self.train_plan.seconds(step - 1)

  def ideal_flops(self, step: int) -> float:
    """What step `step`, which was run, needs at least: answers and their scores
    are a forward each, as if answers were read and not written token by token;
    value and reward models are not counted."""
    plan, o = self.train_plan, self.config.online
    prompts, responses, trained = plan.lengths(step - 1)
    shape = self.built.model.config
    forward = self._costs.forward(flops.work(shape, prompts, responses))
    passes = 1 + (o.method != "pairs") + self.loss.needs_reference
    work = flops.work(shape, prompts, trained)
    update = self._costs.forward(work) + self._costs.backward(work)
    return passes * forward + o.epochs * update

  def _make_loss(self) -> Any:
    o = self.config.online
    if o.method == "pairs":
      return self.config.make_loss()
    return Objective(o.method, o)

  def _load_data(self) -> Data:
    return load_data(
      self.config, self.built, Objective("prompts", self.config.online)
    )

  def _plan_training(self) -> PromptPlan:
    t = self.config.train
    steps = t.steps or math.ceil(t.epochs * len(self.data.train) / t.batch_size)
    part = t.batch_size // self.config.online.minibatches
    self._packer = self._make_packer(
      self.data.train, part, self.answers, t.microbatches
    )
    return PromptPlan(
      self.data.train,
      batch_size=t.batch_size,
      steps=max(steps, 1),
      seed=self.config.seed,
      shapes=self._packer.shapes,
    )

  def _plan_evaluation(self) -> PromptPlan | None:
    t, held_out = self.config.train, self.data.held_out
    if held_out is None:
      return None
    size = min(t.eval_batch_size or t.batch_size, len(held_out))
    return PromptPlan(held_out, batch_size=size, shuffle=False)

  def _make_packer(self, examples, prompts, count, microbatches=1) -> Packer:
    mesh = self.built.mesh
    return Packer(
      prompts,
      count,
      longest_prompt=int(examples.prompt_lengths.max()),
      max_tokens=self.config.online.max_tokens,
      rows_multiple=sharding.batch_shards(mesh) * microbatches,
      scored_multiple=8 * mesh.shape["tensor"],
      shapes=self.config.data.row_counts,
    )

  @functools.cached_property
  def _value(self) -> Any | None:
    """The value model, of a method that has one."""
    has_one = self.config.online.method == "ppo"
    return value.value_model(self.built) if has_one else None

  def _load_params(self) -> tuple[Any, Any]:
    params, frozen = super()._load_params()
    if self._value:
      start = value.start(
        self._value, self.policy(frozen, params), self._rewards.model
      )
      places = jax.tree.map(
        lambda x: x.sharding, self.abstract_state.params[VALUE]
      )
      params = params | {VALUE: jax.device_put(start, places)}
    return params, frozen

  def load_reference(self, start: Any, frozen: Any) -> Any | None:
    """As of `Run`."""
    return super().load_reference(_without_value(start), frozen)

  def _abstract_params(self) -> Any:
    params = super()._abstract_params()
    if self._value:
      init = self._value.init_variables
      params = params | {
        VALUE: jax.eval_shape(init, jax.random.key(0))["params"]
      }
    return params

  def _factors(self) -> Any:
    factors = super()._factors()
    if factors is None or not self._value:
      return factors
    ones = jax.tree.map(
      lambda x: np.ones((), np.float32), self._abstract_params()[VALUE]
    )
    return factors | {VALUE: ones}

  def _make_optimizer(self, options: dict[str, Any]) -> Any:
    """The schedule goes by steps, and a step has several updates."""
    o = self.config.online
    updates, schedule = o.epochs * o.minibatches, self.schedule
    return optim.make(
      lambda count: schedule(count // updates),
      factors=self._factors(),
      **options,
    )

  def _make_step(self) -> Any:
    config, built = self.config, self.built
    self._rewards = Rewards(config.online, built)
    self._roller = Roller(config, built, self._rewards)
    shared = config, built
    common = self._compiled, self.trainable.join, self.tx
    if config.online.method == "pairs":
      part = config.train.batch_size // config.online.minibatches
      pairs = self._make_packer(
        self.data.train, part, 2, config.train.microbatches
      )
      self._updates = OfPairs(
        *shared, (self._packer, pairs), *common, self.loss,
        router_balance=router_balance(config, built.model),
        microbatches=config.train.microbatches,
      )  # fmt: skip
    else:
      score = self._value and value.ValueScore(self._value)
      self._updates = OfTokens(*shared, self._packer, *common, score)
    return self._one_step

  def unshared(self, reference: Any) -> Any:
    """All of it: the steps score by programs of their own."""
    return reference

  def _one_step(
    self, state: TrainState, reference: Any, batch: Any, frozen: Any
  ) -> tuple[TrainState, Sums]:
    """`batch` is empty: which prompts these are the step says."""
    step, place = int(state.step), state.step.sharding
    rollout = self._roller(
      self.policy(frozen, state.params), self.data.train,
      self.train_plan.members(step), self.answers, TRAINING, step,
    )  # fmt: skip
    begun = time.perf_counter()
    done = self._updates(state, reference, frozen, rollout, step)
    seconds = time.perf_counter() - begun
    used = _used(rollout, done, rollout.seconds + seconds)
    self.train_plan.used(step, used)
    state = done.state._replace(step=jax.device_put(np.int32(step + 1), place))
    once = np.float64(1)
    return state, done.sums | {
      "rollout_seconds": losses.Sums(np.float64(rollout.seconds), once),
      "update_seconds": losses.Sums(np.float64(seconds), once),
    }

  def _make_evaluator(self) -> HeldOut | None:
    if self.eval_plan is None:
      return None
    packer = self._make_packer(self.data.held_out, self.eval_plan.batch_size, 1)
    return HeldOut(self._roller, Scorer(self.built), packer)


def make_run(config: Config) -> Run:
  """The run that a config asks for."""
  return OnlineRun(config) if config.online.method else Run(config)


def _without_value(params: Any) -> Any:
  return {name: x for name, x in params.items() if name != VALUE}


def _used(rollout: Rollout, done: Done, seconds: float) -> Used:
  batches = [part.batch for part in done.packed]
  asked = bucket(max(map(len, rollout.prompts)))
  share = lambda there: float(np.mean([np.mean(x) for x in there]))
  return Used(
    tokens=int(sum((b.key_end > 0).sum() for b in batches)),
    fill=share([b.key_end > 0 for b in batches]),
    scored_fill=share([part.example >= 0 for part in done.packed]),
    prompts=np.array([len(x) for x in rollout.prompts]),
    responses=rollout.lengths,
    trained=done.trained,
    shape=(asked, *sorted({b.tokens.shape for b in batches})),
    seconds=seconds,
  )
