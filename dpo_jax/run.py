"""Everything a run is made of, built from its config."""

import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp

from dpo_jax import (
  evaluate,
  flops,
  losses,
  offload,
  optim,
  processes,
  reference_cache,
  sharding,
)
from dpo_jax.answers import Answerer, distinct_prompts
from dpo_jax.batch import Scores
from dpo_jax.build import Built, Data, build, load_data, recomputed
from dpo_jax.config import Config
from dpo_jax.data.plan import Plan
from dpo_jax.errors import ConfigError
from dpo_jax.loss_checks import check_loss
from dpo_jax.models import hf
from dpo_jax.train_step import train_step
from dpo_jax.trainable import Trainable, join
from dpo_jax.update import TrainState
from dpo_jax.weights import load_policy, load_variables, other_reference

_LOG = logging.getLogger("dpo_jax")


class Run:
  """Data, plans, optimizer and compiled step; `train` walks through them."""

  def __init__(self, config: Config, built: Built | None = None):
    """Reads data and weights, plans the steps, makes the state.

    Raises:
      UserError: one line for whatever is missing or does not fit.
    """
    self.config = config
    self.loss = self._make_loss()
    self.follows = config.reference.sync_every > 0  # the policy (TR-DPO)
    check_loss(config, self.loss)
    self.built = built or build(config)
    _check_packed(config, self.built)
    _check_offload(config, self.built)
    self.data = self._load_data()
    self.train_plan = self._plan_training()
    self.eval_plan = self._plan_evaluation()
    self.steps = len(self.train_plan)
    for line in self.train_plan.describe():
      _LOG.info(line)
    o = dict(vars(config.optim))
    if config.model.param_dtype == "bfloat16" and not self.built.lora:
      _warn_of_lost_updates(config)
    self.trainable = Trainable(
      self.built.abstract, o.pop("freeze"), o.pop("rates")
    )
    trained, _ = self.trainable.split(self.built.abstract)
    self._costs = flops.Costs(
      self.built.model.config,
      self.trainable.layers(),
      {
        path: math.prod(x.shape[1:])
        for path, x in traverse.flatten_dict(trained, sep="/").items()
        if path.startswith("lora/")
      },
    )
    self.schedule = optim.make_schedule(
      o.pop("learning_rate"),
      self.steps,
      schedule=o.pop("schedule"),
      warmup=o.pop("warmup"),
      final=o.pop("final"),
    )
    self.tx = self._make_optimizer(o)
    self.abstract_state = self._abstract_state()
    self.step = self._make_step()
    self.evaluator = self._make_evaluator()

  def recompute(self, remat: str) -> None:
    """Lets the backward compute again what `models.shape.Compute` says of
    `remat`; before the start."""
    self.built = recomputed(self.config, self.built, remat)
    self.step = self._make_step()
    self.evaluator = self._make_evaluator()

  @property
  def method(self) -> str:
    """What summary and report call it."""
    return self.loss.name

  def policy(self, frozen: Any, params: Any) -> Any:
    """The policy's variables, of what is frozen and what is trained."""
    return join(frozen, params)

  def seconds(self, step: int) -> float | None:
    """What a step took, where it tells; None: it goes on while the next is
    launched."""
    return None

  def ideal_flops(self, step: int) -> float:
    """What step `step`, counted from 1, needs at least; see `flops`."""
    c, (prompts, responses) = self.config, self.train_plan.lengths(step - 1)
    shape = self.built.model.config
    work = flops.work(shape, prompts, responses)
    total = self._costs.forward(work, adapters=True)
    if self.loss.needs_reference and not c.reference.precompute:
      has_adapters = bool(c.lora.path and not c.reference.path)
      total += self._costs.forward(work, adapters=has_adapters)
    if self.loss.mismatches:  # those completions have no gradient
      work = flops.work(shape, prompts, responses[:, :1])
    return total + self._costs.backward(work)

  def start(self) -> tuple[TrainState, Any]:
    """The state before any step, and the frozen variables beside it."""
    params, frozen = self._load_params()
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    init = jax.jit(self.tx.init, out_shardings=shardings.opt_state)
    zero = jax.device_put(jnp.int32(0), shardings.step)
    # Copied, since a state may hold one array twice, which cannot be donated.
    carried = jax.tree.map(jnp.copy, self.loss.initial_state())
    carried = jax.device_put(carried, shardings.loss_state)
    state = TrainState(zero, params, init(params), zero + 0, carried)
    return state, frozen

  def _load_params(self) -> tuple[Any, Any]:
    """What is trained and what is frozen, as a run begins with them."""
    return self.trainable.split(load_policy(self.config, self.built))

  def load_reference(self, start: Any, frozen: Any) -> Any | None:
    """Variables of the reference; None if the loss reads none.

    The policy's beginning is the reference unless another is named. Of that,
    what is trained is copied, for the step donates its own, to the host if the
    config says so; what is frozen is shared, and new adapters, which add
    nothing yet, are left off.

    Args:
      start: what is trained, before any step.
      frozen: the rest of the policy.
    """
    if not self.loss.needs_reference:
      return None
    c = self.config
    if other_reference(c):
      return load_variables(
        c, self.built, c.reference.path, on_host=c.offload.reference
      )
    if self.built.lora and (c.reference.path or not c.lora.path):
      return {"params": frozen["params"]}
    if not c.offload.reference:
      return join(frozen, jax.tree.map(jnp.copy, start))
    places = jax.tree.map(lambda x: x.sharding, offload.on_host(start))
    return join(frozen, jax.device_put(start, places, may_alias=False))

  def unshared(self, reference: Any) -> Any:
    """What of a reference's variables the step does not have as the policy's
    frozen ones."""
    if reference is None or other_reference(self.config):
      return reference
    return self.trainable.split(reference)[0]

  def abstract_reference(self) -> Any | None:
    """What `load_reference` gives, as shapes."""
    c = self.config
    if not self.loss.needs_reference:
      return None
    if c.lora.path and not c.reference.path:
      reference = self.built.abstract
    else:
      reference = {"params": self.built.abstract["params"]}
    if not c.offload.reference:
      return reference
    if other_reference(c):
      return offload.on_host(reference)
    copied, shared = self.trainable.split(reference)
    return join(shared, offload.on_host(copied))

  def scores_reference(self) -> bool:
    """Whether the step runs the reference of `load_reference`: not where its
    scores are known, or the state has one that follows the policy. It is kept
    all the same, for evaluation and for the KL at the end."""
    known = self.config.reference.precompute or self.follows
    return self.loss.needs_reference and not known

  def with_reference(self, state: TrainState, reference: Any) -> TrainState:
    """The state with a reference of its own, if that is to follow the policy;
    the one it starts from stays as it is."""
    if not self.follows:
      return state
    places = jax.tree.map(lambda x: x.sharding, self.abstract_state.reference)
    copied = jax.device_put(reference, places, may_alias=False)
    return state._replace(reference=copied)

  def identity(self) -> dict[str, Any]:
    """What a checkpoint must agree in, beside the config, to be continued."""
    c = self.config

    def told_apart(path):
      return hf.fingerprint(path) if path else f"random {c.seed}"

    reference = None
    if self.loss.needs_reference:
      reference = told_apart(c.reference.path or c.model.path)
    _, frozen = self.trainable.split(self.built.abstract)
    return {
      "loss": repr(self.loss),
      "data": self.data.train.fingerprint,
      "reference": reference,
      "frozen": told_apart(c.model.path) if frozen else None,
      "adapters": hf.fingerprint(c.lora.path) if c.lora.path else None,
      "dropout": self._dropout_parts(),
    }

  def _dropout_parts(self) -> list[int] | None:
    """What decides, with the seed, which inputs adapters do not see."""
    if not (self.built.lora and self.built.lora.dropout):
      return None
    shards = sharding.batch_shards(self.built.mesh)
    return [self.config.train.microbatches, shards]

  def precompute(self, reference: Any) -> None:
    """Scores training pairs under the reference once, for all steps; or finds
    them in the cache, where an earlier run left them."""
    c, examples = self.config, self.data.train
    plan = self._plan(examples, c.train.batch_size)

    def score() -> Scores:
      return evaluate.score_examples(
        self.built.score, reference, plan, self.built.mesh, tails=True
      )

    folder = os.path.expanduser(c.data.cache_dir)
    key = reference_cache.make_key(
      self.built, reference, examples, plan, c.model
    )
    scores = reference_cache.find_or_score(
      folder, key, examples.lengths.shape, score
    )
    if not self.loss.reads_tails:
      scores = scores._replace(tails=None)
    self.train_plan.reference = scores

  def answerer(self) -> Answerer | None:
    """Answers held-out prompts (or training ones, if none are held out)."""
    settings = self.config.sample
    if not settings.prompts:
      return None
    examples = self.data.held_out or self.data.train
    prompts = distinct_prompts(examples, settings.prompts)
    return Answerer(self.built, settings, prompts, self.config.seed)

  def _make_loss(self) -> losses.Loss:
    return self.config.make_loss()

  def _load_data(self) -> Data:
    return load_data(self.config, self.built, self.loss)

  def _make_optimizer(self, options: dict[str, Any]) -> Any:
    return optim.make(self.schedule, factors=self._factors(), **options)

  def _factors(self) -> Any:
    """On the learning rates of what is trained; None where all are 1."""
    trained, _ = self.trainable.split(self.built.abstract)
    return self.trainable.factors(trained)

  def _make_step(self) -> Callable[..., tuple[TrainState, Any]]:
    """The compiled `train_step`."""
    config, built = self.config, self.built
    return self._compiled(
      functools.partial(
        train_step,
        score=built.score,
        loss=self.loss,
        tx=self.tx,
        join=self.trainable.join,
        dropout_seed=_dropout_seed(config, built),
        router_balance=router_balance(config, built.model),
        microbatches=config.train.microbatches,
        sync_every=config.reference.sync_every,
        sync_mixup=config.reference.sync_mixup,
      )
    )

  def _compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that takes the state's place, and gives it and sums."""
    return jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda x: x.sharding, self.abstract_state),
        sharding.replicated(self.built.mesh),
      ),
    )

  def _make_evaluator(self) -> evaluate.Evaluator:
    return evaluate.make_evaluator(self.built.score, self.loss, self.built.mesh)

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
      balance=self.config.data.balance,
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
    if processes.count() > 1:
      options["local_rows"] = functools.partial(sharding.local_rows, mesh)
    return Plan(examples, batch_size=batch_size, **options)

  def _abstract_params(self) -> Any:
    return self.trainable.split(self.built.abstract)[0]

  def _abstract_state(self) -> TrainState:
    mesh, params = self.built.mesh, self._abstract_params()
    state = TrainState(
      jax.ShapeDtypeStruct((), jnp.int32),
      params,
      jax.eval_shape(self.tx.init, params),
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.eval_shape(self.loss.initial_state),
      self.built.abstract if self.follows else None,
    )
    state = sharding.placed(state, mesh)
    if self.config.offload.optimizer:
      state = state._replace(opt_state=offload.on_host(state.opt_state))
    return state


def router_balance(config: Config, model: Any) -> float:
  """Weight of the loss that keeps a model's experts equally busy."""
  weight = model.config.router_weight if model.router else None
  return config.train.router_balance * (weight or 0.0)


def _dropout_seed(config: Config, built: Built) -> int | None:
  """Seed of what adapters do not see; None if they see all."""
  return config.seed if built.lora and built.lora.dropout else None


def _warn_of_lost_updates(config: Config) -> None:
  """Adam moves a weight by the learning rate; of a bfloat16 of the usual size,
  0.02, a 512th is the least that shows."""
  rate = config.optim.learning_rate
  if rate < 0.02 / 512:
    _LOG.warning(
      "model.param_dtype=bfloat16 loses most updates at a learning rate of %g;"
      " float32 weights with model.dtype=bfloat16 keep them",
      rate,
    )


def _check_packed(config: Config, built: Built) -> None:
  m = config.model
  if m.quantize and not built.lora:
    raise ConfigError(
      f"config.model.quantize={m.quantize!r}: weights in few bits cannot be"
      " trained; set config.lora.rank to train adapters on them"
    )
  if m.quantize and m.remat == "none":
    raise ConfigError(
      "config.model.remat=none would keep all layers unpacked for the backward;"
      " with config.model.quantize it should be minimal, block or offload"
    )


def _check_offload(config: Config, built: Built) -> None:
  """Refuses what cannot be moved to the host, or is not there to be moved."""
  o, c = config.offload, config
  if c.model.remat == "offload":
    offload.check("config.model.remat=offload", built.mesh.local_devices)
  for name, asked in vars(o).items():
    if asked:
      offload.check(f"config.offload.{name}", built.mesh.local_devices)
  own = (
    other_reference(c)
    or not built.lora
    or (c.lora.path and not c.reference.path)
  )
  if o.reference and not own:
    raise ConfigError(
      "config.offload.reference: this reference is the policy's frozen weights,"
      " and takes no memory of its own to be moved"
    )
