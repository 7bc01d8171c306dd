"""The kernels of a run: which keys ask for which, which modules of the model they fit, and a trial before they are used.

A row of PATCHES says for one kernel what it does to a model. Modules are chosen by shape (`axolotl.model.shapes`); what
does not fit keeps the plain path, with a line that says why. Where Triton programs run, each is compared once with its
twin on the run's own shapes; one that deviates or fails to compile is left out, or is an error with `strict: true`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl.config.kernels import KernelsSection
from axolotl.console import note, warn
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from axolotl.kernels.fp8 import has_scaled_gemm
from axolotl.kernels.gates import gated, plain_gated
from axolotl.kernels.lora import refresh
from axolotl.kernels.norms import Norm, plain_rms_norm, rms_norm
from axolotl.kernels.rotary import plain_rotary, rotary
from axolotl.kernels.triton_language import installed, interpreted
from axolotl.model.decoder_layers import (
    PROJECTIONS,
    Halves,
    frozen_norm,
    fuse_decoder_layer,
    halves_deviate,
    is_pre_norm,
)
from axolotl.model.fused_loss import TOLERANCE, fuse_loss, same_loss, unfit
from axolotl.model.lora_layers import Group, Waiting, fuse_linears, fuse_mlp, hold_in_eight_bits, misfit
from axolotl.model.replace import Replacements, with_global
from axolotl.model.shapes import GatedMlp, mlp_of, norm_of, rotary_of
from axolotl.model.trust import LIMITS, deviation


@dataclass
class Bench:
    """What a patch works on."""

    model: PreTrainedModel
    """The model itself, without PEFT's wrapper; its layers may be PEFT's."""
    kernels: KernelsSection
    device: torch.device
    dtype: torch.dtype
    """Number type of the products."""
    tokens: int
    """Tokens of one forward pass."""
    plain_lora: str = ""
    """Why LoRA keeps PEFT's code whatever the keys say; empty where it need not."""
    strict: bool = False
    made: Replacements = field(default_factory=Replacements)
    groups: dict[nn.Module, Group] = field(default_factory=dict)
    """The LoRA layers that have our products, each with its group."""
    before: list[Group] = field(default_factory=list)
    """Groups whose layers have gone over to another."""
    waiting: dict[nn.Module, Waiting] = field(default_factory=dict)
    """What `fuse_linears` gave, by the first layer of the group."""
    _trials: dict[Any, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def triton(self, what: str) -> bool:
        """Whether Triton programs run on this device; told once where they do not."""
        if installed() and (self.device.type == "cuda" or interpreted()):
            return True
        why = "this machine has no GPU" if self.device.type != "cuda" else "Triton is not installed"
        self.tell(f"{what}: {why}, and the plain path computes the same.")
        return False

    def tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            note(message)

    def trusts(self, what: str, key: Any, trial: Callable[[], str]) -> bool:
        """Whether a kernel agreed with its twin; tried once per `key`. Raises ModelError with `strict`."""
        if key not in self._trials:
            found = self._trials[key] = trial()
            if found and self.strict:
                raise ModelError(
                    f"The kernel for {what} cannot be trusted here: {found}.",
                    "Delete the key that asks for it.",
                )
            if found:
                warn(f"The kernel for {what} is left out, and the plain path taken: {found}.")
        return not self._trials[key]

    def random(self, *shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
        draw = torch.Generator(self.device).manual_seed(seed)
        made = torch.randn(*shape, generator=draw, device=self.device).to(self.dtype)
        return made.requires_grad_(grad)

    def begin_pass(self) -> None:
        """A pass of the model begins: its adapters may have changed."""
        groups = {id(group): group for group in self.groups.values() if group.ready()}
        refresh([group.lora for group in groups.values()], self.dtype)

    @property
    def rows(self) -> int:
        """Tokens of a trial: those of the run, as far as a trial stays short."""
        return max(1, min(self.tokens, 64 if self.device.type == "cpu" else 4096))


@dataclass(frozen=True)
class Patch:
    """A kernel: the keys that ask for it, and what it does to a model."""

    keys: tuple[str, ...]
    apply: Callable[[Bench], None]


def apply_kernels(bench: Bench) -> Replacements:
    """Gives the model the kernels that the config asks for, and says which modules got them.

    Raises ModelError with `strict` where a kernel deviates, EnvironmentProblem where the GPU lacks what a key needs.
    """
    # Training is what comes; 4-bit layers change their weights' layout when they evaluate on a CPU.
    bench.model.train()
    for patch in PATCHES:
        if any(getattr(bench.kernels, key) for key in patch.keys):
            patch.apply(bench)
    for group in bench.before:
        # Trials have used them as the plain path.
        group.lora.forget()
    if bench.groups:
        # Not the model itself: PEFT calls its forward without its hooks.
        hook = bench.model.base_model.register_forward_pre_hook(lambda *_: bench.begin_pass())
        bench.made.undoing(hook.remove)
    if bench.made.counts:
        listed = ", ".join(f"{count} × {what}" for what, count in sorted(bench.made.counts.items()))
        note(f"Kernels: {listed}.")
    return bench.made


# The loss


def _loss(bench: Bench) -> None:
    model, made = bench.model, bench.made
    why = unfit(model)
    if why:
        bench.tell(f"The loss is computed from whole logits: {why}.")
        return
    head = model.get_output_embeddings()
    V, D = head.weight.shape
    triton = installed() and (bench.device.type == "cuda" or interpreted())
    if triton and "forward" in head.__dict__:
        bench.tell("The loss: each process has a part of the words, and the plain path computes the same.")
        triton = False
    if triton:

        def trial() -> str:
            x, w = bench.random(32, D), bench.random(V, D, seed=1, grad=head.weight.requires_grad)
            with torch.no_grad():
                w.mul_(D**-0.5)
            y = torch.randint(0, V, (32,), device=bench.device)
            y[::5] = -100
            return deviation(
                lambda a, b: linear_cross_entropy(a, b, y, triton=True),
                lambda a, b: plain_linear_cross_entropy(a, b, y),
                [x, w],
            )

        triton = bench.trusts("the loss", ("loss", V), trial)
    inside = Replacements()
    chunks = bench.kernels.chunked_cross_entropy_num_chunks
    fuse_loss(model, inside, chunks, triton)
    with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype is not torch.float32):
        plain, ours = same_loss(model, bench.device)
    if abs(plain - ours) > TOLERANCE * max(abs(plain), 1e-3):
        inside.undo()
        message = f"head and cross-entropy in one give {ours:.5f} where the model itself gives {plain:.5f}"
        if bench.strict:
            raise ModelError(f"With this model, {message}.", "Delete the key that asks for it.")
        warn(f"The loss is computed from whole logits: {message}.")
        return
    made.undoing(inside.undo)
    made.counts.update(inside.counts)


# Element by element


def _norms(bench: Bench) -> None:
    kinds: dict[Any, Norm | None] = {}
    for module in bench.model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            continue
        kind = (
            type(module),
            tuple(weight.shape),
            getattr(module, "variance_epsilon", getattr(module, "eps", 0)),
        )
        if kind not in kinds:
            kinds[kind] = norm_of(module)
        norm = kinds[kind]
        if norm is None or not bench.triton("RMS norm"):
            continue
        trial = _norm_trial(bench, weight, norm)
        if bench.trusts("RMS norm", (norm, *weight.shape, weight.dtype), trial):
            bench.made.forward(module, _norm_forward(norm), "RMS norm")


def _norm_trial(bench: Bench, weight: torch.Tensor, norm: Norm) -> Callable[[], str]:
    def trial() -> str:
        options: dict[str, Any] = {"eps": norm.eps, "offset": norm.offset, "round_first": norm.round_first}
        N = weight.shape[0]
        w = bench.random(N, seed=1, grad=weight.requires_grad).detach().to(weight.dtype)
        return deviation(
            lambda x, w: rms_norm(x, w, **options),
            lambda x, w: plain_rms_norm(x, w, **options),
            [bench.random(bench.rows, N), w.requires_grad_(weight.requires_grad)],
        )

    return trial


def _norm_forward(norm: Norm) -> Any:
    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        return rms_norm(hidden_states, weight, norm.eps, offset=norm.offset, round_first=norm.round_first)

    return forward


def _rotary(bench: Bench) -> None:
    for module in bench.model.modules():
        function = rotary_of(module)
        if function is None or not bench.triton("Rotary embedding"):
            continue
        D = int(getattr(module, "head_dim", 0) or 64)

        def trial(D: int = D) -> str:
            T = max(1, bench.rows // 2)
            angle = bench.random(1, T, D // 2, grad=False).float()
            cos, sin = (torch.cat((f, f), -1).to(bench.dtype) for f in (angle.cos(), angle.sin()))
            return deviation(
                lambda q, k: torch.cat(rotary(q, k, cos, sin), 1),
                lambda q, k: torch.cat(plain_rotary(q, k, cos.to(q), sin.to(q)), 1),
                [bench.random(1, 4, T, D), bench.random(1, 2, T, D, seed=1)],
            )

        if bench.trusts("the rotary embedding", ("rotary", D), trial):
            forward = with_global(type(module).forward, "apply_rotary_pos_emb", rotary)
            if forward is not None:
                bench.made.forward(module, forward, "rotary embedding")


def _gates(bench: Bench) -> None:
    for module, mlp in _mlps(bench):
        if "forward" in module.__dict__ or not bench.triton("Gated activation"):
            continue
        M = int(mlp.down.in_features)  # type: ignore[arg-type]

        def trial(act: str = mlp.act, M: int = M) -> str:
            return deviation(
                lambda g, u: gated(g, u, act),
                lambda g, u: plain_gated(g, u, act),
                [bench.random(bench.rows, M), bench.random(bench.rows, M, seed=1)],
            )

        if bench.trusts("the gated activation", (mlp.act, M), trial):
            bench.made.forward(module, _gated_forward(mlp), "gated activation")


def _gated_forward(mlp: GatedMlp) -> Any:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate(x)
        gate, up = gate.chunk(2, dim=-1) if mlp.up is None else (gate, mlp.up(x))
        out: torch.Tensor = mlp.down(gated(gate, up, mlp.act))
        return out

    return forward


def _mlps(bench: Bench) -> Iterator[tuple[nn.Module, GatedMlp]]:
    for module in list(bench.model.modules()):
        found = mlp_of(module)
        if found is not None:
            yield module, found


# LoRA


def _groups(bench: Bench, what: str, *sets: list[nn.Module], fold: bool = True) -> list[Group] | None:
    """A group for each set of layers, or None, told, where some layer does not fit."""
    if bench.plain_lora:
        bench.tell(f"{what}: {bench.plain_lora}, and PEFT's own code computes the same.")
        return None
    for layer in (each for layers in sets for each in layers):
        why = misfit(layer)
        if why:
            bench.tell(f"{what} keeps PEFT's own code in some layers: {why}.")
            return None
    return [_group(bench, layers, fold=fold) for layers in sets]


def _group(bench: Bench, layers: list[nn.Module], *, fold: bool) -> Group:
    group = Group(layers, bench.made, fold=fold)
    bench.before += [bench.groups[each] for each in layers if each in bench.groups]
    bench.groups.update(dict.fromkeys(layers, group))
    return group


def _lora_mlp(bench: Bench) -> None:
    for module, mlp in _mlps(bench):
        first = [mlp.gate] if mlp.up is None else [mlp.gate, mlp.up]
        groups = _groups(bench, "`lora_mlp_kernel`", first, [mlp.down])
        if groups is not None:
            fuse_mlp(module, mlp, groups[0], groups[1], bench.made, "LoRA feed-forward layer")


def _projections(bench: Bench, names: tuple[str, ...], what: str, key: str, *, fold: bool) -> None:
    found = False
    for module in list(bench.model.modules()):
        layers = [getattr(module, name, None) for name in names]
        if all(isinstance(each, nn.Module) for each in layers):
            found = True
            groups = _groups(bench, f"`{key}`", layers, fold=fold)  # type: ignore[arg-type]
            if groups is not None:
                bench.waiting[layers[0]] = fuse_linears(groups[0], bench.made, what)  # type: ignore[index]
    if not found:
        bench.tell(f"`{key}`: this model has no layers {', '.join(names)}.")


def _lora_qkv(bench: Bench) -> None:
    _projections(
        bench, ("q_proj", "k_proj", "v_proj"), "LoRA query, key and value", "lora_qkv_kernel", fold=True
    )


def _lora_o(bench: Bench) -> None:
    # Folded, it would keep a copy of what the attention keeps anyway.
    _projections(bench, ("o_proj",), "LoRA output projection", "lora_o_kernel", fold=False)


def _decoder(bench: Bench) -> None:
    """Whole halves of decoder layers, where every adapter in them has our product already."""
    kernels = bench.kernels
    if not (kernels.lora_mlp_kernel and kernels.lora_qkv_kernel and kernels.lora_o_kernel):
        return
    for layer in list(bench.model.modules()):
        halves = _halves(bench, layer) if is_pre_norm(layer) else None
        if halves is None:
            continue

        def trial(layer: nn.Module = layer, halves: Halves = halves) -> str:
            # PEFT's code does not round activations to 8 bits.
            limit = 0.15 if halves.gate_up.lora.base.eight_bit else LIMITS.get(bench.dtype, 1e-4)
            h = bench.random(bench.rows, halves.gate_up.lora.K, grad=False)
            return halves_deviate(layer, halves, h, limit)

        if bench.trusts("decoder layers with LoRA", ("decoder", halves.key), trial):
            fuse_decoder_layer(layer, halves, bench.made, "LoRA decoder layer")


def _halves(bench: Bench, layer: Any) -> Halves | None:
    first, second = frozen_norm(layer.input_layernorm), frozen_norm(layer.post_attention_layernorm)
    attention, mlp = layer.self_attn, mlp_of(layer.mlp)
    if first is None or second is None or mlp is None:
        return None
    q, k, v, o = (getattr(attention, name) for name in PROJECTIONS)
    qkv, output, gate_up, down = (bench.groups.get(each) for each in (q, o, mlp.gate, mlp.down))
    if qkv is None or output is None or gate_up is None or down is None or qkv.layers != [q, k, v]:
        return None
    return Halves(first, second, qkv, bench.waiting[q], output, gate_up, down, mlp)


def _eight_bit(bench: Bench) -> None:
    if bench.device.type == "cuda" and not has_scaled_gemm(bench.device):
        raise EnvironmentProblem(
            Problem(
                f"`lora_fp8_base: true` needs a GPU that multiplies 8-bit floats; {torch.cuda.get_device_name()} does not.",
                "Delete the line, or use `adapter: qlora` to save memory.",
                "environment",
                ("lora_fp8_base",),
            )
        )
    if bench.device.type != "cuda":
        bench.tell("`lora_fp8_base` without a GPU: the numbers are those of 8-bit floats, the speed is not.")
    for module in list(bench.model.modules()):
        base = getattr(module, "base_layer", None)
        if type(base) is nn.Linear and not misfit(module) and not base.weight.requires_grad:
            hold_in_eight_bits(base, bench.made)
            # What no other kernel takes later multiplies in 8 bits too.
            fuse_linears(_group(bench, [module], fold=False), bench.made, "LoRA on 8-bit weights")


PATCHES: tuple[Patch, ...] = (
    Patch(("lora_fp8_base",), _eight_bit),
    Patch(("lora_mlp_kernel",), _lora_mlp),
    Patch(("lora_qkv_kernel",), _lora_qkv),
    Patch(("lora_o_kernel",), _lora_o),
    Patch(("lora_o_kernel",), _decoder),
    Patch(("liger_glu_activation",), _gates),
    Patch(("liger_rms_norm",), _norms),
    Patch(("liger_rope",), _rotary),
    Patch(
        (
            "cut_cross_entropy",
            "liger_fused_linear_cross_entropy",
            "chunked_cross_entropy",
            "liger_cross_entropy",
            "flash_attn_cross_entropy",
        ),
        _loss,
    ),
)
