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
Port = Annotated[Int, Gt(0), Le(65535)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Ge(0), Le(1)]
Steps = Annotated[int | float, BeforeValidator(_number), Gt(0)]
Text = str


class Also:
    """A further form that the values of a field may have: in words, and as a JSON Schema. A validator reads it."""

    def __init__(self, words: str, schema: dict[str, Any]) -> None:
        self.words, self.schema = words, schema


class ZeroIsOff:
    """Says of a field that 0 means the same as leaving it out."""


ZERO_IS_OFF = ZeroIsOff()


def later(
    feature: str, default: Any = None, *, secret: bool = False, by_value: dict[str, Any] | None = None
) -> Any:
    """A field of a feature that is not built yet: any value but off is answered with `unavailable`.

    `by_value` names the features of values that belong to another one. When the feature comes, `later("...")` at the
    field becomes its plain default.
    """
    return Field(
        default=default,
        json_schema_extra={
            "state": "unavailable",
            "feature": feature,
            "secret": secret,
            "by_value": by_value or {},
        },
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


@functools.cache
def _off_at_zero(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(
        key
        for key, field in model.model_fields.items()
        if any(isinstance(each, ZeroIsOff) for each in field.metadata)
    )


def off(model: type[BaseModel], key: str, value: Any) -> bool:
    """Whether a value of this field means the same as leaving it out."""
    return _unset(value, false=key in _without_bool(model), zero=key in _off_at_zero(model))


def _unset(value: Any, *, false: bool, zero: bool) -> bool:
    if isinstance(value, bool):
        return false and not value
    return value is None or (zero and isinstance(value, int | float) and value == 0)


class Block(BaseModel):
    """A mapping inside the config, such as one entry of `datasets`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    options_only: ClassVar[bool] = False
    """The block turns nothing on by standing there, so that defaults inside it change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        """Null means "not set"; so does `false` where no boolean can stand, and 0 where a field says so."""
        if not isinstance(data, dict):
            return data
        off, at_zero = _without_bool(cls), _off_at_zero(cls)
        return {k: v for k, v in data.items() if not _unset(v, false=k in off, zero=k in at_zero)}


class Section(Block):
    """The keys of one concern. Every key of the flat YAML belongs to exactly one section."""

    title: ClassVar[str] = ""
