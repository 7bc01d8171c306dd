"""Following a chat template while it writes: at which turn it stands, and whether it writes because of tool calls.

The parsed template gets calls woven in that move a pen: at the head of a loop over messages, behind it, and around what
is written because of `tool_calls`.
"""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2 import nodes

from axolotl.data.traced import concat

_ENTER, _LEAVE, _TOOL, _CONCAT = "axolotl_enter", "axolotl_leave", "axolotl_tool", "axolotl_concat"


class TurnDict(dict[str, Any]):
    """A message as the template sees it; knows which turn it is."""

    __slots__ = ("axolotl_turn",)
    axolotl_turn: int


class Pen:
    """Where the template is while it writes: at which turn, and whether because of tool calls."""

    __slots__ = ("loop", "outer", "tools", "turn")

    def __init__(self) -> None:
        self.turn, self.tools, self.loop = -1, 0, -1
        self.outer: list[tuple[int, int, int]] = []

    def enter(self, item: Any, loop: int) -> None:
        if type(item) is TurnDict:
            if self.loop != loop:
                self.outer.append((self.turn, self.tools, self.loop))
            self.turn, self.tools, self.loop = item.axolotl_turn, 0, loop

    def leave(self, loop: int) -> None:
        if self.loop == loop:
            self.turn, self.tools, self.loop = self.outer.pop()

    def tool(self, step: int) -> None:
        self.tools = max(0, self.tools + step)

    def calls(self) -> dict[str, Any]:
        """What an instrumented template calls, by the names that it knows."""
        return {_ENTER: self.enter, _LEAVE: self.leave, _TOOL: self.tool, _CONCAT: concat}


def _mentions_tool_calls(node: nodes.Node) -> bool:
    for each in [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name, nodes.Const))]:
        if isinstance(each, nodes.Getattr) and each.attr == "tool_calls":
            return True
        if isinstance(each, nodes.Name) and each.name == "tool_calls":
            return True
        if isinstance(each, nodes.Const) and each.value == "tool_calls":
            return True
    return False


def instrument(node: nodes.Node, environment: jinja2.Environment) -> None:
    """Adds to a parsed template the calls that move the pen, and replaces `~` by a concatenation that keeps origins."""

    def call(name: str, *args: nodes.Expr, line: int) -> nodes.Node:
        made = nodes.ExprStmt(nodes.Call(nodes.Name(name, "load"), list(args), [], None, None))
        return made.set_lineno(line, override=True)

    counter = iter(range(1_000_000))

    def rewrite(item: nodes.Node) -> None:
        for field, value in item.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(item, field, _concat_call(value))
            elif isinstance(value, list):
                value[:] = [_concat_call(v) if isinstance(v, nodes.Concat) else v for v in value]
        for child in item.iter_child_nodes():
            rewrite(child)
        for field, value in item.iter_fields():
            if field == "elif_":  # branches of one statement, woven with it
                continue
            if isinstance(value, list) and any(isinstance(v, (nodes.For, nodes.If)) for v in value):
                value[:] = [w for v in value for w in weave(v)]

    def weave(stmt: Any) -> list[nodes.Node]:
        """The statement with its pen movements, and what follows it."""
        if isinstance(stmt, nodes.For):
            k = next(counter)
            line = stmt.lineno
            about_tools = _mentions_tool_calls(stmt.iter)
            if isinstance(stmt.target, nodes.Name):
                stmt.body.insert(
                    0, call(_ENTER, nodes.Name(stmt.target.name, "load"), nodes.Const(k), line=line)
                )
            if about_tools:
                return [call(_TOOL, nodes.Const(1), line=line), stmt, call(_TOOL, nodes.Const(-1), line=line)]
            return [stmt, call(_LEAVE, nodes.Const(k), line=line)]
        if isinstance(stmt, nodes.If):
            for branch in (stmt, *stmt.elif_):
                if _mentions_tool_calls(branch.test):
                    branch.body.insert(0, call(_TOOL, nodes.Const(1), line=branch.lineno))
                    branch.body.append(call(_TOOL, nodes.Const(-1), line=branch.lineno))
        return [stmt]

    def _concat_call(found: nodes.Concat) -> nodes.Node:
        made = nodes.Call(nodes.Name(_CONCAT, "load"), [nodes.List(list(found.nodes))], [], None, None)
        return made.set_lineno(found.lineno, override=True)

    rewrite(node)
    node.set_environment(environment)
