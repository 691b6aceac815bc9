"""What a reward model says of every response of a batch, in one pass."""

import math
from typing import Any

import jax.numpy as jnp

from dpo_jax.batch import Batch, Scores
from dpo_jax.logps import last_of_slot
from dpo_jax.score import hidden_states


class RewardScore:
  """(variables, batch) -> the score of each response, at its last token.

  Called as `score.Score` is, and so the step, evaluation and checkpoints are
  those of a policy. A row reads all tokens of a response but the last, which it
  only predicts: here that one is a closing token (`data.closing`), and the last
  token that is read is the response's own.
  """

  def __init__(self, model: Any):
    """Wraps a model: `apply` as `score.Score` wants it, and
    `score_head(variables)` to f32[D]."""
    self._model = model
    self._spread = getattr(model, "spread", lambda variables: variables)

  def __call__(
    self,
    variables: Any,
    batch: Batch,
    *,
    tails: bool = False,
    confidence: bool = False,
    router: bool = False,
    dropout: Any = None,
  ) -> Scores:
    """Scores a batch; only the last tokens meet the last layer's queries and
    MLP, and none a vocabulary.

    Args:
      variables: of the model.
      batch: arrays as in `batch.Batch`, of closed responses.
      tails: a score has no parts; False.
      confidence: False likewise.
      router: also how experts were used, where there are any.
      dropout: key for what adapters are not to see.

    Returns:
      `Scores` f32[B M K]; 0 for a response that is not there.
    """
    if tails or confidence:
      raise ValueError("a reward model has no log-probs, nor parts of them")
    shape = batch.lengths.shape
    last = last_of_slot(batch.slot, math.prod(shape[1:]))  # i32[B MK]
    at = jnp.take_along_axis(
      batch.source, last, axis=1, mode="fill", fill_value=batch.tokens.shape[1]
    )
    variables = self._spread(variables)
    hidden, used = hidden_states(
      self._model, variables, batch, at, router=router, dropout=dropout
    )
    # By hand, for products of matrices round on accelerators.
    head = self._model.score_head(variables)
    scores = (hidden.astype(jnp.float32) * head).sum(axis=-1).reshape(shape)
    return Scores(jnp.where(batch.lengths > 0, scores, 0.0), router=used)

  def sweeps(self, batch: Batch) -> bool:
    """Whether there is a sweep over the vocabulary to be had, see `Score`."""
    return False
