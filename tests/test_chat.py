"""Templates render as their authors meant, and cannot do anything else."""

import time

import pytest
from chat_templates import SPECIAL, TEMPLATES
from shared import SHARED, needs_shared

from dpo_jax.data.chat import MAX_TEMPLATE, TemplateRefused, render
from dpo_jax.data.sources import read_rows
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import DataError

MESSAGES = [
  {"role": "system", "content": " be <kind> "},
  {"role": "user", "content": "hé"},
  {"role": "assistant", "content": "ja"},
]
CHATML = """{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- raise_exception('system first') }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# What else templates in use are written with.
WIDE = """{{ bos_token }}{% set ns = namespace(i=0, s='') %}
{% for m in messages[::-1] %}
  {% if m.tool_calls is defined %}{% continue %}{% endif %}
  {% set ns.i = ns.i + 1 %}{% set ns.s = ns.s ~ m.role[:2] ~ ns.i %}
  {%- if m.role == 'user' %}{% break %}{% endif %}
{% endfor %}
{% macro show(x) %}[{{ x | upper }}]{% endmacro %}
{{ show(ns.s) }}{{ messages | tojson }}{{ {'a': 1} | tojson(indent=2) }}
{{ messages | map(attribute='role') | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'a-b'.split('-')[-1].replace('b', 'c') }}{{ '%02d' % 7 }}
{{ '{}!'.format(3) }}
{{ dict(a=1).items() | list }}{{ [1, 2] + [3] }}{{ 'x' * 3 }}{{ 2 ** 5 }}
{{ messages[0].content.strip() in ['be <kind>'] }}{{ tools is none }}
{{ raise_exception is defined }}{{ undefined_thing }}{{ [3, 1] | sort }}
"""


def test_a_template_in_common_form_renders_whole_and_opening():
  special = {"eos_token": "<|im_end|>"}
  turn = "<|im_start|>user\nhé<|im_end|>"
  whole = f"<|im_start|>system\nbe <kind><|im_end|>{turn}"
  assert render(CHATML, MESSAGES[:2], special, False) == whole
  assert render(CHATML, MESSAGES[:2], special, True) == (
    whole + "<|im_start|>assistant\n"
  )


def test_what_a_template_refuses_can_be_told_from_what_it_breaks():
  with pytest.raises(TemplateRefused, match="system first"):
    render(CHATML, MESSAGES[1:], {"eos_token": ""}, False)
  with pytest.raises(TemplateRefused, match="no element 7"):
    render("{{ messages[7].content.x }}", MESSAGES, {}, False)


# What the templates of the families do to one conversation.
FAMILIES = {
  "inst": "<|bos|>[Q] <<SYSTEM>>\n be <kind> \n<</SYSTEM>>\n\nhé [/Q] ja "
  "<|eos|><|bos|>[Q] q [/Q]",
  "last_user": "<|bos|>[Q] hé[/Q] ja<|eos|>[Q]  be <kind> \n\nq[/Q]",
  "thinking": "<|start|>system\n be <kind> <|end|>\n<|start|>user\nhé<|end|>\n"
  "<|start|>assistant\nja<|end|>\n<|start|>user\nq<|end|>\n"
  "<|start|>assistant\n",
  "turns": "<|bos|><turn>user\n be <kind> \n\nhé</turn>\n<turn>model\nja"
  "</turn>\n<turn>user\nq</turn>\n<turn>model\n",
  "bars": "<|system|>\n be <kind> <|eos|>\n<|user|>\nhé<|eos|>\n<|assistant|>\n"
  "ja<|eos|>\n<|user|>\nq<|eos|>\n<|assistant|>\n",
  "one_line": None,  # it takes no system's turn
}


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_in_the_manner_of_families_render(name):
  template, changes = TEMPLATES[name]
  special = {k: v for k, v in (SPECIAL | changes).items() if v}
  messages = [*MESSAGES, {"role": "user", "content": "q"}]
  if FAMILIES[name] is None:
    with pytest.raises(TemplateRefused, match="no system role"):
      render(template, messages, special, True)
  else:
    assert render(template, messages, special, True) == FAMILIES[name]


def test_generation_blocks_are_transparent():
  template = "{% generation %}{{ messages[1].content }}{% endgeneration %}."
  assert render(template, MESSAGES, {}, False) == "hé."


HOSTILE = {
  "walks attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "asks for globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
  "walks by filter": "{{ (''|attr('__class__')).__mro__ }}",
  "walks by format": "{{ '{0.__class__.__mro__}'.format('') }}",
  "changes messages": "{{ messages.append(1) }}",
  "changes a message": "{{ messages[0].update(role='x') }}",
  "includes": "{% include '/etc/passwd' %}",
  "imports": "{% import 'os' as os %}",
  "long range": "{% for i in range(10**9) %}x{% endfor %}",
  "multiplied string": "{{ 'a' * 10**10 }}",
  "multiplied list": "{{ [0] * 10**10 }}",
  "power": "{{ 10 ** (10 ** 10) }}",
  "power of power": "{{ 9 ** 999 ** 9 }}",
  "negative round": "{{ 5 | round(-10**9) }}",
  "wide percent": "{{ '%1000000000d' % 1 }}",
  "starred percent": "{{ '%*d' % (10**9, 1) }}",
  "format filter": "{{ '%1000000000d' | format(1) }}",
  "wide format": "{{ '{:1000000000}'.format(1) }}",
  "nested format": "{{ '{:{}}'.format(1, 10**9) }}",
  "centre": "{{ 'a'.center(10**10) }}{{ 'a'|center(10**10) }}",
  "fill": "{{ 'a'.zfill(10**10) }}",
  "tabs": "{{ '\t'.expandtabs(10**10) }}",
  "lipsum": "{{ lipsum(n=10**6) }}",
  "indent": "{{ 'a\nb' | indent(10**9) }}{{ [1] | tojson(indent=10**9) }}",
  "time format": "{{ strftime_now('%1000000000d') }}",
  "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
  "join": "{{ (['a' * 10**5] * 10**5) | join }}",
  "method join": "{{ ''.join(['a' * 10**5] * 10**5) }}",
  "turns": "{% for i in range(99999) %}{% for j in range(99999) %}"
  "{% endfor %}{% endfor %}",
  "text in turns": "{% set x %}{% for i in range(99999) %}"
  + "x" * 9999
  + "{% endfor %}{% endset %}",
  "values in turns": "{% set b = 'a' * 99999 %}{% set x %}"
  "{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
  "slices in turns": "{% set b = 'a' * 9999999 %}{% set n = namespace(l=[]) %}"
  "{% for i in range(9999) %}{% set n.l = n.l + [b[1:]] %}{% endfor %}",
  "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
  "{% set n.s = n.s ~ n.s %}{% endfor %}",
  "adding": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
  "{% set n.s = n.s + n.s %}{% endfor %}",
  "nested lists": "{% set n = namespace(l=[]) %}{% for i in range(60) %}"
  "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
  "nested comparison": "{% set n = namespace(l=[], m=[]) %}"
  "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
  "{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
  "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "recursive loop": "{% for i in range(99) recursive %}{{ loop(range(99)) }}"
  "{% endfor %}",
  "long output": "{% for i in range(9999) %}{{ 'a' * 99 }}{% endfor %}",
  "deep": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
  "long": "x" * (MAX_TEMPLATE + 1),
  "broken": "{% if %}",
  "unknown filter": "{{ 1 | pprint }}",
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_one_line_and_soon(attack):
  begun = time.monotonic()
  with pytest.raises(DataError) as caught:
    render(attack, MESSAGES, {}, True)
  assert time.monotonic() - begun < 5
  assert "\n" not in str(caught.value)
  assert str(caught.value).startswith("chat template")


def test_a_rendering_leaves_the_allowance_of_the_next_alone():
  long = [{"role": "user", "content": "a" * 1_000_000}]
  template = "{% for m in messages %}{{ m.content ~ '!' }}{% endfor %}"
  for _ in range(40):
    assert len(render(template, long, {}, False)) == 1_000_001


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, WIDE], ids=["chatml", "wide"])
def test_templates_render_as_transformers_renders_them(template):
  utils = pytest.importorskip("transformers.utils.chat_template_utils")
  special = {"bos_token": "<s>", "eos_token": "</s>"}
  for count, opening in ((2, True), (3, False)):
    theirs, _ = utils.render_jinja_template(
      [MESSAGES[:count]],
      chat_template=template,
      add_generation_prompt=opening,
      **special,
    )
    assert render(template, MESSAGES[:count], special, opening) == theirs[0]


@needs_shared
@pytest.mark.parity
def test_chat_demo_renders_as_transformers_renders_it():
  transformers = pytest.importorskip("transformers")
  path = str(SHARED / "data" / "stories260k" / "hf")
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  ours = load_tokenizer(path)
  source = str(SHARED / "data" / "chat_demo" / "pairs_messages.jsonl.gz")
  for _, row in list(read_rows(source))[:30]:
    for messages, opening in (
      (row["prompt"], True),
      (row["prompt"] + row["chosen"], False),
    ):
      assert render(
        ours.chat_template, messages, ours.special_tokens, opening
      ) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=opening
      )
