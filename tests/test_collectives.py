"""What the compiled step moves between eight devices, against the least."""

import json
import pathlib
import re
import sys

import jax
import pytest
from devices import run_on_eight
from jax.sharding import PartitionSpec as P
from meshes import make_run

from dpo_jax import collectives, memory

TIED, UNTIED = ({"tie_word_embeddings": tied} for tied in (True, False))
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4}
CASES = {
  "fsdp": ((1, 8, 1), TIED, {}),
  "data and fsdp": ((2, 4, 1), UNTIED, {"model.remat": "block"}),
  "bfloat16": ((2, 4, 1), UNTIED, {"model.dtype": "bfloat16"}),
  "lora": ((1, 8, 1), TIED, {"lora.rank": 4}),
  "tensor": ((2, 2, 2), UNTIED, {}),
  "experts": ((2, 4, 1), EXPERTS, {}),
}


def measured(folder, mesh, model, changes):
  """Totals by kind, and the least, of a run's step."""
  run = make_run(folder, mesh, model, **changes)
  compiled = memory.compile_step(run)
  text, cost = compiled.as_text(), compiled.cost_analysis()
  found = collectives.read(text)
  trained, _ = run.trainable.split(run.built.abstract)
  least = collectives.least(
    run.built.abstract["params"], trained, itemsize=4,
    reference=run.scores_reference(),
  )  # fmt: skip
  return {
    "cost": [cost["flops"], cost["bytes accessed"]],
    "least": least,
    "known": all(c.known for c in found),
    "rounded": all("bf16" in x for x in _before_gathers(text)),
    **{kind: collectives.total(found, kind) for kind in collectives.KINDS},
  }


def flops_from(folder, place):
  """FLOPs of a device in a forward over eight rows that lie as `place` says."""
  built = make_run(folder, (1, 8, 1), TIED).built
  rows = jax.ShapeDtypeStruct(
    (8, 256), "int32", sharding=jax.sharding.NamedSharding(built.mesh, place)
  )
  run = jax.jit(built.model.apply).lower(built.abstract, rows, rows, rows, rows)
  return run.compile().cost_analysis()["flops"]


def _before_gathers(text):
  """What computes the operand of each all-gather of weights."""
  bodies = dict(
    re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
  )
  for name in re.findall(r" all-gather\(%([\w.\-]+)\)", text):
    line = re.search(rf"^ *%{re.escape(name)} = .*$", text, re.M)[0]
    called = re.search(r"calls=%([\w.\-]+)", line)
    yield bodies[called[1]] if called else line


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
  printed = run_on_eight(__file__, str(tmp_path_factory.mktemp("meshes")))
  read = json.loads(printed.splitlines()[-1])
  for of_case in (read[name] for name in CASES):
    of_case["least"] = collectives.Least(*of_case["least"])
    for kind in collectives.KINDS:
      of_case[kind] = collectives.Moved(*of_case[kind])
  return read


@pytest.mark.parametrize("case", CASES)
def test_no_token_moves_between_devices(on_eight, case):
  for kind in ("collective-permute", "all-to-all", "ragged-all-to-all"):
    assert on_eight[case][kind].count == 0
  assert on_eight[case]["known"]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_once_for_each_pass(on_eight, case):
  gathered = on_eight[case]["all-gather"].received
  least = on_eight[case]["least"].gathered
  # Less would be more memory: layers that are kept whole for the backward.
  assert least * 0.99 < gathered < least * 1.01


@pytest.mark.parametrize("case", [name for name in CASES if name != "tensor"])
def test_gradients_are_added_up_once(on_eight, case):
  moved = on_eight[case]
  summed = sum(moved[kind].bytes for kind in collectives.SUMS)
  # Beside the gradients a few numbers: loss, metrics, norms.
  assert moved["least"].summed < summed < moved["least"].summed * 1.02


def test_weights_are_rounded_before_they_are_gathered(on_eight):
  # This compiler has float32 collectives only, and so shows no smaller bytes.
  assert on_eight["bfloat16"]["rounded"]
  assert not on_eight["fsdp"]["rounded"]


def test_a_device_of_eight_computes_what_one_alone_does(on_eight, tmp_path):
  alone = measured(tmp_path, (1, 1, 1), *CASES["fsdp"][1:])
  flops, accessed = on_eight["fsdp"]["cost"]
  assert flops == pytest.approx(alone["cost"][0], rel=0.05)
  # Fewer, by the weights and moments that it updates an eighth of.
  assert 0.5 * alone["cost"][1] < accessed < 1.05 * alone["cost"][1]


def test_rows_are_split_wherever_they_lay(on_eight):
  split, whole = on_eight["flops"]
  assert whole < 1.05 * split


LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (x: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = (s32[], bf16[4,8]) parameter(0)
  %g = bf16[4,8]{1,0} all-gather(%y), channel_id=1, GROUPS, dimensions={1}
  %r = (f32[8]{0}, /*index=1*/f32[]) all-reduce(%p, %q), GROUPS, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]) tuple(%i, %g)
}

%cond (x: (s32[], bf16[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %w = (s32[], bf16[4,8]) while(%t), condition=%cond, body=%bodyTRIPS
  %s = f32[2]{0} reduce-scatter(%x), GROUPS, to_apply=%add
  %start = (f32[2], f32[8]) all-gather-start(%s), GROUPS, dimensions={0}
  %done = f32[8] all-gather-done(%start)
  ROOT %p = f32[8] collective-permute(%done), source_target_pairs={{0,1},{1,0}}
}
"""
GROUPS = {
  "listed": "replica_groups={{0,1,2,3},{4,5,6,7}}",
  "iota": "replica_groups=[2,4]<=[8]",
  "mesh": "replica_groups=mesh['a'=2,'b'=4] {'b'}",
}
TRIPS = ', backend_config={"known_trip_count":{"n":"3"}}'


@pytest.mark.parametrize("notation", GROUPS)
def test_bytes_of_every_kind_are_read_and_loops_multiply(notation):
  text = LOOP.replace("GROUPS", GROUPS[notation]).replace("TRIPS", TRIPS)
  found = collectives.read(text)
  assert [(c.kind, c.bytes, c.times) for c in found] == [
    ("all-gather", 64, 3),
    ("all-reduce", 36, 3),
    ("reduce-scatter", 32, 1),
    ("all-gather", 32, 1),
    ("collective-permute", 32, 1),
  ]
  assert all(c.known for c in found)
  # Of four devices, each has a quarter already.
  assert [c.received for c in found] == [144, 162, 24, 24, 32]
  assert collectives.total(found, "all-gather") == (4, 224, 168)
  assert collectives.total(found, *collectives.SUMS) == (4, 140, 186)


def test_what_the_compiler_for_gpus_writes_is_read():
  """As jaxlib 0.10.2 has it for an H100: several at once, apart from their
  ends."""
  start = "reduce-scatter-start(%x, %y), GROUPS, to_apply=%add"
  text = f"""HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[8,16], y: bf16[8,32]) -> bf16[1,16] {{
  %s = ((bf16[8,16], bf16[8,32]), (bf16[1,16], bf16[1,32])) {start}
  %d = (bf16[1,16], bf16[1,32]) reduce-scatter-done(%s)
  %p = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%z)
  ROOT %g = bf16[1,16] get-tuple-element(%d), index=0
}}
"""
  found = collectives.read(text.replace("GROUPS", GROUPS["listed"]))
  assert [(c.kind, c.arrays, c.bytes) for c in found] == [
    ("reduce-scatter", ("bf16[1,16]", "bf16[1,32]"), 4 * (32 + 64)),
    ("collective-permute", ("f32[4]",), 16),
  ]


TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (x: bf16[8,16]) -> bf16[1,16] {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[8,16]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, GROUPS
  ROOT %part = bf16[1,16]{1,0:T(2,128)} dynamic-slice(%sum, %at)
}

%begin (p: bf16[4,16]) -> (bf16[4,16], bf16[32,16]) {
  %g = bf16[32,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, GROUPS, CHAIN
  ROOT %c = (bf16[4,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) custom-call(%p)
}

%end (p: bf16[4,16]) -> bf16[32,16] {
  %h = bf16[32,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, GROUPS, CHAIN
  ROOT %d = bf16[32,16]{1,0:T(8,128)S(1)} custom-call(%h)
}

%body (x: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %y = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) fusion(%x), calls=%begin
  %z = bf16[32,16]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%end
  ROOT %out = (s32[], bf16[4,16]) tuple(%i, %z)
}

%cond (x: (s32[], bf16[4,16])) -> pred[] {
  %constant.8 = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%x), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.8), direction=LT, metadata={}
}

ENTRY %main (x: bf16[8,16]) -> bf16[1,16] {
  %w = (s32[]{:T(128)}, bf16[4,16]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %s = bf16[1,16]{1,0} fusion(%x), calls=%all-reduce-scatter.1
}
"""


def test_what_the_compiler_for_tpus_writes_is_read():
  """As libtpu 0.0.42 has it, cut short."""
  chain = 'frontend_attributes={chain_id="2"}'
  groups = "replica_groups=[1,8]<=[8]"
  text = TPU.replace("GROUPS", groups).replace("CHAIN", chain)
  found = collectives.read(text)
  assert [(c.kind, c.bytes, c.times, c.known) for c in found] == [
    ("all-gather", 1024, 3, True),
    ("reduce-scatter", 256, 1, True),
  ]
  alone = collectives.read(text.replace(chain, ""))
  assert [c.bytes for c in alone] == [1024, 1024, 256]
  counted = collectives.read(text.replace("constant(3)", "parameter(0)"))
  assert [c.known for c in counted] == [False, True]


def test_what_a_device_adds_up_with_itself_does_not_move():
  alone = {
    "listed": "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}",
    "iota": "replica_groups=[8,1]<=[8]",
    "mesh": "replica_groups=mesh['a'=8,'b'=1] {'b'}",
  }
  for groups in alone.values():
    text = LOOP.replace("GROUPS", groups).replace("TRIPS", TRIPS)
    assert [c.kind for c in collectives.read(text)] == ["collective-permute"]


def test_a_loop_of_unknown_length_is_told():
  text = LOOP.replace("GROUPS", GROUPS["iota"]).replace("TRIPS", "")
  known = [c.known for c in collectives.read(text)]
  assert known == [False, False, True, True, True]


def test_what_cannot_be_read_is_refused():
  with pytest.raises(ValueError, match="no entry"):
    collectives.read("module @jit_step {}")
  text = LOOP.replace("GROUPS", "replica_groups=?").replace("TRIPS", TRIPS)
  with pytest.raises(ValueError, match="notation"):
    collectives.read(text)


if __name__ == "__main__":
  assert jax.device_count() == 8
  at = pathlib.Path(sys.argv[1])
  found = {name: measured(at, *CASES[name]) for name in CASES}
  places = P(("data", "fsdp")), P()
  print(json.dumps(found | {"flops": [flops_from(at, x) for x in places]}))
