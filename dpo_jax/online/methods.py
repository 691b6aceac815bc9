"""From the answers of a step to its updates; one class for PPO and GRPO, one
for pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import metrics, sharding
from dpo_jax.batch import Scores
from dpo_jax.build import Built
from dpo_jax.config import Config
from dpo_jax.losses import Loss
from dpo_jax.online import grpo, ppo
from dpo_jax.online.packing import Packed, Packer
from dpo_jax.online.pairs import pairs_of
from dpo_jax.online.rollout import Rollout
from dpo_jax.online.updates import (
  mean_of,
  minibatches,
  score_tokens,
  update_step,
)
from dpo_jax.train_step import train_step
from dpo_jax.trainable import VALUE
from dpo_jax.update import Sums, TrainState, Variables

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Done(NamedTuple):
  """What became of a step."""

  state: TrainState  # its `step` is not to be relied on
  sums: Sums
  packed: list[Packed]  # of the first epoch
  trained: np.ndarray  # i64[N k], lengths of the answers in the updates


class Scorer:
  """Log-probs and values of the tokens of packed answers."""

  def __init__(self, built: Built, value_score: Any = None):
    self._mesh = built.mesh
    self._run = jax.jit(
      functools.partial(
        score_tokens, score=built.score, value_score=value_score
      ),
      out_shardings=sharding.replicated(built.mesh),
    )

  def __call__(
    self,
    parts: Sequence[Packed],
    shape: tuple[int, int, int],
    *,
    policy: Variables | None = None,
    reference: Variables | None = None,
    value: Variables | None = None,
  ) -> dict[str, np.ndarray]:
    """By name f32[N G R], 0 where there is no token; see `score_tokens`."""
    found: dict[str, np.ndarray] = {}
    for part in parts:
      batch = sharding.put_batch(part.batch, self._mesh)
      tokens = jax.device_get(self._run(policy, reference, value, batch))
      for name, x in tokens.items():
        part.scatter(x, found.setdefault(name, np.zeros(shape, np.float32)))
    return found


class OfTokens:
  """PPO and GRPO: a loss of tokens, which are scored once and then trained on
  for some epochs."""

  def __init__(
    self,
    config: Config,
    built: Built,
    packer: Packer,
    compiled: Compile,
    join: Any,
    tx: Any,
    value_score: Any = None,
  ):
    """Args:
    config: of the run.
    built: its model and mesh.
    packer: of a minibatch.
    compiled: makes a program of an update, see `Run`.
    join: (frozen, trained) -> the policy's variables.
    tx: optimizer.
    value_score: of the value model, see `value.ValueScore`.
    """
    o = config.online
    self._config, self._mesh, self._pack = config, built.mesh, packer
    self._scorer = Scorer(built, value_score)
    of = {"ppo": ppo, "grpo": grpo}[o.method]
    self._prepare, objective, count = of.functions(
      built.score, value_score, join, o
    )
    self._join = join
    self._update = compiled(
      functools.partial(
        update_step,
        objective=objective,
        count=count,
        tx=tx,
        microbatches=config.train.microbatches,
      )
    )

  def __call__(
    self,
    state: TrainState,
    reference: Variables | None,
    frozen: Variables,
    rollout: Rollout,
    step: int,
  ) -> Done:
    """Runs the updates of step `step`, counted from 0."""
    o = self._config.online
    packed = self._packs(rollout, step, 0)
    params = dict(state.params)
    value = params.pop(VALUE, None)
    known = self._scorer(
      packed, rollout.tokens.shape, policy=self._join(frozen, params),
      reference=reference, value=value,
    )  # fmt: skip
    given, sums, price = self._prepare(rollout, known, state.loss_state)
    sums |= told(rollout, known["old"], known.get("reference"))
    parts = [sums]
    for epoch in range(o.epochs):
      mine = packed
      if epoch and o.minibatches > 1:
        mine = self._packs(rollout, step, epoch)
      for part in mine:
        tokens = {name: part.by_token(x) for name, x in given.items()}
        batch, tokens = sharding.put_batch((part.batch, tokens), self._mesh)
        state, new = self._update(state, batch, tokens, frozen)
        parts.append(new)
    if price is not None:
      place = state.loss_state.sharding
      state = state._replace(loss_state=jax.device_put(price, place))
    return Done(state, metrics.add(parts), packed, rollout.lengths)

  def _packs(self, rollout: Rollout, step: int, epoch: int) -> list[Packed]:
    seed, count = self._config.seed, self._config.online.minibatches
    return [
      self._pack(rollout.prompts, rollout.responses, ids)
      for ids in minibatches(len(rollout.prompts), count, seed, step, epoch)
    ]


class OfPairs:
  """The best and the worst answer to a prompt, and `train_step` on these."""

  def __init__(
    self,
    config: Config,
    built: Built,
    packers: tuple[Packer, Packer],
    compiled: Compile,
    join: Any,
    tx: Any,
    loss: Loss,
    **options: Any,
  ):
    """Args as of `OfTokens`, but for two packers, of all answers and of pairs,
    the loss, and further options of `train_step`."""
    self._config, self._mesh = config, built.mesh
    self._pack_all, self._pack_pairs = packers
    self._scorer, self._loss = Scorer(built), loss
    self._update = compiled(
      functools.partial(
        train_step, score=built.score, loss=loss, tx=tx, join=join, **options
      )
    )

  def __call__(
    self,
    state: TrainState,
    reference: Variables | None,
    frozen: Variables,
    rollout: Rollout,
    step: int,
  ) -> Done:
    """Runs the updates of step `step`, counted from 0."""
    o, seed = self._config.online, self._config.seed
    n, pairs = len(rollout.prompts), pairs_of(rollout.scores)
    known, responses = None, pairs.responses(rollout)
    if reference is not None:
      split = minibatches(n, o.minibatches, seed, step, 0)
      all_of = [
        self._pack_all(rollout.prompts, rollout.responses, ids) for ids in split
      ]
      known = self._scorer(all_of, rollout.tokens.shape, reference=reference)
      known = known["reference"]
    sums = told(rollout, rollout.logps, known)
    sums["frac_reward_zero_std"] = mean_of(pairs.weights == 0)
    parts, first = [sums], []
    # Where the loss reads no more of the reference than its sums.
    scored = known is not None and not self._loss.reads_tails
    for epoch in range(o.epochs):
      for ids in minibatches(n, o.minibatches, seed, step, epoch):
        part = self._pack_pairs(rollout.prompts, responses, ids)
        first += [part] if epoch == 0 else []
        weights = part.by_response(np.tile(pairs.weights[:, None], 2))[..., 0]
        batch = part.batch._replace(weights=weights)
        if scored:
          sums_of = pairs.of(known.sum(axis=2, dtype=np.float32))
          batch = batch._replace(reference=Scores(part.by_response(sums_of)))
        state, new = self._update(
          state,
          None if scored else reference,
          sharding.put_batch(batch, self._mesh),
          frozen,
        )
        parts.append(new)
    trained = pairs.of(rollout.lengths)
    return Done(state, metrics.add(parts), first, trained)


def told(
  rollout: Rollout, logps: np.ndarray, reference: np.ndarray | None
) -> Sums:
  """Metrics of answers, under TRL's names where it has them.

  Args:
    rollout: the answers.
    logps: f32[N G R], under the policy that gave them.
    reference: likewise, under the reference.
  """
  valid, mask = rollout.valid, rollout.mask
  by_answer = lambda x: np.where(mask, x, 0).sum(axis=-1)
  sums = {
    "objective/scores": mean_of(rollout.scores, valid),
    "objective/entropy": mean_of(-by_answer(logps)),
    "completions/mean_length": mean_of(rollout.lengths),
    "completions/clipped_ratio": mean_of(~rollout.ended),
    "completions/empty_ratio": mean_of(rollout.ended & (rollout.lengths == 1)),
    "rewards/failed": mean_of((~valid).sum(keepdims=True)),
  }
  if reference is not None:
    sums["objective/kl"] = mean_of(by_answer(logps - reference))
  return sums
