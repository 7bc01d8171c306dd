"""What of the activations a run keeps, computes again or moves away: what the keys mean, and a model that does so.

`gradient_checkpointing`, `selective_checkpointing` and `activation_offloading` are read here and nowhere else, by the
trainer as by the plan: `recompute_of` says what they mean, `apply_recompute` gives it to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl.config.train import SelectiveCheckpointing, TrainSection
from axolotl.console import note
from axolotl.errors import ModelError, Problem
from axolotl.model.frames import Options, active, draws, known, recomputed
from axolotl.model.park import DiskPark, HostPark, Park
from axolotl.model.replace import Replacements, with_global

SMALLEST = 1 << 20
"""Bytes below which a tensor outside of the layers stays where it is."""

Place = Literal["", "host", "plain", "disk"]


@dataclass(frozen=True)
class Recompute:
    """What is computed again in the backward pass, and where what is kept waits."""

    layers: int | None = None
    """How many layers, the first ones; None for all. The backward pass reaches them last, when the others' activations
    are gone."""
    keeps: tuple[str, ...] = ()
    """Parts of a layer whose results are kept: `attention`, `matmul`, or names of linear layers."""
    keeps_windows: bool = True
    """Also keep the results of attention that sees a window only."""
    whole: tuple[str, ...] = ()
    """Layer types that keep nothing."""
    place: Place = ""
    """Where layer inputs wait: on the device, in CPU memory with copies beside the computation (`host`) or without
    (`plain`), or on disk."""
    everything: bool = False
    """Large tensors kept outside of recomputed layers wait there too."""
    kept_on_host: bool = False
    """So do the results that are kept."""
    options: dict[str, Any] = field(default_factory=dict)
    """Where this is not empty, PyTorch's own checkpoints do it, with these options."""

    @property
    def own(self) -> bool:
        """Whether our frames do it, and not PyTorch's checkpoints."""
        return not self.options


def recompute_of(train: TrainSection) -> Recompute | None:
    """What the keys of a resolved config ask for; None where everything is kept on the device."""
    asked = train.gradient_checkpointing
    if not asked or asked == "auto":
        return None
    options = dict(train.gradient_checkpointing_kwargs or {})
    if options.get("use_reentrant") is False:
        # PyTorch's other kind gives the same; its name alone asks for nothing that our frames do otherwise.
        del options["use_reentrant"]
    selective = train.selective_checkpointing
    if selective is True:
        selective = SelectiveCheckpointing()
    way = train.activation_offloading
    place: Place = {"disk": "disk", "legacy": "plain", False: ""}.get(way, "host")  # type: ignore[assignment,call-overload]
    if place or selective or asked is not True:
        options = {}
    return Recompute(
        layers=None if asked is True else int(asked),
        keeps=tuple(selective.save) if selective else (),
        keeps_windows=bool(selective and selective.save_sliding_window),
        whole=tuple(selective.recompute_layer_types or ()) if selective else (),
        place=place,
        everything=way is True,
        kept_on_host=bool(selective and selective.offload),
        options=options,
    )


@dataclass
class Recomputing:
    """What was done to a model."""

    layers: int = 0
    recomputed: int = 0
    kept: int = 0
    """Parts whose results are kept."""
    park: Park | None = None
    everything: bool = False
    model: nn.Module | None = None
    """Whose weights never go away."""

    def hooks(self) -> saved_tensors_hooks | None:
        """To be entered around the forward pass: takes away what is kept outside of the layers. None: nothing is."""
        park = self.park
        if park is None or not self.everything or self.model is None:
            return None
        # What a product keeps of its weight is often another view of it, and stays where it is all the same.
        weights = {p.untyped_storage()._cdata for p in self.model.parameters()}

        def away(tensor: torch.Tensor) -> Any:
            size = tensor.numel() * tensor.element_size()
            if size < SMALLEST or not tensor.is_floating_point():
                return tensor
            if tensor.untyped_storage()._cdata in weights:
                return tensor
            return park.put(tensor.detach())

        return saved_tensors_hooks(away, lambda x: x if isinstance(x, torch.Tensor) else x.get())


def apply_recompute(
    model: PreTrainedModel,
    how: Recompute | None,
    device: torch.device,
    made: Replacements,
    *,
    folder: Path | None = None,
    park: Park | None = None,
    compiled: bool = False,
) -> Recomputing:
    """Has the layers of a model computed again as `how` says; undone with `made`.

    `model` is transformers' model without PEFT's wrapper, with its kernels. `folder` is where `disk` writes, `park`
    stands for another place (a plan has one without memory). `compiled`: torch.compile traces the layers. Raises ModelError for a model without layers to recompute.
    """
    layers = layers_of(model)
    done = Recomputing(len(layers), model=model)
    if how is None:
        return done
    if not how.own or not layers:
        _by_transformers(model, how)
        done.recomputed = len(layers)
        return done
    if park is None and how.place:
        park = (
            DiskPark(device, folder) if how.place == "disk" else HostPark(device, plain=how.place == "plain")
        )
    done.park, done.everything = park, how.everything
    kept_park = (park or HostPark(device)) if how.kept_on_host else None
    chosen = layers if how.layers is None else layers[: how.layers]
    for index, layer in enumerate(chosen):
        options = Options(draws(layer), park, kept_park)
        if how.keeps and _type_of(model, index) not in how.whole:
            done.kept += _keep(layer, how, made, torch.compiler.disable if compiled else _as_it_is)
        made.forward(layer, _again(layer, options))
    done.recomputed = len(chosen)
    missing = how.keeps and not done.kept
    if missing:
        note(
            f"`selective_checkpointing`: no layer of {type(model).__name__} has {' or '.join(how.keeps)} that can be "
            "kept; whole layers are computed again."
        )
    return done


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, in order; those inside of others are not counted."""
    found: list[nn.Module] = []
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inner:
            found.append(module)
            inner.update(id(each) for each in module.modules())
    return found


def _by_transformers(model: PreTrainedModel, how: Recompute) -> None:
    turn_on: Any = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )
    try:
        turn_on({"use_reentrant": False} | how.options)
    except ValueError as error:
        raise ModelError(
            Problem(
                f"`gradient_checkpointing: true`: {type(model).__name__} has no layers that can be computed again.",
                "Set `gradient_checkpointing: false`.",
                "model",
                ("gradient_checkpointing",),
            )
        ) from error
    if how.options.get("use_reentrant"):
        # Reentrant checkpoints only carry gradients to layers whose input has one; frozen embeddings give none.
        model.enable_input_require_grads()


def _again(layer: nn.Module, options: Options) -> Callable[..., Any]:
    inner = layer.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return inner(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            # The second run would enter the same keys once more.
            kwargs["past_key_values"] = None
        return recomputed(inner, options, *args, **kwargs)

    return forward


def _type_of(model: PreTrainedModel, index: int) -> str:
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return str(types[index]) if index < len(types) else "full_attention"


# Keeping


Hide = Callable[[Any], Any]
"""Makes a function one that torch.compile does not look into."""


def _as_it_is(function: Any) -> Any:
    return function


def _keep(layer: nn.Module, how: Recompute, made: Replacements, hide: Hide) -> int:
    return sum(
        _keep_attention(m, how, made, hide) for m in layer.modules() if "attention" in how.keeps
    ) + sum(_keep_linear(m, made, hide) for m in _linears(layer, how.keeps))


def _linears(layer: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for name, child in module.named_children():
            if isinstance(getattr(child, "in_features", None), int):
                if name in names or "matmul" in names:
                    yield child
            else:
                yield from walk(child)

    return walk(layer)


def _keep_linear(module: nn.Module, made: Replacements, hide: Hide) -> int:
    inner = module.forward

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not active():
            out: torch.Tensor = inner(x, *args, **kwargs)
            return out
        return known(inner, x, keeps=True)

    made.forward(module, hide(forward))
    return 1


def _keep_attention(module: nn.Module, how: Recompute, made: Replacements, hide: Hide) -> int:
    current = module.__dict__.get("forward")
    function = getattr(current, "__func__", current) if current is not None else type(module).forward
    table = getattr(function, "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS")
    if table is None or not isinstance(function, FunctionType):
        return 0
    windowed = getattr(module, "sliding_window", None) is not None
    if windowed and not how.keeps_windows:
        return 0
    forward = with_global(function, "ALL_ATTENTION_FUNCTIONS", _Kept(table))
    if forward is None:
        return 0
    # A compiled function is found again by its code, which all layers share, and by globals, which they do not.
    made.forward(module, hide(forward))
    return 1


class _Kept:
    """transformers' table of attentions, for one layer: each of them keeps its output when the layer is recomputed."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def get_interface(self, name: str, default: Any) -> Any:
        return self._keeping(self._table.get_interface(name, default))

    def __getitem__(self, name: str) -> Any:
        return self._keeping(self._table[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    @staticmethod
    def _keeping(attention: Any) -> Any:
        def keeping(
            module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if not active():
                return attention(module, q, k, v, *args, **kwargs)

            def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = attention(module, q, k, v, *args, **kwargs)[0]
                return out

            return known(run, q, k, v, keeps=True, random=bool(kwargs.get("dropout"))), None

        return keeping
