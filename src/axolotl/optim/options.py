"""What a config says about an optimizer, in the form that optimizers take."""

from __future__ import annotations

import ast
from typing import Any

from axolotl.config.optim import OptimSection
from axolotl.errors import ConfigError, Problem


def adam_betas(optim: OptimSection, default: tuple[float, float] = (0.9, 0.999)) -> tuple[float, float]:
    """(beta1, beta2), each from the config where it is set."""
    return (
        default[0] if optim.adam_beta1 is None else optim.adam_beta1,
        default[1] if optim.adam_beta2 is None else optim.adam_beta2,
    )


def adam(optim: OptimSection, eps: float = 1e-8) -> dict[str, Any]:
    """lr, betas and eps of Adam's family, with `optim_args` on top."""
    return {
        "lr": optim.learning_rate,
        "betas": adam_betas(optim),
        "eps": optim.adam_epsilon or eps,
    } | options(optim)


def options(optim: OptimSection) -> dict[str, Any]:
    """`optim_args` as keyword arguments: a mapping, or `name=value,name=value` with values read as Python reads them.

    Raises ConfigError for text of another form.
    """
    given = optim.optim_args
    if given is None:
        return {}
    if isinstance(given, dict):
        return dict(given)
    try:
        call = ast.parse(f"dict({given})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        message = f"`optim_args: {given}` has not the form name=value,name=value."
        remedy = "Write a mapping, or name=value pairs with commas between."
        raise ConfigError(Problem(message, remedy, "invalid_value", ("optim_args",)))
    return {k.arg: _value(k.value) for k in call.keywords if k.arg is not None}


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
