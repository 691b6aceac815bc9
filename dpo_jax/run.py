"""Everything a run is made of, built from its config."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import evaluate, losses, optim, sharding
from dpo_jax.answers import Answerer, distinct_prompts
from dpo_jax.build import Built, build, load_data, load_variables
from dpo_jax.config import Config
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError
from dpo_jax.models import hf
from dpo_jax.train_step import TrainState, train_step


class Run:
  """Data, plans, optimizer and compiled step; `train` walks through them."""

  def __init__(self, config: Config, built: Built | None = None):
    """Reads data and weights, plans the steps, makes the state.

    Raises:
      UserError: one line for whatever is missing or does not fit.
    """
    self.config = config
    self.loss = config.make_loss()
    self.follows = config.reference.sync_every > 0  # the policy (TR-DPO)
    _check_loss(config, self.loss)
    if jax.process_count() > 1:
      raise ConfigError(
        f"{jax.process_count()} processes: a run is one process for now, with"
        " all devices of its host"
      )
    self.built = built or build(config)
    mesh = self.built.mesh
    self.data = load_data(config, self.built, self.loss)
    self.train_plan = self._plan_training()
    self.eval_plan = self._plan_evaluation()
    self.steps = len(self.train_plan)
    o = dict(vars(config.optim))
    self.schedule = optim.make_schedule(
      o.pop("learning_rate"),
      self.steps,
      schedule=o.pop("schedule"),
      warmup=o.pop("warmup"),
      final=o.pop("final"),
    )
    self.tx = optim.make(self.schedule, **o)
    self.abstract_state = self._abstract_state()
    self.step = jax.jit(
      functools.partial(
        train_step,
        score=self.built.score,
        loss=self.loss,
        tx=self.tx,
        microbatches=config.train.microbatches,
        sync_every=config.reference.sync_every,
        sync_mixup=config.reference.sync_mixup,
      ),
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda x: x.sharding, self.abstract_state),
        sharding.replicated(mesh),
      ),
    )
    self.evaluator = evaluate.make_evaluator(self.built.score, self.loss, mesh)

  def first_state(self) -> TrainState:
    """The state before any step: weights as loaded or drawn."""
    params = load_variables(self.config, self.built)
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    init = jax.jit(self.tx.init, out_shardings=shardings.opt_state)
    zero = jax.device_put(jnp.int32(0), shardings.step)
    # Copied, since a state may hold one array twice, which cannot be donated.
    carried = jax.tree.map(jnp.copy, self.loss.initial_state())
    carried = jax.device_put(carried, shardings.loss_state)
    return TrainState(zero, params, init(params), zero + 0, carried)

  def load_reference(self, start: Any) -> Any | None:
    """Variables of the reference; None if the loss reads none.

    Args:
      start: the policy's weights before any step, which are the reference
        unless another is named. They are copied: the step donates its own.
    """
    if not self.loss.needs_reference:
      return None
    path = self.config.reference.path
    if path and path != self.config.model.path:
      return load_variables(self.config, self.built, path)
    return jax.tree.map(jnp.copy, start)

  def with_reference(self, state: TrainState, reference: Any) -> TrainState:
    """The state with a reference of its own, if that is to follow the policy;
    the one it starts from stays as it is."""
    if not self.follows:
      return state
    return state._replace(reference=jax.tree.map(jnp.copy, reference))

  def identity(self) -> dict[str, Any]:
    """What a checkpoint must agree in, beside the config, to be continued."""
    c = self.config
    reference = None
    if self.loss.needs_reference:
      path = c.reference.path or c.model.path
      reference = hf.fingerprint(path) if path else f"random {c.seed}"
    return {
      "loss": repr(self.loss),
      "data": self.data.train.fingerprint,
      "reference": reference,
    }

  def precompute(self, reference: Any) -> None:
    """Scores training pairs under the reference once, for all steps."""
    plan = self._plan(self.data.train, self.config.train.batch_size)
    self.train_plan.reference = evaluate.score_examples(
      self.built.score,
      reference,
      plan,
      self.built.mesh,
      tails=self.loss.reads_tails,
    )

  def answerer(self) -> Answerer | None:
    """Answers held-out prompts (or training ones, if none are held out)."""
    settings = self.config.sample
    if not settings.prompts:
      return None
    examples = self.data.held_out or self.data.train
    prompts = distinct_prompts(examples, settings.prompts)
    return Answerer(self.built, settings, prompts, self.config.seed)

  def _plan_training(self) -> Plan:
    t, mesh = self.config.train, self.built.mesh
    steps = t.steps or math.ceil(t.epochs * len(self.data.train) / t.batch_size)
    return self._plan(
      self.data.train,
      t.batch_size,
      steps=max(steps, 1),
      seed=self.config.seed,
      shuffle=True,
      rows_multiple=sharding.batch_shards(mesh) * t.microbatches,
    )

  def _plan_evaluation(self) -> Plan | None:
    if self.data.held_out is None:
      return None
    t = self.config.train
    return self._plan(self.data.held_out, t.eval_batch_size or t.batch_size)

  def _plan(self, examples, batch_size, **options) -> Plan:
    mesh = self.built.mesh
    options = {
      "shuffle": False,
      "rows_multiple": sharding.batch_shards(mesh),
      "row_length": self.config.data.row_length,
      "row_counts": self.config.data.row_counts,
      "mismatch": self.loss.mismatches,
      "scored_multiple": 8 * mesh.shape["tensor"],
    } | options
    return Plan(examples, batch_size=batch_size, **options)

  def _abstract_state(self) -> TrainState:
    mesh = self.built.mesh
    params = self.built.abstract
    state = TrainState(
      jax.ShapeDtypeStruct((), jnp.int32),
      params,
      jax.eval_shape(self.tx.init, params),
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.eval_shape(self.loss.initial_state),
      params if self.follows else None,
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      sharding.shard_tree(state, mesh),
    )


def _check_loss(config: Config, loss: losses.Loss) -> None:
  """Refuses settings that the loss gives no meaning."""
  if loss.needs_scores:
    raise ConfigError(
      f"config.loss.name={loss.name!r} reads the scores of a reward model;"
      " training one is not part of this version, the function is:"
      " losses.reward"
    )
  if config.reference.precompute and loss.mismatches:
    raise ConfigError(
      f"config.reference.precompute does not go with {loss.name!r}, whose"
      " mismatched completions change from step to step"
    )
  if config.reference.sync_every and not loss.needs_reference:
    raise ConfigError(
      f"config.reference.sync_every: loss {loss.name!r} reads no reference that"
      " could follow the policy"
    )
  if config.reference.sync_every and config.reference.precompute:
    raise ConfigError(
      "config.reference.sync_every moves the reference, so its log-probs cannot"
      " be precomputed; leave config.reference.precompute off"
    )
