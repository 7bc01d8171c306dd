"""A training step gone through on tensors without content: its peak memory, and all that it computes.

The model is the real one of transformers and PEFT, the loss and the order of things are the trainer's; only the numbers
are missing. So recomputation, adapters, number types and whatever a model does of its own need no formula here. What
CUDA does otherwise than the CPU, on which this runs, stands in this file: attention, and the operations that autocast
does in float32.

Shapes: B rows, T tokens of a row, H heads, G key/value heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface

from axolotl.config.kernels import KernelsSection
from axolotl.config.train import TrainSection
from axolotl.model.embeddings import embedding_rows
from axolotl.model.replace import Replacements
from axolotl.model.sparing import spare_memory
from axolotl.plan.fused import silent_programs
from axolotl.plan.ledger import Account, Ledger
from axolotl.plan.skeleton import packed_bytes, packed_layers

ATTENTION = "axolotl_rehearsal"
WORKSPACE = 64 * 2**20
"""Bytes that cuBLAS takes from PyTorch's allocator on Hopper, where it was measured."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass gets: B rows of T tokens."""

    rows: int
    length: int
    attended: float = 0.0
    """Pairs of tokens that attention looks at, over the batch; 0 stands for whole causal rows."""
    packed: bool = False
    """Documents share a row, and attention works within each."""
    masked: bool = False
    """Rows are filled up, so attention gets a mask."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def pairs(self) -> float:
        return self.attended or self.rows * self.length * (self.length + 1) / 2


@dataclass(frozen=True)
class Manner:
    """How the step is done."""

    autocast: torch.dtype | None = None
    train: TrainSection = field(default_factory=TrainSection)
    kernels: KernelsSection = field(default_factory=KernelsSection)
    """What is computed again, tiled or moved away: `axolotl.model.sparing` reads it."""
    accumulates: bool = False
    """Gradients of earlier micro batches are there when the forward pass begins."""
    state_bytes: int = 0
    """The optimizer's state."""
    double_quantised: bool = True


_now: list[tuple[Ledger, Batch]] = []
"""The rehearsal that is going on; attention is called by the model and cannot be told otherwise."""


class _Flash(torch.autograd.Function):
    """Attention as the fused kernels do it: query [B,H,T,D], key and value [B,G,T,D] → [B,H,T,D].

    Kept for the backward pass are the three, the output, and one float32 for each query.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:  # type: ignore[override]
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        log_sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sums, bias)
        _count_attention(q, 4.0, 4)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        _count_attention(q, 10.0, 8)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _count_attention(q: torch.Tensor, per_pair: float, tensors: int) -> None:
    if _now:
        ledger, batch = _now[-1]
        flops = per_pair * batch.pairs * q.shape[1] * q.shape[3]
        kind = "packed attention" if batch.packed else "attention"
        ledger.add(kind, flops, float(tensors * q.numel() * q.element_size()))


def _rehearsed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Stands for sdpa and for our packed attention: what they allocate, in the layout that they give back."""
    batch = _now[-1][1] if _now else Batch(query.shape[0], query.shape[2])
    B, H, T, D = query.shape
    bias = None
    if batch.packed:
        # The variable-length kernels take [B*T,H,D].
        query, key, value = (
            x.transpose(1, 2).reshape(1, B * T, x.shape[1], D).transpose(1, 2) for x in (query, key, value)
        )
        out = _Flash.apply(query, key, value, None).transpose(1, 2).reshape(B, T, H, D)
        return out, None
    if batch.masked:
        # With a mask sdpa gets its grouped heads repeated, and the boolean mask becomes a bias for each layer.
        groups = H // key.shape[1]
        key, value = (
            x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(B, H, T, D) if groups > 1 else x
            for x in (key, value)
        )
        bias = torch.empty(B, 1, T, T, dtype=query.dtype, device=query.device)
    return _Flash.apply(query, key, value, bias).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _rehearsed_attention)


class _Away:
    """A place that takes no memory of the GPU. As the real one does, it holds the last tensor until the next comes, and
    brings the one before back while another is used."""

    def __init__(self) -> None:
        self.order: list[weakref.ref[_Waiting]] = []
        self.leaving: tuple[_Waiting, torch.Tensor] | None = None
        self.bytes = self.most = 0
        """What waits there, now and at most."""

    def put(self, tensor: torch.Tensor) -> _Waiting:
        ticket = _Waiting(self, tensor)
        self.leaving = ticket, tensor
        self.order.append(weakref.ref(ticket))
        size = tensor.numel() * tensor.element_size()
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(ticket, self._left, size)
        return ticket

    def _left(self, size: int) -> None:
        self.bytes -= size


class _Waiting:
    def __init__(self, park: _Away, tensor: torch.Tensor) -> None:
        self.park, self.shape, self.dtype = park, tensor.shape, tensor.dtype
        self.here: torch.Tensor | None = None

    def fetch(self) -> None:
        if self.here is None:
            self.here = torch.empty(self.shape, dtype=self.dtype)

    def get(self) -> torch.Tensor:
        park, order = self.park, self.park.order
        if park.leaving is not None and park.leaving[0] is self:
            # It has not left yet.
            self.here = park.leaving[1]
        park.leaving = None
        self.fetch()
        while order and (last := order.pop()()) is not self:
            if last is not None and last.here is None:
                order.append(weakref.ref(last))
                break
        before = order[-1]() if order else None
        if before is not None:
            before.fetch()
        here, self.here = self.here, None
        assert here is not None
        return here


class Rehearsal:
    """A model on fake tensors, ready to go through steps. Use it as a context.

    `arrange` is called once the weights have their memory.
    """

    def __init__(self, model: nn.Module, manner: Manner, arrange: Callable[[], Any] = lambda: None) -> None:
        self.model: Any = model
        self.manner = manner
        self._arrange = arrange
        self.ledger = Ledger()
        self._stack = ExitStack()

    def __enter__(self) -> Rehearsal:
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(self.ledger)
        self._stack.enter_context(_float32_where_cuda_does() if self.manner.autocast else nullcontext())
        self._stack.enter_context(silent_programs(self.ledger))
        with self.ledger.during("start", "weights"):
            self._materialise()
            self._arranged = self._arrange()
        if self.manner.state_bytes:
            with self.ledger.during("start", "optimizer"):
                self._state = torch.empty(self.manner.state_bytes, dtype=torch.uint8)
        with self.ledger.during("start", "temporary"):
            self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8)
        self._prepare()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _materialise(self) -> None:
        """Gives every parameter and buffer on the meta device a fake storage; tied ones stay tied."""
        for layer in packed_layers(self.model):
            rows, columns = layer.out_features, layer.in_features
            size = packed_bytes(rows * columns, layer.bits, rows, self.manner.double_quantised)
            layer.packed = torch.empty(size, dtype=torch.uint8)
        packed = {id(layer.weight) for layer in packed_layers(self.model)}
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, old in table.items():
                    if old is None or id(old) in packed:
                        continue
                    if id(old) not in made:
                        category = "adapter" if old.requires_grad and self._has_adapter() else "weights"
                        with self.ledger.during("start", category):
                            new: torch.Tensor = torch.empty(old.shape, dtype=old.dtype)
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = (old, new)
                    table[name] = made[id(old)][1]

    def _has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def _inner(self) -> Any:
        """The model without PEFT's wrapper."""
        return self.model.get_base_model() if self._has_adapter() else self.model

    def _prepare(self) -> None:
        model, manner, base = self.model, self.manner, self._inner
        base.config.use_cache = False
        away = self._park = _Away() if manner.train.activation_offloading else None
        cpu = torch.device("cpu")
        self.spared = spare_memory(
            base, manner.train, manner.kernels, cpu, Replacements(), park=away, compiles=False
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._book_gradient)
        head = base.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self._head_begins)

    def _book_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.move(parameter.grad, "gradients")

    def _head_begins(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        """From the output head to the loss and back to the head, memory is booked as logits."""
        ledger = self.ledger
        ledger.rename("temporary", "activations" if torch.is_grad_enabled() else "temporary")
        ledger.category = "logits"
        if ledger.phase == "forward":
            ledger.phase = "loss"
        hidden = inputs[0]
        if hidden.requires_grad:

            def ended(grad: torch.Tensor) -> None:
                ledger.phase, ledger.category = "backward", "temporary"

            hidden.register_hook(ended)

    def step(self, batch: Batch) -> None:
        """Forward and backward pass of one micro batch, and the end of the step."""
        ledger, manner = self.ledger, self.manner
        trained = [p for p in self.model.parameters() if p.requires_grad]
        _now.append((ledger, batch))
        try:
            if manner.accumulates:
                with ledger.during("start", "gradients"):
                    for parameter in trained:
                        parameter.grad = torch.empty_like(parameter)
            with ledger.during("forward", "temporary"):
                with self._context():
                    loss = self._loss(batch)
                ledger.phase = "backward of the loss"
                loss.backward()
            del loss
            ledger.rename("activations", "temporary")
        finally:
            _now.pop()

    def evaluate(self, batch: Batch) -> None:
        """One forward pass of the evaluation."""
        _now.append((self.ledger, batch))
        self.model.eval()
        try:
            with self.ledger.during("evaluation", "temporary"), torch.no_grad(), self._context():
                self._loss(batch)
        finally:
            self.model.train()
            self.model.zero_grad()
            _now.pop()

    def first_step(self, batch: Batch) -> None:
        """A step that makes what later ones find: its memory counts, its time does not."""
        self.step(batch)
        self.forget_gradients()
        self.ledger.account = Account()

    def forget_gradients(self) -> None:
        """What zero_grad does after a step."""
        self.model.zero_grad()

    def _loss(self, batch: Batch) -> torch.Tensor:
        B, T = (1, batch.tokens) if batch.packed else (batch.rows, batch.length)
        ids = torch.empty(B, T, dtype=torch.int64)
        labels = torch.empty(B, T, dtype=torch.int64)
        inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if batch.packed:
            inputs["position_ids"] = torch.empty(B, T, dtype=torch.int64)
        if batch.masked:
            mask = torch.empty(B, 1, T, T, dtype=torch.bool)
            del mask  # made once for all layers, and gone before the peak
        outputs = self.model(**inputs, use_cache=False, num_items_in_batch=torch.ones((), dtype=torch.int64))
        return outputs.loss  # type: ignore[no-any-return]

    @contextmanager
    def _context(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.manner.autocast is not None:
                stack.enter_context(torch.autocast("cpu", self.manner.autocast))
            hooks = self.spared.hooks()
            if hooks is not None:
                stack.enter_context(hooks)
            yield

    @property
    def away(self) -> int:
        """The most bytes that waited outside of the GPU at one time."""
        return self._park.most if self._park is not None else 0

    @property
    def vocabulary(self) -> int:
        return embedding_rows(self._inner)


_IN_FLOAT32 = ("layer_norm", "softmax", "log_softmax", "group_norm")


@contextmanager
def _float32_where_cuda_does() -> Iterator[None]:
    """Autocast does these operations in float32 on CUDA, and not on the CPU."""
    before = {name: getattr(F, name) for name in _IN_FLOAT32}

    def raised(function: Any) -> Any:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu") and x.dtype in (torch.bfloat16, torch.float16):
                x = x.float()
                args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
                kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            return function(x, *args, **kwargs)

        return run

    try:
        for name, function in before.items():
            setattr(F, name, raised(function))
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)
