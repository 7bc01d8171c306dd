"""A plugin for tests: something happens to one rank while a checkpoint is written. MIDSAVE=kill:1:6, or full:1:6."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

if os.environ.get("MIDSAVE"):
    _what, _rank, _step = os.environ["MIDSAVE"].split(":")
    _write = FileSystemWriter.write_data

    def _accident(self: Any, plan: Any, planner: Any) -> Any:
        at = "rehearsal" if _step == "0" else f"checkpoint-{_step}"
        if at in str(self.path) and os.environ["RANK"] == _rank:
            if _what == "kill" and "optimizer" in str(self.path):
                os.kill(os.getpid(), signal.SIGKILL)
            if _what == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
        return _write(self, plan, planner)

    FileSystemWriter.write_data = _accident  # type: ignore[method-assign]
