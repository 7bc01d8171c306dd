"""Computing again in the backward pass what the forward pass did not keep, tensor by tensor.

`recomputed(run, ...)` runs a function and keeps nothing but its inputs: each tensor that autograd would save becomes an
empty place. When the backward pass asks for the first of them, the function runs again and fills all places, and stops
as soon as the last one is filled. Both passes of a graph are the usual ones, so hooks, adapters, sharded weights and
frozen inputs need nothing of their own (the idea is that of PyTorch's non-reentrant checkpoints, arXiv 1604.06174).

Inside, `known(run, ...)` marks a part whose second run can be left out: because its output was kept (attention), or
because nothing behind it asks for its output (a feed-forward layer that keeps its input alone and comes last).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from axolotl.errors import ModelError
from axolotl.model.park import Park, Ticket

MOST_KEPT = 3.0
"""Bytes that a kept part may hold, as a multiple of its output's; attention that holds its scores is above it."""

_NOISE = ("drop_path", "router_jitter_noise")


class _Here(threading.local):
    """The frame that runs in this thread; the backward pass has threads of its own."""

    frame: Frame | None = None
    again: bool = False


_here = _Here()


class _Enough(BaseException):
    """The last place is filled. No code between must take it for a failure."""


@dataclass(slots=True, weakref_slot=True)
class _Place:
    """What stands in the graph for a tensor that was not kept."""

    frame: Frame
    index: int
    kept: torch.Tensor | None = None
    """The tensor itself, where it was kept after all."""
    view: tuple[Any, ...] | None = None
    """For a view into a parked output: its shape, strides and offset."""
    part: _Known | None = None


@dataclass(slots=True)
class _Known:
    """A part of a frame whose second run may be left out."""

    start: int
    keeps: bool
    sources: dict[int, tuple[int, tuple[Any, ...]]] = field(default_factory=dict)
    """Place → which input it is a view of, and how."""
    layouts: list[tuple[Any, ...]] = field(default_factory=list)
    plain: bool = False
    stop: int = 0
    out: torch.Tensor | None = None
    ticket: Ticket | None = None
    shape: tuple[Any, ...] = ()
    grad: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """How a function is recomputed."""

    random: bool = False
    """It draws random numbers, which the second run has to draw again."""
    park: Park | None = None
    """Where its first tensor waits meanwhile; None: where it is."""
    park_kept: Park | None = None
    """Where the outputs of kept parts wait."""


def recomputed(run: Callable[..., Any], options: Options, *args: Any, **kwargs: Any) -> Any:
    """`run(*args, **kwargs)`, of which the graph keeps only the arguments.

    Tensors in the result may be differentiated once. Where no gradient is recorded, it is an ordinary call.
    """
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    frame = Frame(run, options, args, kwargs)
    with _inside(frame, again=False), saved_tensors_hooks(frame.leave, _take):
        return run(*args, **kwargs)


def known(
    run: Callable[..., torch.Tensor], *inputs: torch.Tensor, keeps: bool, random: bool = False
) -> torch.Tensor:
    """`run(*inputs)`; inside a recomputed function, the second run is left out where that is possible.

    `keeps`: the output, and what is no view of an input, are kept for the backward pass. Otherwise it must be a function
    that saves nothing but its inputs and weights, and is only left out where nothing asks for its output. `random`: it
    draws random numbers.
    """
    frame = _here.frame
    if frame is None or random or not torch.is_grad_enabled():
        return run(*inputs)
    return frame.run_again(run, inputs) if _here.again else frame.run_first(run, inputs, keeps)


def active() -> bool:
    """Whether a recomputed function runs in this thread, for the first or the second time."""
    return _here.frame is not None and torch.is_grad_enabled()


def begin_anew() -> None:
    """Forgets what the present frame has left out so far: its function starts over inside the same run."""
    if _here.frame is not None and not _here.again:
        _here.frame.places.clear()
        _here.frame.facts.clear()
        _here.frame.parts.clear()


@contextlib.contextmanager
def _inside(frame: Frame | None, *, again: bool) -> Iterator[None]:
    before = _here.frame, _here.again
    _here.frame, _here.again = frame, again
    try:
        yield
    finally:
        _here.frame, _here.again = before


def _take(packed: Any) -> torch.Tensor:
    return packed.frame.take(packed) if isinstance(packed, _Place) else packed


def _layout(t: torch.Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), tuple(t.stride()), t.storage_offset()


def _memory(t: torch.Tensor) -> int:
    # Tensors that wrap others have no memory of their own.
    return -id(t) if is_traceable_wrapper_subclass(t) else t.untyped_storage()._cdata


def _size(t: torch.Tensor) -> int:
    return t.numel() * t.element_size() if is_traceable_wrapper_subclass(t) else t.untyped_storage().nbytes()


class Frame:
    """One run of a function whose saved tensors are made again."""

    def __init__(
        self, run: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.run, self.options = run, options
        self.places: list[weakref.ref[_Place]] = []
        self.facts: list[tuple[Any, ...]] = []
        self.found: dict[int, torch.Tensor] = {}
        self.parts: list[_Known] = []
        self._open: _Known | None = None
        self._inputs: dict[int, int] = {}
        self._cursor = 0
        self._seen_parts = 0
        first = next((a for a in (*args, kwargs.get("hidden_states")) if isinstance(a, torch.Tensor)), None)
        self._device = first.device.type if first is not None else "cpu"
        self._autocast = autocast_of(self._device)
        self._random = random_state(self._device) if options.random else None
        self._hidden = None if first is None else first.requires_grad
        self._ticket = None
        if options.park is not None and first is not None:
            self._ticket = options.park.put(first.detach())
            args = tuple(_PARKED if a is first else a for a in args)
            kwargs = {k: _PARKED if a is first else a for k, a in kwargs.items()}
        self._args, self._kwargs = args, kwargs
        self._first = first.detach() if first is not None and self._ticket is None else None
        if self._first is not None:
            # The graph itself must not hang on its own inputs.
            self._args = tuple(_PARKED if a is first else a for a in args)
            self._kwargs = {k: _PARKED if a is first else a for k, a in kwargs.items()}

    # First run

    def leave(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for each tensor that it would save."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        place = _Place(self, len(self.places))
        part = self._open
        if part is not None:
            source = self._inputs.get(_memory(tensor))
            if source is not None:
                part.sources[place.index] = source, _layout(tensor)
            elif part.keeps:
                place.kept = tensor.detach()
                place.part = part
            else:
                part.plain = True
        self.places.append(weakref.ref(place))
        self.facts.append((tensor.shape, tensor.dtype))
        return place

    def run_first(
        self, run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], keeps: bool
    ) -> torch.Tensor:
        """The first run of a known part."""
        if self._open is not None:
            return run(*inputs)
        part = _Known(len(self.places), keeps, layouts=[_layout(t) for t in inputs])
        self._open, self._inputs = part, {_memory(t): i for i, t in enumerate(inputs)}
        try:
            out = run(*inputs)
        finally:
            self._open, self._inputs = None, {}
        part.stop, part.grad = len(self.places), out.requires_grad
        self.parts.append(part)
        if keeps:
            self._settle(part, out)
        # What draws random numbers later has to find the generator where it was.
        part.plain = part.plain or (self.options.random and not keeps)
        return out

    def _settle(self, part: _Known, out: torch.Tensor) -> None:
        """Decides whether what a part saved is worth keeping, and keeps it."""
        mine = [
            p for r in self.places[part.start : part.stop] if (p := r()) is not None and p.kept is not None
        ]
        memory = {_memory(p.kept): _size(p.kept) for p in mine if p.kept is not None}
        of_out = out.numel() * out.element_size()
        memory.setdefault(_memory(out), out.untyped_storage().nbytes())
        if sum(memory.values()) > MOST_KEPT * of_out:
            part.plain = True
            for place in mine:
                place.kept = place.part = None
            return
        part.shape = _layout(out)
        park = self.options.park_kept
        whole = out.untyped_storage().nbytes() == of_out
        if park is None or not whole:
            part.out = out.detach()
            return
        part.ticket = park.put(torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage()))
        for place in mine:
            if place.kept is not None and _memory(place.kept) == _memory(out):
                place.view, place.kept = _layout(place.kept), None

    # Second run

    def take(self, place: _Place) -> torch.Tensor:
        """The tensor that a place stands for."""
        if place.kept is not None:
            return place.kept
        if place.view is not None and place.part is not None:
            return self._output(place.part).as_strided(*place.view)
        if place.index not in self.found:
            self._again()
        if place.index not in self.found:
            raise ModelError("A layer saved other tensors when it was computed again than the first time.")
        return self.found.pop(place.index)

    def _again(self) -> None:
        device = self._device
        first = self._first if self._ticket is None else self._ticket.get()
        if first is not None:
            first = first.detach().requires_grad_(bool(self._hidden))
        args = tuple(first if a is _PARKED else a for a in self._args)
        kwargs = {k: first if a is _PARKED else a for k, a in self._kwargs.items()}
        self._cursor = self._seen_parts = 0
        self._open = None
        with contextlib.ExitStack() as stack:
            for each in self._autocast:
                stack.enter_context(torch.autocast(**each))
            if self._random is not None:
                stack.enter_context(drawing_again(self._random, device))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_inside(self, again=True))
            stack.enter_context(saved_tensors_hooks(self._fill, _never))
            with contextlib.suppress(_Enough):
                self.run(*args, **kwargs)

    def _fill(self, tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, nn.Parameter):
            self._put(tensor.detach())
            self._stop_when_full()
        return None

    def _put(self, tensor: torch.Tensor) -> None:
        index = self._cursor
        self._cursor += 1
        if index >= len(self.facts) or (tensor.shape, tensor.dtype) != self.facts[index]:
            raise ModelError(
                "A layer computed other shapes when it was computed again than the first time: "
                f"{tuple(tensor.shape)} as saved tensor {index}.",
                "Set `gradient_checkpointing: false` for this model.",
            )
        if self.places[index]() is not None:
            self.found[index] = tensor

    def _stop_when_full(self) -> None:
        if self._cursor == len(self.places):
            raise _Enough

    def run_again(self, run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The second run of a known part, left out where it can be."""
        if self._open is not None or self._seen_parts >= len(self.parts):
            return run(*inputs)
        part = self.parts[self._seen_parts]
        self._seen_parts += 1
        if part.plain or part.start != self._cursor or part.layouts != [_layout(t) for t in inputs]:
            self._open = part
            try:
                return run(*inputs)
            finally:
                self._open = None
        for index in range(part.start, part.stop):
            if index in part.sources:
                source, view = part.sources[index]
                self._put(inputs[source].detach().as_strided(*view))
            else:
                self._cursor += 1
        self._stop_when_full()
        if part.keeps:
            return self._output(part).as_strided(*part.shape).requires_grad_(part.grad)
        with torch.no_grad():
            out = run(*inputs)
        return out.requires_grad_(part.grad)

    def _output(self, part: _Known) -> torch.Tensor:
        if part.out is None:
            assert part.ticket is not None
            part.out = part.ticket.get()
        return part.out.detach()


class _Parked:
    """Stands among the arguments for the tensor that is parked."""


_PARKED = _Parked()


def _never(packed: Any) -> torch.Tensor:
    raise ModelError("A layer took back a tensor while it was computed again.")


def draws(module: nn.Module) -> bool:
    """Whether a module draws random numbers while it trains."""
    for each in module.modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0:
            return True
        named = [v for n, v in vars(each).items() if "dropout" in n or n in _NOISE]
        if any(isinstance(v, float) and v > 0 for v in named):
            return True
    return False


def autocast_of(device: str) -> list[dict[str, Any]]:
    """The autocast that is on, as arguments to enter it again; `device` is the kind of device."""
    kinds = dict.fromkeys((device, "cpu"))
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    ]


def random_state(device: str) -> list[torch.Tensor]:
    """Where the random generators stand."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device == "cuda" else states


@contextlib.contextmanager
def drawing_again(states: list[torch.Tensor], device: str) -> Iterator[None]:
    """Inside, the generators draw once more what they drew from these states on."""
    before = random_state(device)
    _setrandom_state(states)
    try:
        yield
    finally:
        _setrandom_state(before)


def _setrandom_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
