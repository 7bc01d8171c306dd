"""Pre-norm decoder layers whose halves run as one pass each: which layers fit, and how their attention is kept.

The layer's own attention code stays: it is called with the residual stream, its projections of query, key and value find
their outputs made, and its output projection lets its input through, to be made with what follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axolotl.kernels.decoder import norm_linears, output_and_mlp
from axolotl.kernels.decoder_tiles import Half, output_and_mlp_in_tiles
from axolotl.kernels.gates import activation
from axolotl.kernels.norms import Norm
from axolotl.kernels.triton_language import compute_dtype
from axolotl.model.frames import known
from axolotl.model.lora_layers import Group, Waiting
from axolotl.model.replace import Replacements, own_forward
from axolotl.model.shapes import GatedMlp, norm_of
from axolotl.model.trust import difference

TILE = "_axolotl_tile"
"""Attribute of a layer with these passes: from the tokens of a batch to those of a tile, or None for no tiles."""
CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Halves:
    """The parts of a decoder layer whose adapters all fit."""

    first: Norm
    second: Norm
    query_key_value: Group
    waiting: Waiting
    output: Group
    gate_up: Group
    down: Group
    mlp: GatedMlp

    @property
    def key(self) -> tuple[Any, ...]:
        """What two layers share if a trial of one stands for both."""
        shapes = tuple((g.lora.N, g.lora.K, g.lora.R, type(g.lora.base)) for g in self.groups)
        return self.first, self.second, self.mlp.act, shapes

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.query_key_value, self.output, self.gate_up, self.down


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether a layer computes `h = x + attention(norm(x)); h + mlp(norm(h))`, found by calling it with stand-ins."""
    children = dict(layer.named_children())
    if tuple(sorted(children)) != tuple(sorted(CHILDREN)):
        return False
    if not all(hasattr(children["self_attn"], name) for name in PROJECTIONS):
        return False
    made, training = Replacements(), layer.training
    x = torch.tensor([[[1.0, -2.0, 0.5]]])
    # Dropout that the layer's own code does shows in training alone.
    layer.training = True
    try:
        made.forward(children["input_layernorm"], lambda self, h: h * 3 + 1)
        made.forward(children["self_attn"], lambda self, hidden_states, **_: (hidden_states * 5 - 2, None))
        made.forward(children["post_attention_layernorm"], lambda self, h: h * 7 + 3)
        made.forward(children["mlp"], lambda self, h: h * 11 - 5)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = type(layer).forward(
                layer, x, attention_mask=None, position_ids=None, position_embeddings=None
            )
    except Exception:  # a layer that wants something else is another kind of layer
        return False
    finally:
        made.undo()
        layer.training = training
    middle = x + (x * 3 + 1) * 5 - 2
    same = isinstance(out, torch.Tensor) and torch.allclose(out, middle + (middle * 7 + 3) * 11 - 5)
    return same and only_attends(children["self_attn"])


def only_attends(attention: Any) -> bool:
    """Whether query, key and value are projections of an attention's input as it is, and its result is what its output
    projection gives as it is; found by calling it with stand-ins, as in training.

    Otherwise the passes would leave out what stands between, such as a dropout behind the output projection.
    """
    made, training, config = Replacements(), attention.training, getattr(attention, "config", None)
    device = next(attention.parameters()).device
    x, end, ones = (torch.ones(1, 2, 1, device=device) for _ in range(3))
    given: list[bool] = []

    def projection(width: int) -> Any:
        def stand_in(self: nn.Module, h: torch.Tensor) -> torch.Tensor:
            given.append(h is x)
            return torch.ones(1, 2, width, device=device)

        return stand_in

    try:
        for name in PROJECTIONS[:3]:
            layer = getattr(attention, name)
            made.forward(layer, projection(layer.out_features))
        made.forward(attention.o_proj, lambda self, h: end)
        attention.training = True
        if config is not None:
            # Other ways of attention need a GPU, or know packed rows only; the config is that of all layers.
            attention.config = copy.deepcopy(config)
            attention.config._attn_implementation = "eager"
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # No turning: cosines of one and sines of zero, for any width of a head.
            out = type(attention).forward(
                attention, hidden_states=x, position_embeddings=(ones, ones * 0), attention_mask=None
            )
    except Exception:  # an attention that wants something else is another kind
        return False
    finally:
        made.undo()
        attention.training = training
        if config is not None:
            attention.config = config
    return isinstance(out, tuple) and out[0] is end and given == [True] * 3


def frozen_norm(module: nn.Module) -> Norm | None:
    """The kind of a norm whose weight is not trained, or None."""
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.requires_grad else norm_of(module)


def halves_deviate(layer: Any, halves: Halves, h: torch.Tensor, limit: float) -> str:
    """What is wrong with the halves of this layer on rows h [T,H], beside PEFT's own code; empty if nothing is.

    Outputs and the gradients of input and adapters are compared; adapters that begin with zeros get other numbers for it.
    """
    attention = layer.self_attn
    attended = h[:, : halves.output.lora.K].repeat(1, -(-halves.output.lora.K // h.shape[1]))
    attended = attended[:, : halves.output.lora.K].contiguous()
    groups = [group.lora for group in halves.groups]
    parameters = [p for group in groups for p in group.parameters]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.normal_(0, 0.02, generator=torch.Generator(p.device).manual_seed(i))

    def plain(h: torch.Tensor, attended: torch.Tensor) -> list[torch.Tensor]:
        x = own_forward(layer.input_layernorm)(h)
        outs = [own_forward(getattr(attention, name))(x) for name in PROJECTIONS[:3]]
        middle = h + own_forward(attention.o_proj)(attended)
        normed = own_forward(layer.post_attention_layernorm)(middle)
        mlp = halves.mlp
        gate = own_forward(mlp.gate)(normed)
        gate, up = gate.chunk(2, dim=-1) if mlp.up is None else (gate, own_forward(mlp.up)(normed))
        return [*outs, middle + own_forward(mlp.down)(activation(mlp.act, gate) * up)]

    def ours(h: torch.Tensor, attended: torch.Tensor) -> list[torch.Tensor]:
        for group in groups:
            group.forget()
        first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        *outs, h = norm_linears(h, first, halves.first, groups[0])
        last = output_and_mlp(
            attended, h, groups[1], second, halves.second, groups[2], groups[3], halves.mlp.act
        )
        return [*outs, last]

    def run(op: Any) -> list[torch.Tensor]:
        inputs = [h.clone().requires_grad_(), attended.clone().requires_grad_()]
        with (
            torch.enable_grad(),
            torch.autocast(h.device.type, h.dtype, enabled=h.dtype is not torch.float32),
        ):
            outs = op(*inputs)
        incoming = [
            torch.cos(torch.arange(o.numel(), device=o.device)).view(o.shape).to(o.dtype) for o in outs
        ]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, [*inputs, *parameters], incoming)]

    try:
        return difference(run(ours), run(plain), limit)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's errors have no common base
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
        for group in groups:
            group.forget()


def fuse_decoder_layer(layer: nn.Module, halves: Halves, made: Replacements, what: str) -> None:
    """Gives a layer that `is_pre_norm` the two passes, whenever it is called as transformers calls it in training."""
    attention: Any = layer.self_attn
    before = layer.forward
    passing: list[torch.Tensor] = []
    own_output = attention.o_proj.forward

    def output(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if passing and not args and not kwargs:
            return x
        out: torch.Tensor = own_output(x, *args, **kwargs)
        return out

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        h = hidden_states
        if args or h.dtype is not compute_dtype(h) or not all(g.ready() for g in halves.groups):
            return before(hidden_states, *args, **kwargs)
        *outs, residual = norm_linears(
            h, self.input_layernorm.weight, halves.first, halves.query_key_value.lora
        )
        halves.waiting.update({i: (h, y) for i, y in enumerate(outs)})
        passing.append(h)
        try:
            attended, *_ = self.self_attn(hidden_states=h, **kwargs)
        finally:
            passing.clear()
            halves.waiting.clear()
        tile, weight = self.__dict__.get(TILE), self.post_attention_layernorm.weight
        if tile is not None:
            length = tile(h.numel() // h.shape[-1])
            loras = halves.gate_up.lora, halves.down.lora
            half = Half(halves.output.lora, weight, halves.second, *loras, halves.mlp.act)
            return known(
                lambda a, r: output_and_mlp_in_tiles(a, r, half, length), attended, residual, keeps=False
            )
        return output_and_mlp(
            attended,
            residual,
            halves.output.lora,
            weight,
            halves.second,
            halves.gate_up.lora,
            halves.down.lora,
            halves.mlp.act,
        )

    made.forward(attention.o_proj, output)
    made.forward(layer, forward, what)
    setattr(layer, TILE, None)
    made.undoing(lambda: delattr(layer, TILE))
