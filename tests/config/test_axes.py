"""The axes of a run: every process has one place, and sizes that do not fit are told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.config import load_config
from axolotl.config.axes import Axes, axes_of, axes_problems
from axolotl.config.distributed import DistributedSection, FsdpConfig

SIZE = st.integers(1, 4)


@given(st.builds(Axes, SIZE, SIZE, SIZE, SIZE))
def test_every_process_has_one_place(axes: Axes) -> None:
    places = [axes.coordinates(rank) for rank in range(axes.processes)]
    assert len(set(places)) == axes.processes
    assert [axes.rank(*place) for place in places] == list(range(axes.processes))
    shared = Counter(axes.data_rank(rank) for rank in range(axes.processes))
    assert shared == dict.fromkeys(range(axes.data_ranks), axes.context * axes.tensor)


@given(st.builds(Axes, SIZE, SIZE, SIZE, SIZE), st.booleans())
def test_what_is_left_out_takes_the_rest(axes: Axes, all_written: bool) -> None:
    section = DistributedSection(
        fsdp_config=FsdpConfig(),
        dp_replicate_size=axes.replicate,
        dp_shard_size=axes.shard if all_written else -1,
        context_parallel_size=axes.context,
        tensor_parallel_size=axes.tensor,
    )
    assert axes_of(section, axes.processes) == axes
    assert axes_of(section, axes.processes * 5) == (
        None if all_written else Axes(axes.replicate, axes.shard * 5, axes.context, axes.tensor)
    )


@pytest.mark.parametrize(
    ("keys", "processes", "expected"),
    [
        ({}, 4, Axes(4)),
        ({"fsdp_config": {}}, 4, Axes(1, 4)),
        ({"fsdp_config": {}, "dp_shard_size": 2}, 4, Axes(2, 2)),
        ({"fsdp_config": {}, "dp_replicate_size": 2}, 4, Axes(2, 2)),
        ({"fsdp_config": {}, "tensor_parallel_size": 2}, 8, Axes(1, 4, 1, 2)),
        ({"context_parallel_size": 2}, 4, Axes(2, 1, 2, 1)),
        ({"tensor_parallel_size": 3}, 4, None),
        ({"fsdp_config": {}, "dp_shard_size": 3}, 4, None),
    ],
)
def test_sizes(keys: dict[str, Any], processes: int, expected: Axes | None) -> None:
    assert axes_of(DistributedSection.model_validate(keys), processes) == expected


def test_sizes_that_do_not_fit_are_told_with_their_place(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text(
        "base_model: m\ndatasets: [{path: a.jsonl, type: alpaca}]\nmicro_batch_size: 1\nnum_epochs: 1\n"
        "learning_rate: 0.1\nfsdp_version: 2\nfsdp_config: {}\ndp_shard_size: 3\n"
    )
    (problem,) = axes_problems(load_config(file), 4)
    assert "`dp_shard_size: 3` is 3, and there are 4 processes" in problem.message
    assert str(problem.places[0]).endswith("config.yml:8:16")
