"""An architecture whose weights are placeholders of no size: its modules, the names and shapes of its tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class Shell:
    """A model without weights; its buffers are real. `rows`: of the embeddings."""

    def __init__(self, config: PretrainedConfig, rows: int) -> None:
        config = copy.deepcopy(config)
        config.get_text_config().vocab_size = rows
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.tie_weights()  # which every assignment to a module above has undone
        self._empty_weights()
        self.shapes = {n: tuple(t.shape) for n, t in self.model.state_dict().items()}
        modules = {id(m): f"{n}.weight" for n, m in self.model.named_modules()}
        first, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.input_name = modules[id(first)]
        self.output_name = None if head is None else modules[id(head)]
        self.tied = head is not None and head.weight is first.weight
        self.linear_names = frozenset(
            f"{n}.weight" for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head
        )

    def _empty_weights(self) -> None:
        """Gives every weight its shape and no memory. Tied weights stay tied."""
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    made[id(parameter)] = _placeholder(parameter.shape)
                module._parameters[name] = made[id(parameter)]


def _placeholder(shape: torch.Size) -> nn.Parameter:
    """A weight of that shape that takes no memory."""
    parameter = nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)
    parameter.is_placeholder = True  # type: ignore[attr-defined]
    return parameter


def is_placeholder(parameter: Any) -> bool:
    return getattr(parameter, "is_placeholder", False)
