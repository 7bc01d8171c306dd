"""`type:` written as a mapping: the user names the columns and lays out the prompt."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import TYPE_CHECKING

from axolotl.data.formats.columns import optional_text, text
from axolotl.data.formats.registry import Format, Row
from axolotl.data.types import Piece, Pieces
from axolotl.errors import ConfigError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, PromptMapping

FORMAT = "{instruction} {input} "
NO_INPUT_FORMAT = "{instruction} "
SYSTEM_FORMAT = "{system}"


def user_defined(mapping: PromptMapping, data: DataSection) -> Format:
    """The format that a mapping describes. Raises ConfigError for a layout with an unknown placeholder."""
    instruction = mapping.field_instruction or "instruction"
    extra = mapping.field_input or "input"
    answer = mapping.field_output or "output"
    system = mapping.field_system or "system"
    # `is None`: an empty layout is a layout.
    turn = _layout(FORMAT if mapping.format is None else mapping.format, "format", {"instruction", "input"})
    bare = _layout(
        NO_INPUT_FORMAT if mapping.no_input_format is None else mapping.no_input_format,
        "no_input_format",
        {"instruction"},
    )
    head = _layout(
        SYSTEM_FORMAT if mapping.system_format is None else mapping.system_format, "system_format", {"system"}
    )
    default_system = mapping.system_prompt or ""
    on_inputs = bool(data.train_on_inputs)

    def convert(row: Row) -> Pieces:
        asked = text(row, instruction)
        given = optional_text(row, extra)
        told = default_system if row.get(system) is None else optional_text(row, system)
        prompt = turn(instruction=asked, input=given) if given else bare(instruction=asked, input="")
        if told:
            prompt = head(system=told) + prompt
        return Pieces([Piece(prompt, on_inputs, bos=True), Piece(optional_text(row, answer), True, eos=1)])

    return Format("mapping", convert, (instruction, answer), (extra, system))


def _layout(layout: str, key: str, names: set[str]) -> Callable[..., str]:
    """`layout.format`, once it is known to hold no other placeholder than `names`."""
    allowed = names | {"instruction", "input"} if "system" not in names else names
    try:
        for _, name, spec, conversion in Formatter().parse(layout):
            if name is not None and (name not in allowed or spec or conversion):
                raise ConfigError(
                    f"`{key}` has the placeholder `{{{name}}}`.",
                    f"Known here: {', '.join(f'{{{n}}}' for n in sorted(names))}. Write {{{{ and }}}} for braces that "
                    "are meant as such.",
                )
    except ValueError as error:
        raise ConfigError(
            f"`{key}` cannot be read: {error}.", "Write {{ and }} for braces that are meant as such."
        ) from None
    return layout.format
