"""A plugin for tests: writes down what DDP sends, and in which order with the backward pass, into TRAFFIC-RANK."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from axolotl.train.callbacks import EpochOrder

if os.environ.get("TRAFFIC") and "RANK" in os.environ:
    _file = f"{os.environ['TRAFFIC']}-{os.environ['RANK']}"
    _init, _end = DistributedDataParallel.__init__, EpochOrder.on_step_end

    def _note(line: str) -> None:
        with open(_file, "a") as stream:
            stream.write(line + "\n")

    def _watched(self: Any, *args: Any, **kwargs: Any) -> None:
        _init(self, *args, **kwargs)

        def sent(state, bucket):  # DDP looks at the types of its arguments
            _note(f"sent {bucket.buffer().nbytes}")
            return allreduce_hook(None, bucket)

        self.register_comm_hook(None, sent)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        _note(f"trained {sum(p.numel() * p.element_size() for p in trained)}")
        # The backward pass reaches the first parameter last.
        trained[0].register_post_accumulate_grad_hook(lambda p: _note("last gradient"))

    def _step(self: Any, *args: Any, **kwargs: Any) -> None:
        _note("step")
        _end(self, *args, **kwargs)

    DistributedDataParallel.__init__ = _watched  # type: ignore[method-assign]
    EpochOrder.on_step_end = _step  # type: ignore[method-assign]
