"""Compares a merged model with base and adapter on the user's own rows.

N tokens of all rows together, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Logits that differ by less than one step of bfloat16 are a tie.
_BF16_STEP = 2.0**-7
MAX_DIFFERENCE_FP32 = 1e-4
MAX_KL = 1e-3
MIN_ARGMAX = 0.99


@dataclass(frozen=True)
class Verification:
    """How far two models are apart on `tokens` tokens. `kl` in nats per token; `argmax`: share of equal top tokens."""

    pair: str
    tokens: int
    max_difference: float
    kl: float
    argmax: float
    dtype: str
    binding: bool = True
    """Whether a difference beyond tolerance is a failure."""

    @property
    def passed(self) -> bool:
        if self.dtype == "float32":
            return self.max_difference <= MAX_DIFFERENCE_FP32
        return self.kl <= MAX_KL and self.argmax >= MIN_ARGMAX

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"{self.pair}: max |Δlogit| {self.max_difference:.2e}, KL {max(self.kl, 0.0):.2e}, same top token "
            f"{100 * self.argmax:.2f} % of {self.tokens} tokens"
        )


def logits_of(build: Callable[[], Any], rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits [N_row, V] of each row, on the CPU. The model is built here, and gone afterwards."""
    model = build().eval()
    device = next(model.parameters()).device
    results = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            results.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return results


def compare(
    pair: str, reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], dtype: str, binding: bool = True
) -> Verification:
    """Compares logits row by row. `dtype` is that of the merged weights ("float32", "bfloat16", ...)."""
    difference, kl, same, count = 0.0, 0.0, 0, 0
    for ours_NV, theirs_NV in zip(reference, other, strict=True):
        width = min(ours_NV.shape[1], theirs_NV.shape[1])
        a_NV, b_NV = ours_NV[:, :width], theirs_NV[:, :width]
        difference = max(difference, float((a_NV - b_NV).abs().max()))
        log_a, log_b = a_NV.double().log_softmax(-1), b_NV.double().log_softmax(-1)
        kl += float((log_a.exp() * (log_a - log_b)).sum())
        top = a_NV.max(-1).values
        chosen = a_NV.gather(1, b_NV.argmax(-1, keepdim=True))[:, 0]
        same += int((top - chosen <= _BF16_STEP * top.abs()).sum())
        count += a_NV.shape[0]
    return Verification(pair, count, difference, kl / count, same / count, dtype, binding)
