"""Responses with a token behind their last, which no model reads."""

import dataclasses
import hashlib

import numpy as np

from dpo_jax.data.store import Examples


def closed(examples: Examples, token: int) -> Examples:
  """The examples with one token more behind each response.

  A row reads a response up to the token before its last (`dpo_jax/batch.py`).
  Of a closed one it reads all of what the response was, which is where a reward
  model's score stands; the closing token is a target only.

  Args:
    examples: lengths of 0 stay 0.
    token: any id; what is read does not depend on it.
  """
  lengths = examples.lengths + (examples.lengths > 0)
  sizes = np.concatenate(
    [examples.prompt_lengths[:, None], lengths], axis=1
  ).astype(np.int64)
  ends = np.cumsum(sizes.reshape(-1))
  tokens = np.full(ends[-1] if len(ends) else 0, token, np.int32)
  own = np.ones(len(tokens), bool)
  own[ends.reshape(sizes.shape)[:, 1:][lengths > 0] - 1] = False
  tokens[own] = examples.tokens
  digest = hashlib.sha256(f"{examples.fingerprint} closed".encode())
  return dataclasses.replace(
    examples,
    tokens=tokens,
    offsets=np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]).astype(
      np.int64
    ),
    lengths=lengths.astype(np.int32),
    fingerprint=digest.hexdigest(),
  )
