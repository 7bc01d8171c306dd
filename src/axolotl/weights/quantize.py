"""quantize: a finished model in smaller numbers through torchao, with what that costs: size and loss before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TorchAoConfig

from axolotl.console import note, success
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.inference.evaluate import LossReport
from axolotl.model.files import read_json, read_weight_files
from axolotl.registry import require_extra
from axolotl.weights.card import CARD, base_named_in, quantized_card
from axolotl.weights.folder import gigabytes, need_space, refuse_destination, written_whole

if TYPE_CHECKING:
    from axolotl.config.model import PostTrainingQuantization

# (weights, activations) -> how torchao is asked for it; what is not here, torchao does not have.
_SCHEMES: dict[tuple[str, str | None], str] = {
    ("int8", None): "Int8WeightOnlyConfig",
    ("int4", None): "Int4WeightOnlyConfig",
    ("float8_e4m3fn", None): "Float8WeightOnlyConfig",
    ("int8", "int8"): "Int8DynamicActivationInt8WeightConfig",
    ("int4", "int8"): "Int8DynamicActivationIntxWeightConfig",
    ("float8_e4m3fn", "float8_e4m3fn"): "Float8DynamicActivationFloat8WeightConfig",
    ("int4", "float8_e4m3fn"): "Float8DynamicActivationInt4WeightConfig",
}
_INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 (torch tells type checkers nothing of it)
_ON_GPU = {
    ("int4", None): "packed 4-bit weights",
    ("float8_e4m3fn", "float8_e4m3fn"): "products of 8-bit floats",
    ("int4", "float8_e4m3fn"): "products of 8-bit floats with packed 4-bit weights",
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, its bytes on disk, its loss on the rows compared."""

    model: str
    bytes: int
    loss: float | None
    perplexity: float | None

    @classmethod
    def of(cls, model: str, size: int, report: LossReport | None) -> Row:
        if report is None:
            return cls(model, size, None, None)
        return cls(model, size, report.loss, report.perplexity)


@dataclass(frozen=True)
class QuantizeReport:
    """What quantising did."""

    destination: Path
    scheme: str
    before: Row
    after: Row

    def table(self) -> list[str]:
        """The comparison for people."""
        lines = [f"{'':<12} {'size':>10} {'loss':>9} {'perplexity':>12}"]
        for row in (self.before, self.after):
            loss = "-" if row.loss is None else f"{row.loss:.4f}"
            perplexity = "-" if row.perplexity is None else f"{row.perplexity:.4f}"
            lines.append(f"{row.model:<12} {gigabytes(row.bytes):>10} {loss:>9} {perplexity:>12}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "destination": str(self.destination),
            "scheme": self.scheme,
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def scheme_name(wanted: PostTrainingQuantization) -> str:
    """The scheme in short, such as int8 or int4-int8 (weights, activations)."""
    kinds = [wanted.weight_dtype, wanted.activation_dtype]
    return "-".join("fp8" if k == "float8_e4m3fn" else k for k in kinds if k)


def check_scheme(wanted: PostTrainingQuantization, device: str) -> Any:
    """torchao's configuration of the scheme.

    Raises EnvironmentProblem where torchao or a GPU is missing, ModelError for a pair of number types that torchao
    does not have.
    """
    pair = (wanted.weight_dtype, wanted.activation_dtype)
    name = _SCHEMES.get(pair)
    if name is None:
        known = ", ".join(f"{w}{f' with {a}' if a else ' alone'}" for w, a in _SCHEMES)
        raise ModelError(
            Problem(
                f"`quantization`: weights in {pair[0]} with activations in {pair[1]} are no scheme of torchao.",
                f"Known: {known}.",
                keys=("quantization",),
            )
        )
    torchao = require_extra("torchao.quantization", "torchao", "`axolotl quantize`")
    if pair in _ON_GPU and device != "cuda":
        raise EnvironmentProblem(
            Problem(
                f"`quantization` asks for {scheme_name(wanted)}: torchao computes {_ON_GPU[pair]} on a CUDA GPU only.",
                "Run it on a GPU, or choose `weight_dtype: int8` or `fp8` without `activation_dtype`.",
                "environment",
                ("quantization",),
            )
        )
    options: dict[str, Any] = {}
    if name == "Int4WeightOnlyConfig":
        options["group_size"] = wanted.group_size
    elif name == "Int8DynamicActivationIntxWeightConfig":
        options = {"weight_dtype": _INT4, "weight_granularity": torchao.PerGroup(wanted.group_size)}
    elif name == "Int8WeightOnlyConfig":
        options["granularity"] = torchao.PerGroup(wanted.group_size)
    try:
        chosen = getattr(torchao, name)(**options)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise EnvironmentProblem(
            f"This torchao cannot do {scheme_name(wanted)}: {str(error).splitlines()[0]}",
            "Install another version: pip install 'axolotl[torchao]'",
        ) from None
    if not wanted.quantize_embedding:
        return chosen
    bits = _INT4 if wanted.weight_dtype == "int4" else torch.int8
    embedding = torchao.IntxWeightOnlyConfig(
        weight_dtype=bits, granularity=torchao.PerGroup(wanted.group_size)
    )
    return {"chosen": chosen, "embedding": embedding}


def _check_groups(model: Any, wanted: PostTrainingQuantization) -> None:
    if wanted.weight_dtype == "float8_e4m3fn" or wanted.activation_dtype == "int8" == wanted.weight_dtype:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % wanted.group_size:
            raise ModelError(
                Problem(
                    f"`quantization.group_size: {wanted.group_size}` does not divide the {module.in_features} inputs "
                    f"of `{name}`.",
                    "Choose a divisor, 32 for example.",
                    keys=("quantization",),
                )
            )


def quantize(
    source: Path,
    destination: Path,
    wanted: PostTrainingQuantization,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str = "cpu",
    measure: Callable[[Any], LossReport] | None = None,
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Writes the model in `source` in smaller numbers to `destination`, tokenizer and configuration included.

    `measure` gives the loss of a model; both models are measured, the second after it was read back from its files.
    Raises ModelError and EnvironmentProblem as `check_scheme` does, and for a model that is quantised already.
    """
    chosen = check_scheme(wanted, device)
    refuse_destination(destination, source)
    already = read_json(source / "config.json").get("quantization_config")
    if already:
        raise ModelError(
            f"`{source}` is quantised already ({already.get('quant_method', 'unknown')}).",
            "Name the full-precision model: --base-model DIR.",
        )
    size = read_weight_files(source).total_bytes
    need_space(destination, size + 2**25, "The quantised model")
    options: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}}
    if trust_remote_code:
        options["trust_remote_code"] = True
    plain = AutoModelForCausalLM.from_pretrained(source, **options)
    _check_groups(plain, wanted)
    before = measure(plain) if measure else None
    if isinstance(chosen, dict):
        chosen = _with_embedding(plain, chosen)
    del plain
    note(f"Quantising `{source}` to {scheme_name(wanted)}.")
    config = TorchAoConfig(chosen)
    try:
        small = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
        raise EnvironmentProblem(
            f"torchao cannot quantise this model to {scheme_name(wanted)} here: {str(error).splitlines()[0]}",
            "Choose another `weight_dtype`, or run it on a GPU that torchao supports for it.",
        ) from None
    with written_whole(destination) as part:
        small.save_pretrained(part)
        tokenizer.save_pretrained(part)
        del small
        files = read_weight_files(part)
        again = AutoModelForCausalLM.from_pretrained(part, **options)
        after = measure(again) if measure else None
        del again
        report = QuantizeReport(
            destination,
            scheme_name(wanted),
            Row.of("before", size, before),
            Row.of(scheme_name(wanted), files.total_bytes, after),
        )
        card = quantized_card(base_named_in(source), report.scheme, report.table())
        (part / CARD).write_text(card, encoding="utf-8")
    success(f"Quantised to {report.scheme}: {destination}")
    return report


def _with_embedding(model: Any, chosen: dict[str, Any]) -> Any:
    """A configuration that treats the input embedding apart from the linear layers."""
    torchao = require_extra("torchao.quantization", "torchao", "`quantize_embedding`")
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is first.weight:
        raise ModelError(
            Problem(
                "`quantization.quantize_embedding`: this model's embedding is also its output head, which torchao "
                "cannot hold in two forms.",
                "Set `quantize_embedding: false`.",
                keys=("quantization",),
            )
        )
    name = next(n for n, m in model.named_modules() if m is first)
    return torchao.FqnToConfig({"_default": chosen["chosen"], name: chosen["embedding"]})
