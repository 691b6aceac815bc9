"""Every registered loss, and every modifier, written a second time: float64
numpy, straight from the formulas and without a thought for overflow.

A twin takes inputs by name and hyper-parameters, and returns the loss of each
example (for aot, whose loss belongs to ranks: sorted).
"""

import numpy as np


def log_sigmoid(x):
  return -np.logaddexp(0, -x)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def smoothed(margin, e=0.0):
  return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def h(x, side):
  return x[f"policy_{side}_logps"] - x[f"reference_{side}_logps"]


def both(x, beta=1.0):
  return beta * h(x, "chosen"), beta * h(x, "rejected")


def mean(x, side):
  return x[f"policy_{side}_logps"] / x[f"{side}_lengths"]


def sft(x):
  return -mean(x, "chosen")


def dpo(x, beta, label_smoothing):
  w, y = both(x, beta)
  return smoothed(w - y, label_smoothing)


def robust(x, beta, label_smoothing):
  w, y = both(x, beta)
  e = label_smoothing
  right, wrong = -log_sigmoid(w - y), -log_sigmoid(y - w)
  return ((1 - e) * right - e * wrong) / (1 - 2 * e)


def hinge(x, beta):
  w, y = both(x, beta)
  return np.maximum(0, 1 - (w - y))


def ipo(x, beta, average):
  w, y = both(x)
  if average == "tokens":
    w, y = w / x["chosen_lengths"], y / x["rejected_lengths"]
  return (w - y - 0.5 / beta) ** 2


def sigmoid_norm(x, beta):
  w, y = both(x)
  gap = w / x["chosen_lengths"] - y / x["rejected_lengths"]
  return smoothed(beta * gap)


def exo(x, beta, label_smoothing):
  w, y = both(x, beta)
  q = np.stack([sigmoid(w - y), sigmoid(y - w)])
  p = np.array([1 - label_smoothing, label_smoothing])[:, None]
  return (q * np.log(q / p)).sum(axis=0)


def nca(x, beta):
  w, y = both(x, beta)
  return -log_sigmoid(w) - (log_sigmoid(-w) + log_sigmoid(-y)) / 2


def bco_pair(x, beta):
  w, y = both(x, beta)
  return -log_sigmoid(w) - log_sigmoid(-y)


def sppo(x, beta):
  w, y = both(x)
  return (w - 0.5 / beta) ** 2 + (y + 0.5 / beta) ** 2


def aot(x, beta, label_smoothing):
  u, v = (
    np.sort(x[f"{m}_chosen_logps"] - x[f"{m}_rejected_logps"])
    for m in ("policy", "reference")
  )
  return smoothed(beta * (u - v), label_smoothing)


def aot_unpaired(x, beta, label_smoothing):
  w, y = map(np.sort, both(x, beta))
  return smoothed(w - y, label_smoothing)


def apo_zero(x, beta):
  w, y = both(x, beta)
  return 1 - sigmoid(w) + sigmoid(y)


def apo_down(x, beta):
  w, y = both(x, beta)
  return sigmoid(w) + 1 - sigmoid(w - y)


def discopop(x, beta, tau):
  w, y = both(x, beta)
  m = sigmoid((w - y) / tau)
  return (1 - m) * -log_sigmoid(w - y) + m * np.exp(y - w)


def dpop(x, beta, lam):
  w, y = both(x)
  return smoothed(beta * (w - y - lam * np.maximum(0, -w)))


def r_dpo(x, beta, alpha):
  w, y = both(x, beta)
  return smoothed(w - y + alpha * (x["chosen_lengths"] - x["rejected_lengths"]))


def _labelled(x, liked, disliked):
  return np.where(x["desirable"], liked, disliked)


def kto(x, beta, desirable_weight, undesirable_weight):
  z0 = max(0.0, (x["policy_kl_logps"] - x["reference_kl_logps"]).mean())
  r = x["policy_logps"] - x["reference_logps"]
  value = _labelled(x, sigmoid(beta * (r - z0)), sigmoid(beta * (z0 - r)))
  return _labelled(x, desirable_weight, undesirable_weight) * (1 - value)


def apo_zero_unpaired(x, beta, desirable_weight, undesirable_weight):
  s = sigmoid(beta * (x["policy_logps"] - x["reference_logps"]))
  return _labelled(x, desirable_weight * (1 - s), undesirable_weight * s)


def bco(x, beta, shift):
  r, d = beta * (x["policy_logps"] - x["reference_logps"]), x["desirable"]
  delta = r.mean() if shift == "pooled" else (r[d].mean() + r[~d].mean()) / 2
  disliked = -x["density_ratios"] * log_sigmoid(delta - r)
  return _labelled(x, -log_sigmoid(r - delta), disliked)


def orpo(x, lam):
  w, y = mean(x, "chosen"), mean(x, "rejected")
  odds = [np.exp(m) / (1 - np.exp(m)) for m in (w, y)]
  ratio = odds[0] / odds[1]
  return -w - lam * np.log(ratio / (1 + ratio))


def simpo(x, beta, gamma, label_smoothing):
  w, y = mean(x, "chosen"), mean(x, "rejected")
  return smoothed(beta * (w - y) - gamma, label_smoothing)


def cpo(x, beta, alpha, label_smoothing):
  gap = x["policy_chosen_logps"] - x["policy_rejected_logps"]
  return smoothed(beta * gap, label_smoothing) - alpha * mean(x, "chosen")


def cpo_simpo(x, beta, gamma, alpha, label_smoothing):
  return simpo(x, beta, gamma, label_smoothing) - alpha * mean(x, "chosen")


def alphapo(x, beta, gamma, alpha):
  p = [np.exp(mean(x, side)) for side in ("chosen", "rejected")]
  s = [(1 - q**-alpha) / alpha if alpha else np.log(q) for q in p]
  return smoothed(beta * (s[0] - s[1]) - gamma)


def slic(x, delta, lam):
  w, y = x["policy_chosen_logps"], x["policy_rejected_logps"]
  return np.maximum(0, delta - w + y) - lam * w


def tpo(x, beta, alpha, label_smoothing):
  gap = x["policy_chosen_logps"] - x["policy_rejected_logps"]
  return smoothed(beta * gap, label_smoothing) - alpha * mean(x, "gold")


def tpo_l(x, beta, gamma, alpha, label_smoothing):
  return simpo(x, beta, gamma, label_smoothing) - alpha * mean(x, "gold")


def reward(x, centering):
  w, y = x["chosen_scores"], x["rejected_scores"]
  return smoothed(w - y - x["preference_margins"]) + centering * (w + y) ** 2


def plackett_luce(x, beta):
  each = []
  for policy, reference, lengths in zip(
    x["policy_ranked_logps"],
    x["reference_ranked_logps"],
    x["ranked_lengths"],
    strict=True,
  ):
    e = np.exp(beta * (policy - reference))[lengths > 0]
    picked = [e[k] / e[k:].sum() for k in range(len(e))]
    each.append(-np.log(np.prod(picked)))
  return np.array(each)


# Modifiers


def under_divergence(x, divergence, alpha):
  """The inputs with f'(u) in place of log u."""
  out = dict(x)
  for side in ("chosen", "rejected"):
    u = np.exp(h(x, side))
    out[f"policy_{side}_logps"] = {
      "reverse_kl": lambda u: np.log(u),
      "forward_kl": lambda u: 1 - 1 / u,
      "js": lambda u: np.log(2 * u / (1 + u)),
      "alpha": lambda u: (u ** (alpha - 1) - 1) / (alpha - 1),
    }[divergence](u)
    out[f"reference_{side}_logps"] = np.zeros_like(u)
  return out


def desensitized(x, ld_alpha):
  out = dict(x)
  for model in ("policy", "reference"):
    for side in ("chosen", "rejected"):
      whole, tail = (x[f"{model}_{side}{p}_logps"] for p in ("", "_tail"))
      out[f"{model}_{side}_logps"] = whole - tail + ld_alpha * tail
  return out


def wpo_weights(x):
  return np.exp(x["chosen_confidence"]) * np.exp(x["rejected_confidence"])


# Which examples count how often in the mean, where not once each.
WEIGHTS = {"sft": "chosen_lengths"}
RANKED_LOSSES = ("aot", "aot_unpaired")


def term(name, x, options):
  """(each, mean) of one method."""
  each = globals()[name](x, **options)
  weights = x[WEIGHTS[name]] if name in WEIGHTS else np.ones_like(each)
  return each, (each * weights).sum() / weights.sum()


def loss(made, x):
  """(each, mean) of a `losses.Loss`: terms, coefficients, modifiers."""
  total, average = 0.0, 0.0
  for t in made.terms:
    mine, options = x, dict(t.options)
    pairs = t.name != "sft"
    if pairs and made.ld_alpha != 1:
      mine = desensitized(mine, made.ld_alpha)
    if pairs and made.divergence != "reverse_kl":
      mine = under_divergence(mine, made.divergence, made.divergence_alpha)
    each, one = term(t.name, mine, options)
    if pairs and made.wpo:
      each = each * wpo_weights(x)
      one = each.mean()
    total, average = total + t.coefficient * each, average + t.coefficient * one
  return total, average
