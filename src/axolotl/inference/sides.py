"""The models that one page asks side by side: what was trained, and its base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from peft import PeftModel

from axolotl.inference.loading import Loaded

# Starts of an adapter that also change the base's weights: with the adapter off, what is left is not the base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")
_PATIENCE = 0.1  # seconds between two looks at whether a wait is still wanted


@dataclass(frozen=True)
class Sides:
    """What was trained, and a way to its base: the same weights with the adapter off, or a second model.

    One side answers at a time, whoever asks: turning the adapter off concerns the whole model.
    """

    tuned: Loaded
    load_base: Callable[[], Loaded] | None = None
    """Loads the base as a model of its own; None where there is no other model than `tuned`."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _base: list[Loaded] = field(default_factory=list, repr=False)

    @property
    def comparable(self) -> bool:
        """Whether there is a base to compare with."""
        return self.load_base is not None

    @property
    def shared(self) -> bool:
        """Whether the base needs no memory of its own."""
        if not isinstance(self.tuned.model, PeftModel):
            return False
        starts = [getattr(c, "init_lora_weights", None) for c in self.tuned.model.peft_config.values()]
        return not any(str(start).lower().startswith(_CHANGES_BASE) for start in starts)

    @contextlib.contextmanager
    def opened(self, side: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Loaded | None]:
        """The model of a side, "tuned" or "base", for as long as it is held; None where the wait for it was cancelled.

        Raises whatever `load_base` raises, the first time that the base is a model of its own.
        """
        while not self._lock.acquire(timeout=_PATIENCE):
            if cancelled():
                yield None
                return
        try:
            if side == "tuned" or self.load_base is None:
                yield self.tuned
            elif self.shared:
                with self.tuned.model.disable_adapter():
                    yield self.tuned
            else:
                if not self._base:
                    self._base.append(self.load_base())
                yield self._base[0]
        finally:
            self._lock.release()
