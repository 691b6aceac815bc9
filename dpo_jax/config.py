"""Every setting of a run: its name, type, default and meaning.

The files in `configs/` start from these defaults; the command line overrides
them by `--config.section.field=value`; nothing else is read anywhere.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from dpo_jax import losses
from dpo_jax.errors import ConfigError
from dpo_jax.watch import parse_steps


@dataclasses.dataclass(frozen=True)
class Model:
  path: str = ""  # Hugging Face folder to start from; "" starts from scratch
  tokenizer: str = ""  # folder, or "bytes"; "" is the one beside the weights
  family: str = "llama"  # this and the sizes: only from scratch
  width: int = 128
  layers: int = 4
  heads: int = 4
  kv_heads: int = 2
  ffn: int = 344
  tied: bool = True
  experts: int = 0  # of a family that has them, and a token's; 0: its own
  experts_per_token: int = 0
  dtype: str = "float32"  # of activations: float32 or bfloat16
  param_dtype: str = "float32"  # of weights and optimizer; adapters: float32
  remat: str = "auto"  # what the backward recomputes: none, minimal (all but
  # products and attention), block (layers), offload (and their inputs wait in
  # host memory); auto: the first of them to fit, from minimal on
  attention: str = "auto"  # blockwise, dense, triton (GPU) or mosaic (TPU)
  quantize: str = ""  # the base below adapters: "int8", "int4" or "nf4"
  head_tile: int = 1024  # rows of logits alive at once


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int = 0  # of adapters to train instead of the weights; 0: none
  alpha: float = 16.0  # adapters count alpha / rank
  targets: str = ""  # some of "q,k,v,o,gate,up,down"; "" is all
  dropout: float = 0.0  # of an adapter's input
  rslora: bool = False  # alpha / sqrt(rank) instead
  path: str = ""  # adapter folder to start from, which says all of the above


@dataclasses.dataclass(frozen=True)
class Reference:
  path: str = ""  # folder; "" is the policy's own starting point
  precompute: bool = False  # score pairs once, kept in data.cache_dir
  sync_every: int = 0  # steps between updates from the policy (TR-DPO); 0: none
  sync_mixup: float = 0.6  # the policy's share in those; 1 is a copy


@dataclasses.dataclass(frozen=True)
class Data:
  source: str = ""  # .jsonl[.gz], .json[.gz], .parquet, TFDS folder or name
  split: str = "train"  # of a TFDS source, slices allowed: "train[:90%]"
  eval_source: str = ""  # "" holds out the first eval_rows of the source
  eval_split: str = "test"
  eval_rows: int = 0  # most examples to evaluate on; 0 with a source: all
  max_length: int = 1024  # tokens of prompt and response together
  max_prompt_length: int = 0  # longer ones lose their beginning; 0: half
  row_length: int = 0  # tokens of a packed row; 0 chooses from the data
  row_counts: int = 4  # most shapes (rows, lengths) of batches; each compiles
  balance: int = 16  # shuffled batches among which examples are dealt out so
  # that all hold about as many tokens; 0: as shuffled. See docs/data.md
  on_bad_row: str = "drop"  # or "error"
  workers: int = 0  # processes that encode many rows; 0: one a core
  cache_dir: str = "~/.cache/dpo_jax"  # of encoded data, scores; "": none


@dataclasses.dataclass(frozen=True)
class Optim:
  name: str = "adamw"
  learning_rate: float = 1e-6
  schedule: str = "linear"
  warmup: float = 0.1  # share of the steps
  final: float = 0.0  # share of the peak learning rate
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8
  momentum: float = 0.0
  clip_norm: float = 1.0
  freeze: str = ""  # pattern of weights that stay, e.g. "embed|mlp"
  rates: str = ""  # factors on learning rates: "embed=0.1 mlp=0.5"


@dataclasses.dataclass(frozen=True)
class Train:
  batch_size: int = 64  # examples a step, over all devices
  microbatches: int = 1  # parts of it that run one after another
  router_balance: float = 1.0  # factor on the model's own weight of that loss
  epochs: float = 1.0
  steps: int = 0  # instead of epochs, where above 0
  eval_batch_size: int = 0  # 0: batch_size
  eval_every: int = 100  # steps; 0: only before and after
  checkpoint_every: int = 500  # steps; 0: only at the end
  keep_checkpoints: int = 2
  keep_best: str = ""  # of evaluation, "max METRIC" or "min METRIC": saves at
  # each, and keeps the best step as well
  on_damaged_checkpoint: str = "fallback"  # to the one before, or "stop"
  log_every: int = 10
  max_skipped: int = 10  # steps in a row that may be skipped as not finite
  export: bool = True  # write a Hugging Face folder at the end


@dataclasses.dataclass(frozen=True)
class Mesh:
  data: int = -1  # -1: the devices that the others leave
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Offload:
  """What lies in host memory until a step uses it."""

  reference: bool = False  # the one that stays; not one that follows the policy
  optimizer: bool = False  # moments; the weights stay on the device


@dataclasses.dataclass(frozen=True)
class Sample:
  prompts: int = 8  # held-out prompts to answer before and after; 0: none
  max_tokens: int = 128
  batch_size: int = 64  # prompts answered at a time
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  reward: str = ""  # "module:function" of (prompt, response), to score answers


@dataclasses.dataclass(frozen=True)
class Online:
  """Answers that the policy gives while it is trained; see docs/online.md."""

  method: str = ""  # ppo, grpo or pairs (the loss on best and worst answers);
  # "": trains on the answers of the data
  reward: str = ""  # "module:function" of (prompt, response)
  reward_model: str = ""  # or the folder of a trained one
  group: int = 0  # answers to a prompt; 0: 1 (ppo), 8 (grpo) or 2 (pairs)
  max_tokens: int = 256  # of an answer
  temperature: float = 1.0
  top_k: int = 0  # pairs only, as is another temperature than 1
  top_p: float = 1.0
  missing_end: float = 0.0  # taken off the reward of an answer without an end
  epochs: int = 1  # over the answers of a step
  minibatches: int = 1  # of them, an update each
  clip: float = 0.2  # of the ratio to the policy that answered
  clip_high: float = 0.0  # upwards; 0: as downwards
  kl: float = 0.05  # price of a nat from the reference; not of pairs
  kl_estimator: str = "k1"  # of ppo's price: k1, k2 or k3
  kl_target: float = 0.0  # nats a response to which ppo adapts it; 0: fixed
  kl_horizon: int = 10000  # answers in which that moves it by a fifth at most
  gamma: float = 1.0  # ppo: discount a token
  lam: float = 0.95  # ppo: of generalised advantage estimation
  whiten: bool = True  # ppo: advantages to mean 0 and deviation 1
  whiten_rewards: bool = False  # ppo: rewards of tokens to deviation 1
  value_clip: float = 0.2  # ppo: how far values move at once
  value_weight: float = 0.1  # ppo: of the value loss
  scale: str = "group"  # grpo: by whose deviation; group, batch or none
  reduction: str = "dapo"  # grpo, over tokens: grpo, bnpo, dapo or dr_grpo


@dataclasses.dataclass(frozen=True)
class Log:
  tensorboard: bool = False
  wandb: bool = False
  name: str = ""  # of the run, in W&B
  watchdog: float = 1800.0  # seconds without a step until stacks; 0: never
  trace: str = ""  # steps to profile, as in "20-22"
  peak_tflops: float = 0.0  # of a device, for mfu; 0: as its kind is known


@dataclasses.dataclass(frozen=True)
class Config:
  """All sections. `loss` holds a name and the hyper-parameters that differ from
  that loss's own defaults; None stands for "its default"."""

  seed: int = 0
  model: Model = Model()
  lora: Lora = Lora()
  reference: Reference = Reference()
  data: Data = Data()
  loss: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {"name": "dpo"}
  )
  optim: Optim = Optim()
  train: Train = Train()
  mesh: Mesh = Mesh()
  offload: Offload = Offload()
  sample: Sample = Sample()
  online: Online = Online()
  log: Log = Log()

  def __post_init__(self):
    _check_ranges(self)
    _check_words(self)

  def make_loss(self) -> losses.Loss:
    """The loss with its hyper-parameters.

    Raises:
      ConfigError: it has no such hyper-parameter, or a value is out of range.
    """
    options = {k: v for k, v in self.loss.items() if v is not None}
    if not isinstance(options.get("name"), str):
      raise ConfigError(
        f"config.loss.name={options.get('name')!r} should be one of"
        f" {', '.join(losses.names())}"
      )
    try:
      return losses.make(**options)
    except ValueError as e:
      own = "; one of your own is known once the config file imports it"
      hint = own if "unknown loss" in str(e) else ""
      raise ConfigError(f"config.loss: {e}{hint}") from e

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def identity(self) -> dict[str, Any]:
    """The settings that decide the numbers of a run, flat. Two runs that agree
    in these may continue one another."""
    flat = flatten(self.to_dict())
    return {k: v for k, v in flat.items() if not k.startswith(_HARMLESS)}


# What may change between the parts of one run: how fast, where, how talkative.
_HARMLESS = (
  "mesh.", "offload.", "log.", "data.cache_dir", "data.workers", "model.remat",
  "model.attention", "model.head_tile", "train.microbatches",
  "train.eval_every", "train.eval_batch_size", "train.log_every",
  "train.checkpoint_every", "train.keep_checkpoints", "train.keep_best",
  "train.on_damaged_checkpoint", "train.max_skipped",
  "train.export", "sample.batch_size",
)  # fmt: skip


# No number but a mesh's is negative; these count something there is at least
# one of, and those are shares.
_COUNTS = (
  "model.width", "model.layers", "model.heads", "model.kv_heads", "model.ffn",
  "model.head_tile", "data.row_counts", "train.batch_size",
  "train.microbatches", "train.keep_checkpoints", "sample.max_tokens",
  "sample.batch_size", "online.max_tokens", "online.epochs",
  "online.minibatches", "online.kl_horizon",
)  # fmt: skip
_SHARES = ("optim.final", "optim.b1", "optim.b2", "optim.momentum",
           "sample.top_p", "reference.sync_mixup", "lora.dropout",
           "online.top_p", "online.gamma", "online.lam")  # fmt: skip


def _check_ranges(config: Config) -> None:
  for key, value in flatten(config.to_dict()).items():
    if type(value) not in (int, float) or key.startswith(("mesh.", "loss.")):
      continue
    low = 1 if key in _COUNTS else 0
    high = 1 if key in _SHARES else 2**32 - 1
    if not low <= value <= high:  # NaN neither
      raise ConfigError(f"config.{key}={value} should lie in [{low}, {high}]")
  parse_steps(config.log.trace)
  if config.model.width < config.model.heads:
    raise ConfigError(
      f"config.model.heads={config.model.heads} should be at most"
      f" config.model.width={config.model.width}"
    )


def _check_words(config: Config) -> None:
  best = config.train.keep_best.split()
  if best and not (len(best) == 2 and best[0] in ("max", "min")):
    raise ConfigError(
      f"config.train.keep_best={config.train.keep_best!r} should be a direction"
      ' and a metric of evaluation, e.g. "min loss" or "max'
      ' rewards/accuracies"'
    )
  damaged = config.train.on_damaged_checkpoint
  if damaged not in ("fallback", "stop"):
    raise ConfigError(
      f"config.train.on_damaged_checkpoint={damaged!r} should be 'fallback' or"
      " 'stop'"
    )
  for name, words in _WORDS.items():
    value = getattr(config.online, name)
    if value not in words:
      raise ConfigError(
        f"config.online.{name}={value!r} should be one of"
        f" {', '.join(map(repr, words))}"
      )


_WORDS = {
  "method": ("", "ppo", "grpo", "pairs"),
  "kl_estimator": ("k1", "k2", "k3"),
  "scale": ("group", "batch", "none"),
  "reduction": ("grpo", "bnpo", "dapo", "dr_grpo"),
}


def check_names(names: Iterable[str]) -> None:
  """Raises ConfigError for what is neither a setting nor a section."""
  known = flatten(Config().to_dict()).keys() | {"loss"}
  sections = {name.partition(".")[0] for name in known}
  for name in names:
    if name not in known | sections and not name.startswith("loss."):
      close = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ConfigError(f"the config has no setting {name!r}{hint}")


def without(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """Flat settings that are neither among the names nor in a section that is."""
  return {
    key: value
    for key, value in values.items()
    if not any(key == name or key.startswith(name + ".") for name in names)
  }


def from_dict(values: dict[str, Any]) -> Config:
  """Builds the typed form, checking every name and type.

  Raises:
    ConfigError: a key is not known or a value has another type; the message
      names the key and what was expected.
  """
  sections = {f.name: f for f in dataclasses.fields(Config)}
  known = Config()
  built = {}
  for key, value in values.items():
    _check_known(key, sections, "config")
    default = getattr(known, key)
    section = dataclasses.is_dataclass(default)
    wanted = dict if section else type(default)
    if type(value) is not wanted:
      raise ConfigError(
        f"config.{key}={value!r} should be of type {wanted.__name__}"
      )
    if section:
      built[key] = _section(key, type(default), value)
    else:
      built[key] = dict(value) if wanted is dict else value
  return Config(**built)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def differences(saved: dict[str, Any], mine: dict[str, Any]) -> str:
  """Names the settings in which two flat configs differ; "" if in none."""
  lines = [
    f"{key}: {saved.get(key)!r} there, {mine.get(key)!r} here"
    for key in sorted(saved.keys() | mine.keys())
    if saved.get(key) != mine.get(key)
  ]
  return "; ".join(lines)


def _section(name, cls, values):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = dict(values)
  for key, value in values.items():
    _check_known(key, fields, f"config.{name}")
    wanted = fields[key].type
    number = wanted is float and type(value) is int
    if type(value) is not wanted and not number:
      raise ConfigError(
        f"config.{name}.{key}={value!r} should be of type {wanted.__name__}"
      )
    values[key] = wanted(value)
  return cls(**values)


def _check_known(key, known, where) -> None:
  if key not in known:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
      f"{where} has no field {key!r}{hint}; it has: {', '.join(known)}"
    )
