"""Writes merged weights shard by shard, with memory for about one tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch

from axolotl.console import note
from axolotl.errors import ModelError
from axolotl.model.files import WEIGHTS_INDEX, TensorEntry, WeightFiles
from axolotl.weights.reread import ShardReader
from axolotl.weights.shell import Shell
from axolotl.weights.skeleton import Change, Computed, NotLayerwiseError, ReadTensor, Skeleton, resized
from axolotl.weights.tensors import DTYPES, ShardWriter, Spec, larger, make_index, not_finite, read_tensor

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Written:
    """What was written: tensors changed by the adapter and in all, bytes, main number type."""

    changed: int
    tensors: int
    bytes: int
    dtype: str
    tied: bool
    worst_layer: tuple[str, float] | None = None
    """The module whose output merging moved most, relative to its largest output, where that was computed."""
    reread: Callable[[], object] | None = field(default=None, compare=False, repr=False)
    """Reads every tensor back and holds it against base and adapter. Raises ModelError for one that is another."""


class Source:
    """The base model's files under the names that the model in memory has."""

    def __init__(self, files: WeightFiles, skeleton: Shell, rows: int, transform: Transform | None) -> None:
        self.files, self.skeleton, self.rows, self.transform = files, skeleton, rows, transform
        prefix = f"{skeleton.model.base_model_prefix}."
        self.key_of: dict[str, str] = {}
        for shard in files.shards.values():
            for key in shard:
                names = (key, f"{prefix}{key}", key.removeprefix(prefix))
                self.key_of[next((n for n in names if n in skeleton.shapes), key)] = key
        self.embeddings = {skeleton.input_name, skeleton.output_name}

    def place(self, name: str) -> tuple[Path, TensorEntry] | None:
        """File and entry of a tensor of the model; a tied head that is not stored is the input embedding."""
        if name not in self.key_of and self.skeleton.tied and name == self.skeleton.output_name:
            name = self.skeleton.input_name
        return self.files.find(self.key_of[name]) if name in self.key_of else None

    def as_stored(self, name: str) -> bool:
        """Whether the tensor is merged into just as it stands in the file, in half precision."""
        found = self.place(name)
        half = found is not None and found[1].dtype in ("BF16", "F16")
        return half and self.transform is None and name not in self.embeddings

    def read(self, name: str) -> torch.Tensor | None:
        """The tensor in float32 and memory of its own, embeddings with the rows wanted."""
        found = self.place(name)
        if found is None:
            return None
        path, entry = found
        tensor = read_tensor(path, name, entry)
        if not tensor.is_floating_point():
            raise NotLayerwiseError(f"`{name}` holds {entry.dtype} numbers")
        tensor = tensor.float()
        if name in self.embeddings and tensor.shape[0] != self.rows:
            tensor = resized(tensor, self.rows)
        if self.transform is not None and name in self.skeleton.linear_names:
            tensor = self.transform(tensor)
        return tensor

    def unchanged(self, name: str) -> Change:
        """A tensor that the adapter leaves alone, but that is written anew because of its size or its rounding."""

        def compute(read: ReadTensor, dtypes: Mapping[str, torch.dtype], _: bool) -> Computed:
            value = read(name)
            assert value is not None
            return {name: value.to(dtypes[name])}, None

        return Change((name,), compute)


def write_merged(
    files: WeightFiles,
    skeleton: Skeleton,
    destination: Path,
    rows: int,
    *,
    transform: Transform | None = None,
    check: bool = False,
) -> Written:
    """Writes the merged weights to `destination`, in the same files as the base model.

    `transform` is applied to every linear layer of the base first. `check`: compare each merged layer with base layer
    and adapter. Raises ModelError where the adapter changes no tensor or makes a number infinite or NaN,
    NotLayerwiseError where it has to be merged as a whole.
    """
    source = Source(files, skeleton, rows, transform)
    changes = {name: change for change in skeleton.changes() for name in change.names}
    if not changes:
        raise ModelError(
            "The adapter changes no tensor of the base model.", "Check that they belong together."
        )
    by_adapter = len(changes)
    tied = _settle_tied_head(skeleton, source, changes)
    for name in source.key_of:
        resize = name in source.embeddings and source.place(name)[1].shape[0] != rows  # type: ignore[index]
        round_again = transform is not None and name in skeleton.linear_names
        if name not in changes and (resize or round_again):
            changes[name] = source.unchanged(name)
    written = _write(source, changes, destination, tied, by_adapter, check)
    return replace(
        written,
        reread=lambda: _write(source, changes, destination, tied, by_adapter, False, ShardReader),
    )


def _settle_tied_head(skeleton: Skeleton, source: Source, changes: dict[str, Change]) -> bool:
    """Decides whether input embedding and output head stay one tensor; adapts `changes`. True: they do, or never were
    asked to."""
    first, head = skeleton.input_name, skeleton.output_name
    if not skeleton.tied or head is None:
        return False
    both = first in changes and head in changes
    if head in changes and (
        changes[head].tied_to_input or (both and _same(changes[first], changes[head], source))
    ):
        del changes[head]
    elif first in changes or head in changes:
        note(
            "Input and output embedding were one tensor; the adapter changed them differently, so both are written."
        )
        for name in (first, head):
            changes.setdefault(name, source.unchanged(name))
        return False
    if head in source.key_of and first in changes:
        shared = changes[first]

        def like_input(read: ReadTensor, dtypes: Mapping[str, torch.dtype], _: bool) -> Computed:
            return {
                head: shared.compute(read, dict.fromkeys(shared.names, dtypes[head]), False)[0][first]
            }, None

        changes[head] = Change((head,), like_input)
    return True


def _same(first: Change, head: Change, source: Source) -> bool:
    """Whether two changes give the same tensor, as modules that were trained tied do."""
    names = {**dict.fromkeys(first.names, torch.float32), **dict.fromkeys(head.names, torch.float32)}
    a, b = first.compute(source.read, names, False)[0], head.compute(source.read, names, False)[0]
    return torch.equal(next(iter(a.values())), next(iter(b.values())))


def _write(
    source: Source,
    changes: dict[str, Change],
    destination: Path,
    tied: bool,
    by_adapter: int,
    check: bool,
    through: type[ShardWriter] | type[ShardReader] = ShardWriter,
) -> Written:
    """Computes all tensors, and writes them; or, through a `ShardReader`, compares them with what was written."""
    files, skeleton = source.files, source.skeleton
    name_of = {key: name for name, key in source.key_of.items()}
    extra = [n for n in changes if n not in source.key_of]
    lost = [n for n in extra if n not in skeleton.shapes]
    if lost:
        raise NotLayerwiseError(f"the base model's files have no tensor `{lost[0]}`")
    main = main_dtype(files)
    ready: dict[str, torch.Tensor] = {}
    worst: tuple[str, float] | None = None
    layout: dict[str, list[str]] = {}
    total = parameters = 0

    for shard in files.shards:
        planned = {
            key: Spec(entry.dtype, skeleton.shapes.get(name_of[key], entry.shape))
            for key, entry in sorted(files.shards[shard].items(), key=lambda item: item[1].start)
        }
        if shard == list(files.shards)[-1]:
            planned |= {n: Spec(_planned_dtype(n, source, main), skeleton.shapes[n]) for n in extra}
        layout[shard] = list(planned)
        found_later: dict[str, Callable[[], list[tuple[float, float, int]]]] = {}
        with through(destination / shard, planned, files.metadata[shard]) as writer:
            for key, spec in planned.items():
                name = name_of.get(key, key)
                total += spec.nbytes
                parameters += math.prod(spec.shape)
                if name not in changes:
                    writer.copy(key, files.folder / shard, files.shards[shard][key])
                    continue
                change = changes[name]
                if change.low_rank is not None and source.as_stored(name):
                    low_rank = change.low_rank()
                    found_later[name] = writer.rewrite(
                        key,
                        files.folder / shard,
                        files.shards[shard][key],
                        low_rank.adder(check),
                        low_rank.rows,
                    )
                    continue
                if name not in ready:
                    dtypes = {n: DTYPES[_planned_dtype(n, source, main)] for n in change.names}
                    values, moved = change.compute(source.read, dtypes, check)
                    ready.update({n: v for n, v in values.items() if changes.get(n) is change})
                    worst = _worse(worst, name, moved)
                merged = ready.pop(name)
                refuse_not_finite(name, merged.dtype, not_finite(merged))
                writer.write(key, merged)
        for name, found in found_later.items():
            differences, outputs, bad = zip(*found(), strict=True)
            refuse_not_finite(name, DTYPES[planned[source.key_of[name]].dtype], sum(bad))
            if check:
                worst = _worse(
                    worst, name, reduce(larger, differences) / larger(1e-12, reduce(larger, outputs))
                )
    if files.index is not None and through is ShardWriter:
        index = make_index(layout, total, parameters)
        (destination / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    dtype = str(DTYPES[main]).removeprefix("torch.")
    return Written(by_adapter, sum(map(len, layout.values())), total, dtype, tied, worst)


def _worse(worst: tuple[str, float] | None, name: str, difference: float | None) -> tuple[str, float] | None:
    if difference is None or (worst is not None and (math.isnan(worst[1]) or worst[1] >= difference)):
        return worst
    return name, difference


def refuse_not_finite(name: str, dtype: torch.dtype, count: int) -> None:
    """Raises ModelError where merging made `count` numbers of a tensor infinite or NaN."""
    if count:
        raise ModelError(
            f"The merged `{name}` would hold {count:,} numbers that are infinite or NaN in "
            f"{str(dtype).removeprefix('torch.')}.",
            "The adapter's numbers are too large for it, as after a run that diverged: merge an earlier checkpoint"
            + (", or into the base model in bfloat16." if dtype == torch.float16 else "."),
        )


def _planned_dtype(name: str, source: Source, main: str) -> str:
    found = source.place(name)
    return found[1].dtype if found else main


def main_dtype(files: WeightFiles) -> str:
    """The number type that most bytes have, by safetensors' name."""
    sizes: dict[str, int] = {}
    for shard in files.shards.values():
        for entry in shard.values():
            if entry.dtype in DTYPES and DTYPES[entry.dtype].is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=sizes.__getitem__)
