"""A causal language model that makes its loss without ever holding the logits of all tokens.

Where labels come with the batch, head and cross-entropy run as one (see `axolotl.kernels.cross_entropy`); without
labels the model answers with logits as before. The head is still called as a module, so that whatever hangs on it
(sharding, hooks) works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from axolotl.kernels.cross_entropy import linear_cross_entropy
from axolotl.kernels.cross_entropy_parts import divided_linear_cross_entropy
from axolotl.model.replace import Replacements, own_forward

IGNORE_INDEX = -100
TOLERANCE = 2e-3
"""Relative difference from the plain loss that bfloat16 may make in a dozen tokens."""

Loss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def unfit(model: PreTrainedModel) -> str:
    """Why the head of this model cannot be fused with its loss; empty where it can."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return "the model has no output head"
    if _plain_head(head) is None:
        return f"the output head is a {type(head).__name__}"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the loss has a term for the router of the experts"
    return ""


def _plain_head(head: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the logits: the head, or the copy of it that is trained with an adapter."""
    copies, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", None)
    if copies is not None and active:
        head = copies[active[0]]
    return head if type(head) is nn.Linear else None


def fuse_loss(
    model: PreTrainedModel, made: Replacements, chunks: int | None = None, triton: bool | None = None
) -> None:
    """Replaces the forward of a model that `unfit` finds fit; see `linear_cross_entropy` for `chunks` and `triton`."""
    head = model.get_output_embeddings()
    linear = _plain_head(head)
    assert linear is not None
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    # A head whose words are divided among processes has a forward of its own.
    logits_of = linear.__dict__.get("forward") or own_forward(linear)

    def head_forward(self: nn.Linear, hidden: torch.Tensor, loss: Loss | None = None) -> Any:
        if loss is None:
            return logits_of(hidden)
        # A tuple passes the hooks that give trained heads' logits another number type.
        return (loss(self.weight, self.bias, hidden),)

    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return own_forward(self)(*args, **kwargs)
        kwargs.pop("return_dict", None)
        targets = kwargs.pop("shift_labels", None)
        ignore = kwargs.pop("ignore_index", IGNORE_INDEX)
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        outputs = self.base_model(*args, **kwargs)
        hidden = outputs.last_hidden_state

        def loss(weight: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
            rows, wanted = h.reshape(-1, h.shape[-1]), targets.reshape(-1).to(h.device)
            options: dict[str, Any] = {
                "ignore_index": ignore,
                "softcap": softcap,
                "scale": scale,
                "chunks": chunks,
            }
            if isinstance(weight, DTensor):
                return divided_linear_cross_entropy(
                    rows,
                    weight.to_local(),
                    wanted,
                    num_items_in_batch,
                    group=weight.device_mesh.get_group(),
                    bias=bias.to_local() if isinstance(bias, DTensor) else bias,
                    **options,
                )
            return linear_cross_entropy(
                rows, weight, wanted, num_items_in_batch, bias=bias, triton=triton, **options
            )

        (value,) = self.get_output_embeddings()(hidden, loss=loss)
        return CausalLMOutputWithPast(loss=value)

    made.forward(linear, head_forward)
    made.forward(model, forward, "fused loss")


def same_loss(model: PreTrainedModel, device: torch.device) -> tuple[float, float]:
    """The plain loss and the model's present one on a dozen random tokens."""
    draw = torch.Generator().manual_seed(0)
    embeddings: Any = model.get_input_embeddings()
    ids = torch.randint(0, min(int(embeddings.weight.shape[0]), 1000), (1, 12), generator=draw).to(device)
    labels = ids.clone()
    labels[0, :3] = IGNORE_INDEX
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batch = {"input_ids": ids, "labels": labels, "use_cache": False}
            items = torch.tensor(5.0, device=device)
            # In this order: the pass through the model's hooks is what gathers the parts of a sharded one.
            ours = model(**batch, num_items_in_batch=items).loss
            plain = own_forward(model)(**batch, num_items_in_batch=items).loss
        return float(plain), float(ours)
    finally:
        model.train(was_training)
