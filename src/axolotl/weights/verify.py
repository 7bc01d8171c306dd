"""Compares a merged model with base and adapter on the user's own rows.

N tokens of all rows together, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from axolotl.config.host import ram
from axolotl.console import note
from axolotl.model.adapter import load_adapter
from axolotl.model.adapter_files import adapter_config
from axolotl.model.embeddings import resize_embeddings
from axolotl.model.files import read_weight_files
from axolotl.weights.folder import gigabytes
from axolotl.weights.layerwise import largest_part, logits_by_layers
from axolotl.weights.shell import Shell
from axolotl.weights.skeleton import NotLayerwiseError, Skeleton
from axolotl.weights.stream import Source, Written
from axolotl.weights.tensors import larger

# Logits that differ by less than one step of bfloat16 are a tie.
_BF16_STEP = 2.0**-7
MAX_DIFFERENCE_FP32 = 1e-4
MAX_KL = 1e-3
MIN_ARGMAX = 0.99
MAX_LAYER = {"float32": 1e-4}
_MAX_LAYER_HALF = 2e-2
# A comparison of whole models on the CPU is a matter of minutes beyond this many bytes of weights.
_PATIENCE_BYTES = 4 * 10**9
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nprint(add(2, 3))",
    "Question: What is the capital of France?\nAnswer: Paris is the capital of France.",
)


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
        if not (math.isfinite(self.max_difference) and math.isfinite(self.kl)):
            return False
        if self.dtype == "float32":
            return self.max_difference <= MAX_DIFFERENCE_FP32
        return self.kl <= MAX_KL and self.argmax >= MIN_ARGMAX

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"{self.pair}: max |Δlogit| {self.max_difference:.2e}, KL {larger(0.0, self.kl):.2e}, same top token "
            f"{100 * self.argmax:.2f} % of {self.tokens} tokens"
        )


@dataclass(frozen=True)
class LayerCheck:
    """The merged layer that is farthest from base layer and adapter: difference relative to its largest output."""

    layer: str
    difference: float
    dtype: str
    binding: bool = True

    @property
    def passed(self) -> bool:
        return self.difference <= MAX_LAYER.get(self.dtype, _MAX_LAYER_HALF)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return f"layer by layer: relative difference at most {self.difference:.2e}, in `{self.layer}`"


Check = Verification | LayerCheck


@dataclass(frozen=True)
class Models:
    """Where the models to compare are, and how many embedding rows they have."""

    base: Path
    config: PretrainedConfig
    adapter: Path
    merged: Path
    rows: int
    trust_remote_code: bool = False
    unpacking: Any = None
    """How fp8 or mxfp4 base weights become plain ones."""

    def adapted(self, rounding: Callable[[torch.Tensor], torch.Tensor] | None) -> Any:
        """Base and adapter, in float32; `rounding` is what quantised loading does to linear layers."""
        packed = {"quantization_config": self.unpacking} if self.unpacking is not None else {}
        model = self._load(self.base, config=copy.deepcopy(self.config), **packed)
        resize_embeddings(model, self.rows)
        if rounding is not None:
            head = model.get_output_embeddings()
            for module in model.modules():
                if isinstance(module, nn.Linear) and module is not head:
                    module.weight.data = rounding(module.weight.data)
        return load_adapter(model, self.adapter, allow_pickle=self.trust_remote_code)

    def merged_model(self) -> Any:
        """The merged model, its weights raised to float32, so that nothing but the merge is compared."""
        return self._load(self.merged)

    def shell(self) -> Shell:
        """The architecture without weights."""
        return Shell(self.config, self.rows)

    def adapted_by_layers(
        self, rows: Sequence[Sequence[int]], rounding: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """Logits of base and adapter with memory for one layer. Raises NotLayerwiseError."""
        skeleton = Skeleton(self.config, adapter_config(self.adapter), self.adapter, self.rows)
        source = Source(read_weight_files(self.base), skeleton, self.rows, rounding)
        return logits_by_layers(skeleton, source, rows, skeleton.deferred)

    def merged_by_layers(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits of the merged model, as its own files describe it, with memory for one layer."""
        code = {"trust_remote_code": True} if self.trust_remote_code else {}
        shell = Shell(AutoConfig.from_pretrained(self.merged, **code), self.rows)
        return logits_by_layers(shell, Source(read_weight_files(self.merged), shell, self.rows, None), rows)

    def _load(self, folder: Path, **options: Any) -> Any:
        if self.trust_remote_code:
            options["trust_remote_code"] = True
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def default_rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Rows for a comparison where the user's own are not at hand."""
    return [list(tokenizer.encode(text)) for text in _SAMPLE]


def verify_merge(
    models: Models,
    written: Written,
    rows: Sequence[Sequence[int]],
    way: str,
    onto_quantized: bool,
    rounding: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[Check]:
    """Compares the merged model with base and adapter on `rows`: whole models, the layers of both in turn, or, where
    not even that is possible, what each layer does to made-up inputs.

    `way`: "logits", "by layers", "layers", "whole" (if at all, as whole models), or "auto", which chooses by size and free memory and says what it chose.
    `rounding` is what quantised training did to the base (None: nothing); then both bases are compared, and only the one
    that was merged into binds.
    """
    if way == "auto":
        way = _way(models, written)
    if way == "whole" and 1.5 * _bytes_in_float32(written) > (free := ram().free or 2**62):
        note(
            f"The merged model is not compared with base and adapter: in float32 it is "
            f"{gigabytes(_bytes_in_float32(written))}, and {gigabytes(free)} of memory are free."
        )
        return []
    if way == "layers":
        if written.reread is not None:
            written.reread()
        return [LayerCheck(*written.worst_layer, written.dtype)] if written.worst_layer else []
    rows = [list(r)[: 64 if way == "by layers" else 128] for r in rows if len(r) > 1][:4]
    if not rows:
        return []
    bases: list[tuple[str, Any, bool]] = [("full base + adapter against merged", None, not onto_quantized)]
    if rounding is not None:
        bases.append(("quantised base + adapter against merged", rounding, onto_quantized))
    if way == "by layers":
        try:
            merged = models.merged_by_layers(rows)
            references = [models.adapted_by_layers(rows, transform) for _, transform, _ in bases]
        except NotLayerwiseError as error:
            note(f"The rows were not compared: {error}. Each layer was, on its own.")
            return verify_merge(models, written, rows, "layers", onto_quantized, rounding)
    else:
        note(f"Comparing the merged model with base and adapter on {sum(map(len, rows))} tokens.")
        merged = logits_of(models.merged_model, rows)
        references = [logits_of(lambda t=transform: models.adapted(t), rows) for _, transform, _ in bases]  # type: ignore[misc]
    return [
        compare(name, reference, merged, written.dtype, binding)
        for (name, _, binding), reference in zip(bases, references, strict=True)
    ]


def _way(models: Models, written: Written) -> str:
    """How two models are compared in bearable time and within this machine's free memory."""
    needed = _bytes_in_float32(written)
    free = ram().free or 2**62
    if needed <= _PATIENCE_BYTES and needed * 1.5 < free:
        return "logits"
    try:
        part = largest_part(models.shell())
    except NotLayerwiseError as error:
        note(f"Each layer is compared on its own, not on rows: {error}.")
        return "layers"
    # A part is read in its own number type beside its float32 copy; logits and the libraries take the rest.
    if 2 * part + 2**29 > free:
        note(
            f"Each layer is compared on its own, not on rows: its largest part in float32 is {gigabytes(part)}, and "
            f"{gigabytes(free)} of memory are free."
        )
        return "layers"
    note(
        f"Comparing the merged model with base and adapter on rows, layer by layer: in float32 it is "
        f"{gigabytes(needed)}, of which {gigabytes(part)} are held at once."
    )
    return "by layers"


def _bytes_in_float32(written: Written) -> int:
    return written.bytes * (1 if written.dtype == "float32" else 2)


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
    pair: str,
    reference: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    dtype: str,
    binding: bool = True,
) -> Verification:
    """Compares logits row by row. `dtype` is that of the merged weights ("float32", "bfloat16", ...)."""
    difference, kl, same, count = 0.0, 0.0, 0, 0
    for ours_NV, theirs_NV in zip(reference, other, strict=True):
        width = min(ours_NV.shape[1], theirs_NV.shape[1])
        a_NV, b_NV = ours_NV[:, :width], theirs_NV[:, :width]
        difference = larger(difference, float((a_NV - b_NV).abs().max()))
        log_a, log_b = a_NV.double().log_softmax(-1), b_NV.double().log_softmax(-1)
        kl += float((log_a.exp() * (log_a - log_b)).sum())
        top = a_NV.max(-1).values
        chosen = a_NV.gather(1, b_NV.argmax(-1, keepdim=True))[:, 0]
        same += int((top - chosen <= _BF16_STEP * top.abs()).sum())
        count += a_NV.shape[0]
    return Verification(pair, count, difference, kl / count, same / count, dtype, binding)
