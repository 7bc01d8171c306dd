"""What a section of the config is: a frozen model whose field names are the YAML keys, and the words for its fields."""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    # Python counts True as 1; a user who writes `lora_r: true` does not.
    if isinstance(value, bool):
        raise ValueError("a number is expected here, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_number)]
PositiveInt = Annotated[Int, Gt(0)]
NonNegativeInt = Annotated[Int, Ge(0)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Ge(0), Le(1)]
Steps = Annotated[int | float, BeforeValidator(_number), Gt(0)]
Text = str


def later(feature: str, default: Any = None, *, secret: bool = False) -> Any:
    """A field of a feature that is not built yet: any value but off is answered with `unavailable`.

    When the feature comes, `later("...")` at the field becomes its plain default.
    """
    return Field(
        default=default,
        json_schema_extra={"state": "unavailable", "feature": feature, "secret": secret},
        repr=not secret,
    )


def validated(feature: str, default: Any = None) -> Any:
    """A field that loads and is checked, of a feature that `train` cannot run yet (see `unbuilt`)."""
    return Field(default=default, json_schema_extra={"state": "validated", "feature": feature})


def idle(reason: str, default: Any = None) -> Any:
    """A field that is accepted and does nothing, because nothing is lost: a faster path that is not built, or what is
    so anyway. Setting it gives a warning with the reason, which completes "... has no effect: ...".
    """
    return Field(default=default, json_schema_extra={"state": "idle", "feature": reason})


def required(empty: Any) -> Any:
    """A field that a training config has to set; `empty` stands where it is missing (rules tell the user)."""
    return Field(default=empty, json_schema_extra={"required": True})


def secret() -> Any:
    """A field that is never printed nor saved."""
    return Field(default=None, json_schema_extra={"secret": True}, repr=False)


def facts(model: type[BaseModel], key: str) -> dict[str, Any]:
    """What a field declares about itself with the words above: state, feature, required, secret."""
    extra = model.model_fields[key].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def default_of(model: type[BaseModel], key: str) -> Any:
    """The value of a field that nobody set."""
    return model.model_fields[key].get_default(call_default_factory=True)


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: unions flattened, Annotated and type aliases opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in members(part)]
    return [annotation]


@functools.cache
def _without_bool(model: type[BaseModel]) -> frozenset[str]:
    """Fields with default None for which `false` can only mean "not set"."""
    unset = set()
    for key, field in model.model_fields.items():
        kinds = members(field.annotation)
        literal = any(
            False in get_args(k) or "no" in get_args(k) for k in kinds if get_origin(k) is typing.Literal
        )
        if field.default is None and not literal and bool not in kinds and Any not in kinds:
            unset.add(key)
    return frozenset(unset)


class Block(BaseModel):
    """A mapping inside the config, such as one entry of `datasets`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        """Null means "not set"; so does `false` where no boolean can stand."""
        if not isinstance(data, dict):
            return data
        off = _without_bool(cls)
        return {k: v for k, v in data.items() if v is not None and not (v is False and k in off)}


class Section(Block):
    """The keys of one concern. Every key of the flat YAML belongs to exactly one section."""

    title: ClassVar[str] = ""
