"""The batch: arrays that describe packed, mirrored rows.

A pair lies in one row, its rejected branch reversed in front of the prompt. For
the prompt p1 p2 p3 p4 and responses of three tokens:

    predicts   l3  l2  l1 |             | c1  c2  c3
    row        l2  l1  p4 | p1  p2  p3  | p4  c1  c2
    position    5   4   3 |  0   1   2  |  3   4   5
    index       0   1   2 |  3   4   5  |  6   7   8
    key_start   0   1   2 |  3   3   3  |  3   3   3
    key_end     6   6   6 |  4   5   6  |  7   8   9

Attention knows order only through positions and mask, so this computes what two
separate sequences would, with the prompt once; and the keys that any query sees
are one contiguous range `[key_start, key_end)`, for any number of pairs packed
side by side. A branch begins with its own copy of the prompt's last token and
ends before its response's last, so each branch token predicts exactly one
scored token and no prompt token predicts any.

A ranking of more than two responses lies in several such segments side by side,
two responses each, each with its own copy of the prompt.

Letters: B rows, T tokens a row, S scored tokens a row, M examples a row, K
responses (branches) an example, 2 but for rankings.
"""

from typing import NamedTuple

import jax


class Router(NamedTuple):
  """How a mixture of experts was used, summed over the tokens of a row and
  over the layers; see `models.moe.balance`."""

  load: jax.Array  # f32[B E], how often each expert was chosen
  probs: jax.Array  # f32[B E], its probabilities
  tokens: jax.Array  # f32[B]


class Scores(NamedTuple):
  """What a model says of every response of a batch, f32[B M K] each."""

  # Summed log-probs, or a reward model's scores; 0 for a response that is not
  # there.
  logps: jax.Array
  tails: jax.Array | None = None  # beyond the other response's length, see LD
  confidence: jax.Array | None = None  # without gradient, see WPO
  router: Router | None = None  # of the rows and not of their responses


class Batch(NamedTuple):
  """One global batch. Branch 0 is the chosen response, branch 1 the rejected
  one; for unpaired data the completion and a mismatched one; for sft branch 1
  is empty; for rankings the best response is branch 0."""

  tokens: jax.Array  # i32[B T]
  positions: jax.Array  # i32[B T], counted from the prompt's first token
  key_start: jax.Array  # i32[B T], first visible key of each query
  key_end: jax.Array  # i32[B T], one past the last; 0 for padding
  source: jax.Array  # i32[B S], index in the row of the token that predicts
  target: jax.Array  # i32[B S], the token id it must predict
  slot: jax.Array  # i32[B S], K * example + branch; K M for padding
  lengths: jax.Array  # i32[B M K], scored tokens of each response
  weights: jax.Array  # f32[B M], 0 for an empty place
  desirable: jax.Array  # bool[B M], labels of unpaired data
  margins: jax.Array  # f32[B M], of pairs: by how much the first is better
  reference: Scores | None = None  # under the reference, if precomputed
