"""Conversations: rows with a list of messages, which the chat template renders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from axolotl.data.formats.columns import decoded, kind
from axolotl.data.formats.messages import MessageReader
from axolotl.data.formats.registry import Format, Row, formats
from axolotl.data.types import Conversation, Message, RowProblem

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


@formats.register(
    "chat_template", "messages", "messages.chat", requires=["messages"], optional=["tools", "system"]
)
def chat_template(entry: DatasetEntry, data: DataSection) -> Format:
    field = entry.field_messages or "messages"
    field_tools = entry.field_tools or "tools"
    field_system = entry.field_system or "system"
    drop_system = bool(entry.drop_system_message)
    reader = MessageReader(entry, data)
    read = reader.read

    def convert(row: Row) -> Conversation:
        messages = _messages(row, field, read)
        system = row.get(field_system)
        if system is not None and messages[0].role != "system":
            if not isinstance(system, str):
                raise RowProblem("field is not text", f"`{field_system}` holds {kind(system)}")
            if system:
                messages.insert(0, Message("system", system))
        if drop_system and messages[0].role == "system":
            del messages[0]
            if not messages:
                raise RowProblem("no messages", "nothing is left without the system message")
        tools = row.get(field_tools)
        return Conversation(messages, _tools(tools, field_tools) if tools else None)

    return Format("chat_template", convert, (field,), (field_tools, field_system), reader.watch)


def _messages(row: Row, field: str, read: Callable[[Any, int], Message]) -> list[Message]:
    found = row.get(field)
    if isinstance(found, str):
        found = decoded(found, f"`{field}`")
    if isinstance(found, dict):
        found = _rows_of(found, field)
    if not isinstance(found, list):
        if field not in row:
            raise RowProblem(
                "field missing", f"the row has no `{field}`, it has: {', '.join(map(str, row)) or 'nothing'}"
            )
        raise RowProblem("not a list of messages", f"`{field}` holds {kind(found)}")
    if not found:
        raise RowProblem("no messages", f"`{field}` is empty")
    return [read(message, number) for number, message in enumerate(found, 1)]


def _rows_of(table: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The messages of a column that holds one list for each key, as some Arrow files do."""
    lists = list(table.values())
    if not lists or not all(isinstance(v, list) and len(v) == len(lists[0]) for v in lists):
        raise RowProblem("not a list of messages", f"`{field}` holds an object")
    return [dict(zip(table, values, strict=True)) for values in zip(*lists, strict=True)]


def _tools(tools: Any, field: str) -> list[Any] | None:
    """The tools on offer, decoded as far as they come as JSON."""
    tools = decoded(tools, f"`{field}`") if isinstance(tools, str) else without_none(tools)
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        if tools is None:
            return None
        raise RowProblem("tools are not a list", f"`{field}` holds {kind(tools)}")
    return [_tool(tool, field) for tool in tools] or None


def _tool(tool: Any, field: str) -> Any:
    if isinstance(tool, str):
        tool = decoded(tool, f"a tool in `{field}`")
    if not isinstance(tool, dict):
        raise RowProblem("tool is not an object", f"`{field}` holds {kind(tool)} among its tools")
    function = tool.get("function")
    if isinstance(function, dict):
        parameters = function.get("parameters")
        if isinstance(parameters, str):
            name = f"the parameters of the tool `{function.get('name')}`"
            return {**tool, "function": {**function, "parameters": decoded(parameters, name)}}
    elif isinstance(tool.get("parameters"), str):
        return {
            **tool,
            "parameters": decoded(tool["parameters"], f"the parameters of the tool `{tool.get('name')}`"),
        }
    return tool


def without_none(value: Any) -> Any:
    """The value without object members that are null: Arrow fills them in for every key that any row has."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value
