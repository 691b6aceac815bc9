"""What the sandbox changes in a template before it is compiled."""

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer


class Generation(Extension):
  """Accepts `{% generation %}`, which marks the text a model wrote."""

  tags = frozenset(["generation"])

  def parse(self, parser: Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


class Rewrite(NodeTransformer):
  """Sends what no other hook sees through filters that can count."""

  def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
    self.generic_visit(node)
    return _filter(nodes.List(node.nodes, lineno=node.lineno), " concat")

  def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
    return _filter(nodes.Const(node.data, lineno=node.lineno), " literal")

  def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
    self.generic_visit(node)
    return _filter(node, " slice") if type(node.arg) is nodes.Slice else node

  def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
    self.generic_visit(node)
    for side in (node, *node.ops):
      if not isinstance(side.expr, nodes.Const):
        side.expr = _filter(side.expr, " compared")
    return node

  def visit_For(self, node: nodes.For) -> nodes.Node:
    self.generic_visit(node)
    node.iter = _filter(node.iter, " turns")
    return node


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
