"""A model without weights, for processes that will hold a part of each: the weights are read, part by part, once the model
has been divided.

Until then every parameter of the base model is a placeholder: it has a shape and a number type, and takes no memory.
Adapters are real from the beginning, and the same in all processes.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.func import functional_call
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from axolotl.console import note
from axolotl.distributed.world import world
from axolotl.errors import ModelError
from axolotl.model.embeddings import embedding_rows, mean_row, wanted_rows
from axolotl.model.files import WeightFiles, local_folder, read_weight_files
from axolotl.model.tokenizer import new_token_ids

if TYPE_CHECKING:
    from axolotl.config.adapter import AdapterSection
    from axolotl.config.model import ModelSection

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of an empty model come from."""

    files: WeightFiles | None
    """Safetensors whose names are the model's; None: the first process holds the whole model, and sends the others
    their parts."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of a parameter → name in the files."""
    seed: int | None = None
    """Weights that start at random: from this number, the same for any number of processes."""


_SOURCES: WeakKeyDictionary[nn.Module, Source] = WeakKeyDictionary()


def source_of(model: nn.Module) -> Source | None:
    """Where the weights of this model still have to come from; None for a model that has them."""
    return _SOURCES.get(model)


def expect_weights(model: nn.Module, source: Source) -> None:
    """Notes that the model's weights come from `source` once it is divided."""
    _SOURCES[model] = source


def why_not_in_parts(model: ModelSection, adapter: AdapterSection, new_tokens: bool) -> str:
    """Why the weights of a model cannot be read part by part, as far as the config tells; empty where they can.

    Something at the start of these runs reads whole weights, or changes them.
    """
    reasons = (
        (adapter.peft_use_dora, "`peft_use_dora` reads whole weights"),
        (
            adapter.peft_init_lora_weights not in _PLAIN_STARTS or adapter.peft is not None,
            "the adapter's start changes weights",
        ),
        (adapter.adapter not in (None, "lora", "qlora"), f"`adapter: {adapter.adapter}` may read weights"),
        (bool(adapter.lora_modules_to_save), "`lora_modules_to_save` copies weights"),
        (
            adapter.adapter is not None and (new_tokens or adapter.peft_trainable_token_indices),
            "rows of the embedding are copied",
        ),
        (bool(adapter.lora_model_dir), "an adapter is continued"),
        (model.fix_untrained_tokens is not None, "`fix_untrained_tokens` changes weights"),
        (bool(model.overrides_of_model_kwargs), "`overrides_of_model_kwargs` is set"),
        (bool(model.trust_remote_code), "the model brings its own code"),
    )
    return next((why for holds, why in reasons if holds), "")


def build_empty(
    cls: Any,
    config: transformers.PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    **more: Any,
) -> PreTrainedModel:
    """The model with parameters on the meta device; its buffers are real."""
    options: dict[str, Any] = {"dtype": dtype, **more}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    with init_empty_weights(include_buffers=False):
        make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        model: PreTrainedModel = make(config, **options)
    # A parameter that moves to the meta device is another one for each name that it has.
    model.tie_weights()
    # As loading leaves it.
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Empty:
    """A model that gets its weights when it has been divided."""

    model: PreTrainedModel
    source: Source

    @property
    def from_first(self) -> bool:
        """The first process loads the whole model, and this one stands for it in the others."""
        return self.source.files is None and self.source.seed is None

    def ready(self, loaded: PreTrainedModel) -> None:
        """Once the vocabulary fits: makes the model such that adapters can be put on it."""
        put_placeholders(loaded)
        expect_weights(loaded, self.source)


def empty_model(
    cls: Any,
    config: transformers.PretrainedConfig,
    model: ModelSection,
    adapter: AdapterSection,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attn_implementation: str | None,
    *,
    adapter_dir: Path | None,
    seed: int | None,
) -> Empty:
    """The model without weights, and where they will come from; every process has to call it.

    Weights that can be read part by part are; where something needs them whole at the start, the first process loads
    them, and that is said.
    """
    more = {"trust_remote_code": True} if model.trust_remote_code else {}
    if model.reinit_weights:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(tokenizer))
    built = build_empty(cls, config, dtype, attn_implementation, **more)
    why = why_not_in_parts(model, adapter, bool(new_token_ids(tokenizer)))
    if not why and model.reinit_weights and starts_plainly(built):
        if world().is_main:
            note(f"The weights start at random (`reinit_weights`): {built.num_parameters():,} parameters.")
        return Empty(built, Source(None, seed=seed or 0))
    files = read_files(fetched(model)) if not why and not model.reinit_weights else None
    keys = keys_in_files(built, files) if files is not None else None
    if files is not None and keys is not None:
        wanted = wanted_rows(model, len(tokenizer), embedding_rows(built), adapter_dir)
        grows = wanted > embedding_rows(built)
        if not (grows and adapter.adapter is None and not model.mean_resizing_embeddings):
            folder = local_folder(model.base_model) or files.folder
            if (folder / "generation_config.json").is_file():
                built.generation_config = GenerationConfig.from_pretrained(str(folder))
            return Empty(built, Source(files, keys))
        why = "new rows of the embedding start at random"
    why = why or (
        "it is of a kind of its own" if model.reinit_weights else "its files hold the weights in another form"
    )
    note(f"The first process loads the whole model into RAM and sends the others their parts: {why}.")
    return Empty(built, Source(None))


def keys_in_files(model: PreTrainedModel, files: WeightFiles) -> dict[str, str] | None:
    """For each parameter of the model its name in the files; None where the files hold it in another form."""
    stored = {key: entry for shard in files.shards.values() for key, entry in shard.items()}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name, parameter in model.named_parameters():
        key = next((k for k in (name, name.removeprefix(prefix), f"{prefix}{name}") if k in stored), None)
        if key is None or len(stored[key].shape) != parameter.ndim:
            return None
        if stored[key].shape[1:] != tuple(parameter.shape[1:]) or stored[key].dtype[0] not in "FB":
            return None
        found[name] = key
    return found


def fetched(model: ModelSection) -> Path:
    """The model's folder, in the local cache for one of the Hub. The first process fetches it, the others wait."""
    folder = local_folder(model.base_model)
    if folder is not None:
        return folder
    patterns = ["*.safetensors", "*.json"]
    for turn in (True, False):
        if (dist.get_rank() == 0) is turn:
            path = snapshot_download(
                model.base_model, revision=model.revision_of_model, allow_patterns=patterns
            )
        dist.barrier()
    return Path(path)


def read_files(folder: Path) -> WeightFiles | None:
    """The safetensors of a folder; None where there are none."""
    try:
        return read_weight_files(folder)
    except ModelError:
        return None


def put_placeholders(model: nn.Module) -> None:
    """Makes parameters on the meta device such that take no memory, but can be copied, moved and looked at."""

    def placeholder(p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.zeros(1, dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad)

    _replace(model, lambda p: p.is_meta, placeholder)


def put_on_meta(model: nn.Module) -> None:
    """Makes placeholders parameters on the meta device again, before the model is divided."""
    _replace(
        model,
        is_placeholder,
        lambda p: nn.Parameter(
            torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad
        ),
    )


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one number that stands for all."""
    return (
        not tensor.is_meta
        and tensor.numel() > 1
        and tensor.untyped_storage().nbytes() <= tensor.element_size()
    )


def _replace(
    model: nn.Module, which: Callable[[nn.Parameter], bool], make: Callable[[nn.Parameter], nn.Parameter]
) -> None:
    made: dict[int, nn.Parameter] = {}
    kept = []  # an id belongs to an object only as long as that lives
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is None or not (id(p) in made or which(p)):
                continue
            if id(p) not in made:
                kept.append(p)
                made[id(p)] = make(p)
            module._parameters[name] = made[id(p)]


def take_out(model: nn.Module) -> dict[str, torch.Tensor]:
    """Takes all tensors out of a whole model, which is on the meta device then. Returns them by name."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    _replace(
        model,
        lambda p: not p.is_meta,
        lambda p: nn.Parameter(
            torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad
        ),
    )
    return found


def fill(
    model: PreTrainedModel, source: Source, device: torch.device, held: dict[str, torch.Tensor] | None
) -> None:
    """Gives a divided model its weights: from the files, or from the tensors that the first process holds.

    `model` is the base model, with its adapter; `device` is where parts belong. Every process has to call it.
    """
    if source.files is not None:
        _assign(model, _from_files(model, source, device))
    elif source.seed is not None:
        _assign(model, _from_seed(model, source.seed, device))
    else:
        _assign(model, _from_first(model, device, held or {}))
        for buffer in model.buffers():
            if not isinstance(buffer, DTensor) and buffer.numel():
                dist.broadcast(buffer, 0)
    _SOURCES.pop(model, None)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise ModelError(
            f"{len(left)} weights of the model were not in its files, such as `{left[0]}`.",
            "The files do not belong together: copy or download the model again.",
        )


def _assign(model: nn.Module, parts: Iterator[tuple[str, nn.Parameter]]) -> None:
    aliases: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    first = {names[0]: names for names in aliases.values()}
    found = {alias: part for name, part in parts for alias in first[name]}
    model.load_state_dict(found, strict=False, assign=True)


def base_name(name: str) -> str:
    """The name of a base weight before PEFT put its layers around it."""
    return name.replace(".base_layer.", ".")


def _from_files(
    model: PreTrainedModel, source: Source, device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    assert source.files is not None
    open_files: dict[Path, Any] = {}
    for name, p in model.named_parameters():
        if not p.is_meta:
            continue
        key = source.keys.get(base_name(name))
        place = source.files.find(key) if key is not None else None
        if place is None or key is None:
            continue
        path, entry = place
        if path not in open_files:
            open_files[path] = safe_open(str(path), framework="pt")
        rows = open_files[path].get_slice(key)
        shape, offset = _place_of(p)
        stored = entry.shape[0]
        ends = [o + n for o, n in zip(offset, shape, strict=True)]
        start, ends[0] = min(offset[0], stored), min(ends[0], stored)
        window = tuple(slice(o, e) for o, e in zip((start, *offset[1:]), ends, strict=True))
        empty = any(w.start >= w.stop for w in window)
        part = torch.empty(0, *shape[1:], dtype=p.dtype) if empty else rows[window].to(p.dtype)
        if part.shape[0] < shape[0]:
            # Rows beyond those of the files start from the mean of all others, as in `resize_embeddings`.
            mean = mean_row(rows[:].to(p.dtype))
            part = torch.cat([part, mean.expand(shape[0] - part.shape[0], *mean.shape)])
        yield name, _as_part(part.to(device), p)


def _place_of(p: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this process's part of a weight, and where in the whole it begins."""
    if not isinstance(p, DTensor):
        return tuple(p.shape), (0,) * p.ndim
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(shape), tuple(offset)


def _for_all(p: DTensor) -> bool:
    """Whether torch can send the parts of a tensor to all processes: an axis that divides again what another has
    divided, it cannot.
    """
    plain = all(type(each) in (Shard, Replicate) for each in p.placements)
    return plain and p.device_mesh.size() == dist.get_world_size()


def _as_part(part: torch.Tensor, p: torch.Tensor) -> nn.Parameter:
    if not isinstance(p, DTensor):
        return nn.Parameter(part.contiguous(), requires_grad=p.requires_grad)
    made = DTensor.from_local(
        part.contiguous(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return nn.Parameter(made, requires_grad=p.requires_grad)


_BLOCK = 1 << 10  # rows that are drawn together


def starts_plainly(model: nn.Module) -> bool:
    """Whether all parameters belong to linear layers, embeddings and norms, whose random start is known."""
    owners = (m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    return all(isinstance(m, nn.Linear | nn.Embedding) or _scales(m) for m in owners)


def _scales(module: nn.Module) -> bool:
    """Whether a module is a norm that multiplies by its weight; others add one to it, and start from zero."""
    if "norm" not in type(module).__name__.lower():
        return False
    nothing = {name: torch.zeros(p.shape) for name, p in module.named_parameters(recurse=False)}
    width = max(p.shape[-1] for p in nothing.values())
    try:
        with torch.no_grad():
            out = functional_call(module, nothing, (torch.arange(1.0, width + 1)[None],))
    except (RuntimeError, TypeError, ValueError):
        return False
    return not bool(out.any())


def _from_seed(model: PreTrainedModel, seed: int, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices from a normal distribution, norms of one, biases of zero, as transformers has them."""
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02) or 0.02)
    for name, p in model.named_parameters():
        if not p.is_meta:
            continue
        shape, offset = _place_of(p)
        if p.ndim < 2:
            value = 0.0 if name.endswith("bias") else 1.0
            yield name, _as_part(torch.full(shape, value, dtype=p.dtype, device=device), p)
            continue
        part = torch.empty(shape, dtype=p.dtype, device=device)
        start, end = offset[0], offset[0] + shape[0]
        for block in range(start // _BLOCK, -(-end // _BLOCK)):
            key = zlib.crc32(f"{seed} {base_name(name)} {block}".encode())
            draw = torch.Generator(device).manual_seed(key)
            size = min(_BLOCK, p.shape[0] - block * _BLOCK)
            drawn = torch.randn(size, *p.shape[1:], generator=draw, device=device) * spread
            first, last = max(start, block * _BLOCK), min(end, block * _BLOCK + size)
            columns = tuple(slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True))
            mine = drawn[(slice(first - block * _BLOCK, last - block * _BLOCK), *columns)]
            part[first - start : last - start] = mine.to(p.dtype)
        yield name, _as_part(part, p)


def _from_first(
    model: PreTrainedModel, device: torch.device, held: dict[str, torch.Tensor]
) -> Iterator[tuple[str, nn.Parameter]]:
    # Through the device that the processes talk over, one tensor at a time.
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    over = torch.device("cpu")
    if meshes and meshes[0].device_type == "cuda":
        over = torch.device("cuda", torch.cuda.current_device())
    first = dist.get_rank() == 0
    for name, p in model.named_parameters():
        whole = held.pop(name).to(over) if first else torch.empty(p.shape, dtype=p.dtype, device=over)
        if isinstance(p, DTensor) and _for_all(p):
            sent = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=0)
            yield name, nn.Parameter(sent.to(device), requires_grad=p.requires_grad)
            continue
        # Its parts repeat among the processes: all see the whole for a moment.
        dist.broadcast(whole, 0)
        shape, offset = _place_of(p)
        window = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        yield name, _as_part(whole[window].to(device, copy=True), p)
