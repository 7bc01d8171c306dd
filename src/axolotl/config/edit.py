"""Writes new values of top-level keys into the text of a YAML file; all else, comments too, stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml


def edited(text: str, values: Mapping[str, Any]) -> str:
    """The text with these values. A key that is not there yet is added at the end."""
    lines = text.splitlines()
    for key, value in values.items():
        written = f"{key}: {_flow(value)}"
        at = next(
            (i for i, line in enumerate(lines) if re.match(rf"['\"]?{re.escape(key)}['\"]?\s*:", line)), None
        )
        if at is None:
            lines.append(written)
            continue
        end = at + 1
        while end < len(lines) and (lines[end][:1] in (" ", "\t", "-") and lines[end].strip()):
            end += 1
        comment = re.search(r"\s+#.*$", lines[at])
        lines[at:end] = [written + (comment.group(0) if comment else "")]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()
