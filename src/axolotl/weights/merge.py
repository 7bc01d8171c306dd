"""merge-lora: writes base model and adapter as one model, tensor by tensor, verified before it takes its place."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from axolotl.console import note, success, warn
from axolotl.errors import ModelError, Problem
from axolotl.model.adapter import load_adapter
from axolotl.model.adapter_files import adapter_config, adapter_tensors, is_untrained
from axolotl.model.embeddings import resize_embeddings, wanted_rows
from axolotl.model.files import check_base_model, local_folder, read_weight_files
from axolotl.model.load import bars_only_at_a_terminal, load_model_config
from axolotl.model.quantize import scheme_of, unpacking
from axolotl.model.tokenizer import explain_load_failure, load_tokenizer
from axolotl.weights.beside import save_beside
from axolotl.weights.card import CARD, model_card
from axolotl.weights.folder import (
    gigabytes,
    need_space,
    refuse_destination,
    replace,
    written_whole,
)
from axolotl.weights.quantized_base import round_trip, rounding_of_training
from axolotl.weights.skeleton import NotLayerwiseError, Skeleton, why_not_layerwise
from axolotl.weights.stream import Written, main_dtype, refuse_not_finite, write_merged
from axolotl.weights.tensors import DTYPES, not_finite
from axolotl.weights.verify import Check, Models, default_rows, verify_merge

if TYPE_CHECKING:
    from peft import PeftConfig

    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection

Base = Literal["full", "quantized"]
Verify = Literal["auto", "logits", "by layers", "layers", "off"]


@dataclass
class MergeReport:
    """What a merge did."""

    destination: Path
    method: str
    base: str
    dtype: str
    changed: int
    tensors: int
    bytes: int
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("checks", "destination")}
        return {"destination": str(self.destination), **plain, "checks": [c.as_dict() for c in self.checks]}


@dataclass(frozen=True)
class _Job:
    """All that a merge starts from, read and checked."""

    model: ModelSection
    adapter: AdapterSection
    folder: Path
    adapter_dir: Path
    peft_config: PeftConfig
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rows: int
    base: Base
    unpacking: Any = None
    """How fp8 or mxfp4 weights become plain ones; None for weights that are plain already."""

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments for loading the base model."""
        code = {"trust_remote_code": True} if self.model.trust_remote_code else {}
        return code | ({"quantization_config": self.unpacking} if self.unpacking is not None else {})


def merge(
    model: ModelSection,
    adapter: AdapterSection,
    adapter_dir: Path,
    destination: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sample_rows: Sequence[Sequence[int]] = (),
    stop_tokens: Sequence[str] = (),
    base: Base = "full",
    verify: Verify = "auto",
) -> MergeReport:
    """Merges the adapter of a folder into the base model and writes the result to `destination`.

    The weights keep their number type and their division into files. An adapter that was trained on quantised weights
    is merged into the full-precision ones (`base="full"`: nothing is lost by rounding, at the price of a small
    difference from what was trained) or into the values that the quantised ones stood for (`"quantized"`).
    `sample_rows` are token ids of the user's own rows for the comparison afterwards. `tokenizer`: the trained one,
    where the adapter's folder does not hold it.

    Raises ModelError for what does not fit together, for an adapter that changes no tensor, and for a result that
    differs from base and adapter beyond tolerance (it is kept aside); EnvironmentProblem for a disk that is too small.
    """
    started = time.perf_counter()
    bars_only_at_a_terminal()
    job = _prepare(model, adapter, adapter_dir, tokenizer, base)
    refuse_destination(destination, job.folder, adapter_dir)
    if is_untrained(adapter_dir):
        warn(f"The adapter `{adapter_dir}` was never trained: merging it changes nothing.")
    need = bytes_to_write(job.folder, unpacked=job.unpacking is not None)
    need_space(destination, int(need * 1.02) + 2**25, "The merged model")
    note(
        f"Merging `{adapter_dir}` into `{model.base_model}`: {gigabytes(need)} will be written to `{destination}`."
    )
    reason = (
        "`merge_method: legacy`" if adapter.merge_method == "legacy" else why_not_layerwise(job.peft_config)
    )
    if reason is None and not list(job.folder.glob("*.safetensors")):
        reason = "the base model has no safetensors files"
    if job.unpacking is not None:
        reason = "the base model's packed weights are written out as plain ones"
    with written_whole(destination) as part:
        written = None
        if reason is None:
            try:
                written = _layer_by_layer(job, part, check=verify in ("layers", "by layers", "auto"))
            except NotLayerwiseError as error:
                reason = str(error)
                for file in part.iterdir():
                    file.unlink()
        report = MergeReport(destination, "layer by layer", base, "", 0, 0, 0)
        if written is None:
            if base == "quantized":
                raise ModelError(
                    f"The adapter cannot be merged into quantised weights: {reason}.",
                    "Merge it into the full-precision base.",
                )
            note(f"The whole model is merged in memory: {reason}.")
            written, report.method = _in_memory(job, part), "in memory"
        _save_beside(job, part, written, stop_tokens)
        report.changed, report.tensors, report.bytes = written.changed, written.tensors, written.bytes
        report.dtype = written.dtype
        if verify != "off":
            # The skeleton that layers are compared by has no adapter that only merges as a whole.
            way = "whole" if report.method == "in memory" else verify
            models = Models(
                job.folder,
                job.config,
                adapter_dir,
                part,
                job.rows,
                bool(model.trust_remote_code),
                job.unpacking,
            )
            rounding = rounding_of_training(model, adapter)
            report.checks = verify_merge(
                models,
                written,
                sample_rows or default_rows(job.tokenizer),
                way,
                base == "quantized",
                rounding,
            )
        (part / CARD).write_text(
            model_card(model.base_model, adapter_dir, job.peft_config, written.dtype, report.checks),
            encoding="utf-8",
        )
        _refuse_difference(report, part)
    report.seconds = time.perf_counter() - started
    success(
        f"Merged {report.changed} of {report.tensors} tensors ({report.method}, {report.dtype}, "
        f"{gigabytes(report.bytes)}) in {report.seconds:.1f} s: {destination}"
    )
    for check in report.checks:
        note(str(check))
    return report


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def base_folder(model: ModelSection) -> Path:
    """The folder with the base model's files; a model of the Hub is fetched into the cache. Raises ModelError."""
    problems = check_base_model(model)
    if problems:
        raise ModelError(problems)
    folder = local_folder(model.base_model)
    if folder is not None:
        return folder
    try:
        return Path(
            snapshot_download(
                model.base_model,
                revision=model.revision_of_model,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(explain_load_failure(error, "base_model", model.base_model, "weights")) from error


def _prepare(
    model: ModelSection,
    adapter: AdapterSection,
    adapter_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    base: Base,
) -> _Job:
    peft_config = adapter_config(adapter_dir)
    if peft_config.is_prompt_learning:
        raise ModelError(
            f"The adapter `{adapter_dir}` ({_kind(peft_config)}) stands before the prompt and changes no weights: there "
            "is nothing to merge.",
            "Use it unmerged: axolotl inference --lora-model-dir ...",
        )
    adapter_tensors(adapter_dir, allow_pickle=bool(model.trust_remote_code))
    folder = base_folder(model)
    config = load_model_config(model)
    scheme = scheme_of(config)
    plain = unpacking(config, model)
    if scheme is not None and plain is None:
        raise ModelError(
            Problem(
                f"`base_model: {model.base_model}` holds {scheme} weights, into which nothing can be merged.",
                "Name the full-precision model that they were made from: --base-model ...",
                "model",
                ("base_model",),
            )
        )
    tokenizer = tokenizer or load_tokenizer(model, adapter_dir)
    before = int(config.get_text_config().vocab_size)
    rows = wanted_rows(model, len(tokenizer), before, adapter_dir)
    return _Job(model, adapter, folder, adapter_dir, peft_config, config, tokenizer, rows, base, plain)


def bytes_to_write(folder: Path, *, unpacked: bool) -> int:
    """Bytes of a model's weights as a merge writes them; `unpacked`: fp8 and mxfp4 numbers become 16 bits wide."""
    files = list(folder.glob("*.safetensors"))
    if not unpacked or not files:
        return sum(f.stat().st_size for f in files or folder.glob("*.bin"))
    total = 0
    for shard in read_weight_files(folder).shards.values():
        for name, entry in shard.items():
            packed_pairs = entry.dtype == "U8" and not name.endswith("_scales")
            growth = 4 if packed_pairs else 2 if entry.dtype.startswith("F8_E") else 1
            total += growth * entry.nbytes
    return total


def _layer_by_layer(job: _Job, part: Path, check: bool) -> Written:
    files = read_weight_files(job.folder)
    skeleton = Skeleton(job.config, job.peft_config, job.adapter_dir, job.rows)
    transform = round_trip(job.model, job.adapter) if job.base == "quantized" else None
    return write_merged(files, skeleton, part, job.rows, transform=transform, check=check)


def _in_memory(job: _Job, part: Path) -> Written:
    """The way for adapters that PEFT merges only as a whole."""
    base = AutoModelForCausalLM.from_pretrained(job.folder, config=job.config, dtype="auto", **job.options)
    resize_embeddings(base, job.rows)
    adapted = load_adapter(base, job.adapter_dir, allow_pickle=bool(job.model.trust_remote_code))
    changed = sum(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in adapted.modules())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"PEFT cannot merge this adapter: {(str(error).splitlines() or [_kind(job.peft_config)])[0]}",
            "Use it unmerged: axolotl inference --lora-model-dir ...",
        ) from error
    for name, tensor in merged.state_dict().items():
        refuse_not_finite(name, tensor.dtype, not_finite(tensor))
    # In the original format an unpacked model would get the names, though not the numbers, of packed weights.
    own_names = {} if job.unpacking is None else {"save_original_format": False}
    merged.save_pretrained(part, max_shard_size="5GB", **own_names)
    files = read_weight_files(part)
    dtype = str(DTYPES[main_dtype(files)]).removeprefix("torch.")
    tied = bool(merged.config.tie_word_embeddings)
    return Written(changed, sum(map(len, files.shards.values())), files.total_bytes, dtype, tied)


def _save_beside(job: _Job, part: Path, written: Written, stop_tokens: Sequence[str]) -> None:
    config = copy.deepcopy(job.config)
    if job.unpacking is not None:
        del config.quantization_config
    save_beside(
        part, config, job.tokenizer, job.folder, rows=job.rows, tied=written.tied, stop_tokens=stop_tokens
    )


def _refuse_difference(report: MergeReport, part: Path) -> None:
    failed = [c for c in report.checks if c.binding and not c.passed]
    if not failed:
        return
    aside = report.destination.with_name(f"{report.destination.name}-unverified")
    replace(part, aside)
    raise ModelError(
        f"The merged model differs from base and adapter beyond tolerance. {'; '.join(map(str, failed))}.",
        f"It was kept in `{aside}`. Merge in float32, or use the adapter unmerged.",
    )
