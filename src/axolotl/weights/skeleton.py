"""A model of which only the adapter is real: says which base tensors the adapter changes, and computes them one by one.

The base weights are placeholders of no size on the CPU; PEFT puts the adapter on them as on any model. To merge a
layer, its real weights are put in, PEFT's own `merge` of that layer runs, and the result is taken out. Whatever PEFT
can merge layer by layer is therefore merged exactly as PEFT does it, with memory for one layer.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PretrainedConfig

from axolotl.errors import ModelError
from axolotl.model.adapter_files import check_adapter_fits
from axolotl.model.embeddings import mean_row
from axolotl.model.files import ADAPTER_WEIGHTS
from axolotl.weights.deferred import DeferredAdapter
from axolotl.weights.shell import Shell, is_placeholder
from axolotl.weights.tensors import not_finite

# Kinds whose layers merge on their own; the others go through PEFT with the whole model in memory.
_LAYERWISE = frozenset(
    {"LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "HRA", "VERA", "TRAINABLE_TOKENS", "BOFT"}
)
# Starts of LoRA that also change the base weights, which loading has to repeat.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
NAME = "default"
# Numbers of a block in float32 that stay in a core's cache.
_BLOCK = 2**18
# Of so many blocks of a layer, one is compared with base and adapter.
_CHECKED_BLOCKS = 8


ReadTensor = Callable[[str], torch.Tensor | None]
"""Gives the base model's tensor of that name (float32, its own memory), or None where the base has none."""
Computed = tuple[dict[str, torch.Tensor], float | None]
"""Merged tensors by name and, where it was asked for, how far they are from base and adapter."""


class NotLayerwiseError(Exception):
    """The adapter cannot be merged layer by layer; the text says why."""


@dataclass(frozen=True)
class LowRank:
    """W + B A for half-precision weights, block of rows by block: each sum in float32, rounded once.

    The value that PEFT gives in float32, rounded; blocks that fit into the cache make it many times faster than whole
    matrices. O outputs, I inputs, R rank, N inputs tried.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    @classmethod
    def of(cls, layer: Any) -> LowRank:
        b_OR = layer.lora_B[NAME].weight.detach().float() * layer.scaling[NAME]
        return cls(layer.lora_A[NAME].weight.detach().float(), b_OR)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return max(1, _BLOCK // self.a_RI.shape[1])

    def adder(self, check: bool) -> Callable[[int, torch.Tensor], tuple[float, float, int]]:
        """`add(first_row, block)` changes the block; it returns (difference from base and adapter, largest output, numbers
        that are not finite).

        Every block is looked at for the last; one of eight is compared for the first two, the others give zeros.
        """
        x_NI = torch.randn(4, self.a_RI.shape[1], generator=torch.Generator().manual_seed(0))
        low_NR = x_NI @ self.a_RI.T
        scratch = threading.local()

        @torch.inference_mode()
        def add(row: int, block: torch.Tensor) -> tuple[float, float, int]:
            b = self.b_OR[row : row + block.shape[0]]
            if not hasattr(scratch, "full"):
                scratch.full = torch.empty(self.rows, self.a_RI.shape[1])
            full = scratch.full[: block.shape[0]].copy_(block)
            checked = check and row // self.rows % _CHECKED_BLOCKS == 0
            before = torch.addmm(low_NR @ b.T, x_NI, full.T) if checked else None
            block.copy_(full.addmm_(b, self.a_RI))
            bad = not_finite(block)
            if before is None:
                return 0.0, 0.0, bad
            after = x_NI @ full.copy_(block).T
            return float((after - before).abs().max()), float(before.abs().max()), bad

        return add


@dataclass(frozen=True)
class Change:
    """One module that the adapter changes: the names of its tensors, and how to compute them.

    `compute(read, dtypes, check)` gives the merged tensors in the number types asked for and, where `check` asks for
    it and the module allows it, how far they are from base and adapter: the largest difference of outputs, relative to
    the largest output.
    """

    names: tuple[str, ...]
    compute: Callable[[ReadTensor, Mapping[str, torch.dtype], bool], Computed]
    tied_to_input: bool = False
    """An output head that takes all its changes from the input embedding."""
    low_rank: Callable[[], LowRank] | None = None
    """Gives the whole change, where it is W + B A and nothing else."""


def why_not_layerwise(config: PeftConfig) -> str | None:
    """The reason why an adapter has to be merged with the whole model in memory, or None."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _LAYERWISE:
        return f"{kind} adapters are merged by PEFT as a whole"
    start = getattr(config, "init_lora_weights", None)
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        return f"the start `{start}` also changed the base weights"
    if getattr(config, "layer_replication", None):
        return "the adapter repeats layers of the base model"
    return None


class Skeleton(Shell):
    """Architecture with placeholder weights, and a trained adapter on it. `rows`: of the embeddings."""

    def __init__(self, config: PretrainedConfig, peft_config: PeftConfig, folder: Path, rows: int) -> None:
        super().__init__(config, rows)
        check_adapter_fits(
            self.model, folder, peft_config, allow_pickle=True
        )  # refused before, unless allowed
        peft_config = copy.deepcopy(peft_config)
        peft_config.inference_mode = True
        self.deferred = DeferredAdapter(folder)
        self.deferred.refuse_not_finite()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft_model: Any = get_peft_model(self.model, peft_config, low_cpu_mem_usage=True)
            missing = self.deferred.load_into(self.peft_model)
        if missing:
            raise ModelError(
                f"`{folder / ADAPTER_WEIGHTS}` lacks {len(missing)} of the adapter's weights, such as `{missing[0]}`.",
                "The adapter was not saved to its end: use an earlier checkpoint.",
            )
        self.peft_model.eval()

    def changes(self) -> Iterator[Change]:
        """Everything that the adapter changes. Raises NotLayerwiseError for a module that PEFT merges differently."""
        done: set[str] = set()
        for change in self._changed_modules():
            done.update(change.names)
            yield change
        for name, parameter in self.model.named_parameters():
            plain = name.replace(".base_layer", "")
            if (
                plain in self.shapes
                and plain not in done
                and not is_placeholder(parameter)
                and not parameter.is_meta
            ):
                # the adapter's file holds it whole, as it does the embeddings of a larger vocabulary
                yield self._given({plain: parameter})

    def _changed_modules(self) -> Iterator[Change]:
        inside: list[str] = []
        for name, module in self.model.named_modules():
            if any(name.startswith(f"{parent}.") for parent in inside) and not isinstance(
                module, ParamWrapper
            ):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                inside.append(name)
                yield self._replacement(name, module)
            elif isinstance(module, TrainableTokensWrapper):
                inside.append(name)
                layer = module.token_adapter
                yield self._merge(name, layer, ("weight",), tied=bool(layer.tied_adapter))
            elif isinstance(module, BaseTunerLayer):
                inside.append(name)
                if isinstance(module, ParamWrapper):
                    yield self._merge(name.replace(".base_layer", ""), module, (module.parameter_name,))
                elif isinstance(module.get_base_layer(), nn.MultiheadAttention):
                    raise NotLayerwiseError("PEFT merges torch's own attention modules as a whole")
                else:
                    own = tuple(n for n, _ in module.get_base_layer().named_parameters(recurse=False))
                    yield self._merge(name, module, ("weight",) if is_plain_lora(module) else own)

    def _merge(self, path: str, layer: Any, names: tuple[str, ...], tied: bool = False) -> Change:
        full = tuple(f"{path}.{n}" for n in names)
        checkable = isinstance(layer.get_base_layer(), (nn.Linear, nn.Embedding)) and not isinstance(
            layer, ParamWrapper
        )

        def compute(read: ReadTensor, dtypes: Mapping[str, torch.dtype], check: bool) -> Computed:
            base = layer.get_base_layer()
            before_merge = dict(base._parameters)
            for short, name in zip(names, full, strict=True):
                present = base._parameters[short]
                value = read(name) if is_placeholder(present) else self.deferred.value(present).clone()
                if value is None:
                    raise NotLayerwiseError(f"the base model's files have no tensor `{name}`")
                base._parameters[short] = nn.Parameter(value, requires_grad=False)
            difference = None
            with torch.no_grad(), self.deferred.present(layer):
                inputs = _inputs_for(base) if check and checkable else None
                before = layer(inputs) if inputs is not None else None
                layer.merge(safe_merge=False, adapter_names=[NAME])
                result = {
                    name: base._parameters[short].data.to(dtypes[name])
                    for short, name in zip(names, full, strict=True)
                }
                if before is not None:
                    for short, name in zip(names, full, strict=True):
                        base._parameters[short] = nn.Parameter(result[name].float(), requires_grad=False)
                    after = base(inputs)
                    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
            base._parameters.update(before_merge)
            layer.merged_adapters.clear()
            getattr(layer, "_caches", {}).clear()
            return result, difference

        def low_rank() -> LowRank:
            with self.deferred.present(layer):
                return LowRank.of(layer)

        return Change(full, compute, tied, low_rank if is_plain_lora(layer) else None)

    def _replacement(self, name: str, module: ModulesToSaveWrapper) -> Change:
        own = module.modules_to_save[NAME].state_dict(keep_vars=True)
        return self._given({f"{name}.{k}": v for k, v in own.items()})

    def _given(self, values: Mapping[str, torch.Tensor]) -> Change:
        """A change to tensors that the adapter holds whole."""
        return Change(
            tuple(values),
            lambda _, dtypes, __: (
                {n: self.deferred.value(v).to(dtypes[n]) for n, v in values.items()},
                None,
            ),
        )


def is_plain_lora(layer: Any) -> bool:
    """A linear layer with W + scaling · B A and nothing else: no DoRA or other variant, no bias in the adapter."""
    return (
        type(layer) is LoraLinear
        and NAME in layer.lora_A
        and NAME not in layer.lora_variant
        and not layer.lora_bias[NAME]
        and not layer.fan_in_fan_out
        and is_placeholder(layer.get_base_layer().weight)
    )


def _inputs_for(base: Any) -> torch.Tensor:
    """Reproducible inputs for a linear layer or an embedding."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (8, 16), generator=generator)
    return torch.randn(16, base.in_features, generator=generator)


def resized(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding cut or grown to `rows`; new rows are the mean of the old ones, as in training."""
    if rows <= tensor.shape[0]:
        return tensor[:rows]
    fresh = mean_row(tensor).expand(rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, fresh])
