"""A plugin for tests: something happens to one rank, once. ACCIDENT=kill:1:5 kills rank 1 before step 5 ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from axolotl.train.callbacks import EpochOrder

if os.environ.get("ACCIDENT"):
    _what, _rank, _step = os.environ["ACCIDENT"].split(":")
    _end_of_step = EpochOrder.on_step_end

    def _accident(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _end_of_step(self, args, state, control, **kwargs)
        done = Path(args.output_dir) / "accident"
        if state.global_step == int(_step) and os.environ["RANK"] == _rank and not done.exists():
            done.touch()
            if _what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("on purpose")

    EpochOrder.on_step_end = _accident  # type: ignore[method-assign]
