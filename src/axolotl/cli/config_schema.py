"""The JSON Schema of the config, for YAML language servers."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel

from axolotl.config.datasets import DatasetEntry
from axolotl.config.descriptions import meaning, old_keys, state
from axolotl.config.distributed import FsdpConfig
from axolotl.config.keys import SECTIONS
from axolotl.config.load import HOLDERS
from axolotl.config.old_keys import DATASET_RENAMED, FSDP_LEFTOVER, FSDP_RENAMED, OFFLOADING, SPECIAL_TOKENS
from axolotl.config.section import Also, Block, ZeroIsOff, default_of, facts

Schema = dict[str, Any]

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
# Forms of old that are brought up to date: of single values, and keys inside blocks.
_OLD_FORMS: dict[str, Schema] = {
    "bfloat16": {"enum": ["auto"]},
    "gradient_checkpointing": {"enum": list(OFFLOADING)},
    "tokens": {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": ["string", "null"]} for name in SPECIAL_TOKENS},
    },
}
_OLD_INSIDE: dict[type[BaseModel], dict[str, str]] = {
    DatasetEntry: DATASET_RENAMED,
    FsdpConfig: {
        **FSDP_RENAMED,
        **dict.fromkeys(FSDP_LEFTOVER, ""),
        **{
            f"fsdp_{key}": key
            for key in (*FsdpConfig.model_fields, *FSDP_RENAMED)
            if not key.startswith("fsdp_")
        },
        **{f"fsdp_{key}": "" for key in FSDP_LEFTOVER},
    },
}


def config_schema() -> Schema:
    """The whole config as one JSON Schema (draft 07): every key with meaning, type and default; old ones deprecated."""
    blocks: dict[str, Schema] = {}
    properties: dict[str, Schema] = {}
    for section in SECTIONS.values():
        properties |= _properties(section, blocks)
    for key, (kind, text) in old_keys().items():
        words = {
            "alias": "Another way to write",
            "renamed": "An old name of",
            "removed": "Gone.",
            "leftover": "Without effect:",
        }
        properties[key] = {
            "description": f"{words[kind]} {text}",
            "deprecated": True,
            "deprecationMessage": text,
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "axolotl config",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": {f"^{re.escape(start)}": {} for start in HOLDERS},
        "definitions": dict(sorted(blocks.items())),
    }


def _properties(model: type[BaseModel], blocks: dict[str, Schema]) -> dict[str, Schema]:
    found = {}
    for key, field in model.model_fields.items():
        schema = _schema(field.annotation, tuple(field.metadata), blocks)
        text = meaning(model, key)
        if state(model, key) != "available":
            text += f" ({state(model, key)}: {facts(model, key)['feature']})"
        if text:
            schema = {"description": text, **schema}
        default = None if field.is_required() else default_of(model, key)
        if (
            default is not None
            and not facts(model, key).get("required")
            and not isinstance(default, BaseModel)
        ):
            schema["default"] = default
        if key in _OLD_FORMS and not issubclass(model, tuple(_OLD_INSIDE)):
            schema = {
                **{k: v for k, v in schema.items() if k in ("description", "default")},
                "anyOf": [
                    {k: v for k, v in schema.items() if k not in ("description", "default")},
                    _OLD_FORMS[key],
                ],
            }
        found[key] = _nullable(schema)
    for old, new in _OLD_INSIDE.get(model, {}).items():
        text = f"An old name of `{new}`." if new else "Without effect."
        found[old] = {"description": text, "deprecated": True, "deprecationMessage": text}
    return found


def _nullable(schema: Schema) -> Schema:
    """Null means "not set" for every key."""
    kind = schema.get("type")
    if isinstance(kind, str):
        if "enum" in schema:
            schema = {**schema, "enum": [*schema["enum"], None]}
        return {**schema, "type": [kind, "null"]}
    if isinstance(kind, list):
        return {**schema, "type": [*kind, "null"]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "$ref" in schema:
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return {**rest, "anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}]}
    return schema


def _schema(annotation: Any, metadata: tuple[Any, ...], blocks: dict[str, Schema]) -> Schema:
    further = [each.schema for each in metadata if isinstance(each, Also)]
    if further:
        rest = tuple(each for each in metadata if not isinstance(each, Also))
        return {"anyOf": [_schema(annotation, rest, blocks), *further]}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _schema(args[0], (*args[1:], *metadata), blocks)
    if origin in (Union, types.UnionType):
        parts = [_schema(a, metadata, blocks) for a in args if a is not type(None)]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}
    if origin is Literal:
        kind = "integer" if all(isinstance(a, int) for a in args) else "string"
        return {"type": kind, "enum": list(args)}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(args[0], (), blocks)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], (), blocks)}
    if isinstance(annotation, type) and issubclass(annotation, Block):
        name = annotation.__name__
        if name not in blocks:
            blocks[name] = {}
            blocks[name] = {
                "type": "object",
                "description": (annotation.__doc__ or "").strip(),
                "additionalProperties": False,
                "properties": _properties(annotation, blocks),
                "required": [k for k, f in annotation.model_fields.items() if f.is_required()],
            }
        return {"$ref": f"#/definitions/{name}"}
    if annotation not in _TYPES:
        return {}
    if annotation is str:
        # A number is taken as it is written.
        return {"type": ["string", "number"]}
    return {"type": _TYPES[annotation], **_limits(metadata)}


def _limits(metadata: tuple[Any, ...]) -> Schema:
    found: Schema = {}
    zero = any(isinstance(each, ZeroIsOff) for each in metadata)
    for each in metadata:
        if isinstance(each, Gt):
            found["minimum" if zero else "exclusiveMinimum"] = each.gt
        elif isinstance(each, Ge):
            found["minimum"] = each.ge
        elif isinstance(each, Le):
            found["maximum"] = each.le
    return found
