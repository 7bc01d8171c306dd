"""Preparation: the same rows however it ran, nothing half-finished, every bad row named."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from axolotl.config.host import Ram
from axolotl.data import prepare as preparing_module
from axolotl.data import shards, workers
from axolotl.data.prepare import prepare
from axolotl.data.prepared import Prepared
from axolotl.errors import DataError, EnvironmentProblem, Place
from preparing import alpaca, content, in_child, llama3, section, write_rows


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, shards of 32: a hundred rows behave like a hundred thousand."""
    monkeypatch.setattr(preparing_module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llama3()


def finished(folder: Path) -> list[Path]:
    return list(folder.rglob("state.json"))


def test_layout_and_counts(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*alpaca(20), {"instruction": "Say nothing", "output": ""}, *alpaca(1, words=400)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared = prepare(section(path, folder=tmp_path / "p"), tokenizer)
    dataset = load_from_disk(str(prepared.train))
    assert dataset.column_names == ["input_ids", "attention_mask", "labels"]
    assert len(dataset) == 20
    assert not prepared.reused
    counts = prepared.summaries[0].counts
    assert (counts.read, counts.rows) == (22, 20)
    assert counts.dropped == {"nothing in it is trained": 1, "longer than sequence_len": 1}
    ledger = pq.read_table(prepared.ledger).to_pylist()
    assert [line["row"] for line in ledger] == list(range(1, 23))
    assert [line["first_row"] for line in ledger] == [*range(20), -1, -1]
    assert {line["file"] for line in ledger} == {str(path)}
    index = prepared.row_index()
    assert index["length"].tolist() == [len(ids) for ids in dataset["input_ids"]]
    assert index["trained"].tolist() == [sum(t != -100 for t in labels) for labels in dataset["labels"]]
    assert json.loads(prepared.summary.read_text())["datasets"][0]["counts"]["read"] == 22
    assert not [p for p in (tmp_path / "p").rglob("*") if p.name.startswith(("part-", "lock", "seen"))]


@pytest.mark.usefixtures("small_shards")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, tokenizer: Any) -> None:
    first = write_rows(tmp_path / "a.jsonl", alpaca(150))
    second = write_rows(tmp_path / "b.jsonl", alpaca(70, words=9))
    found = []
    for count in (1, 2, 3):
        data = section(first, second, folder=tmp_path / str(count), dataset_exact_deduplication=True)
        prepared = prepare(data, tokenizer, workers=count)
        assert len(list(prepared.train.glob("*.arrow"))) == 5 + 3
        found.append(content(prepared.root))
    assert found[0] == found[1] == found[2]


def test_a_worker_is_light() -> None:
    code = "import sys, axolotl.data.workers; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "datasets", "pandas"} & set(loaded)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("moment", ["first", "fifth", "torn", "manifest", "renaming", "revealing"])
def test_a_killed_preparation_goes_on(
    tmp_path: Path, tokenizer: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at any moment: nothing looks finished, and the next run ends with the same bytes as an undisturbed one."""
    paths = [write_rows(tmp_path / f"{n}.jsonl", alpaca(100, words=n)) for n in (2, 3)]
    test_set = [{"path": str(paths[0]), "type": "alpaca"}]
    options: dict[str, Any] = {"test_datasets": test_set, "dataset_exact_deduplication": True}
    data = section(*paths, folder=tmp_path / "p", **options)
    undisturbed = prepare(section(*paths, folder=tmp_path / "q", **options), tokenizer, workers=1)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying() -> None:
        closed = 0
        close, add = shards.PartWriter.close, shards.PartWriter.add

        def closing(self: Any, last: bool) -> Any:
            nonlocal closed
            closed += 1
            result = close(self, last)
            if closed == {"first": 1, "fifth": 5}.get(moment):
                die()
            return result

        def adding(self: Any, rows: Any) -> None:
            add(self, rows)
            if moment == "torn" and closed == 2:
                for file in self._files:
                    file.flush()
                die()

        monkeypatch.setattr(shards.PartWriter, "close", closing)
        monkeypatch.setattr(shards.PartWriter, "add", adding)
        for name, when in (
            ("_write_manifest", "manifest"),
            ("reveal", "renaming"),
            ("sync_folder", "revealing"),
        ):
            if moment == when:
                monkeypatch.setattr(preparing_module, name, die)
        prepare(data, tokenizer, workers=1)

    assert os.WTERMSIG(in_child(dying)) == signal.SIGKILL
    assert not [state for state in finished(tmp_path / "p") if moment != "revealing"]
    read = []
    batches = preparing_module.chunks
    monkeypatch.setattr(
        preparing_module, "chunks", lambda source, start: read.append(start) or batches(source, start)
    )
    prepared = prepare(data, tokenizer, workers=1)
    assert content(prepared.root) == content(undisturbed.root)
    assert (
        read
        == {
            "first": [32, 0, 0],
            "fifth": [32, 0],  # four shards of the first dataset, one of the second
            "torn": [64, 0, 0],
            "manifest": [],
            "renaming": [],
            "revealing": [],
        }[moment]
    )
    assert sorted(p.name for p in prepared.root.parent.iterdir()) == [prepared.fingerprint]


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_is_told_and_what_is_finished_is_kept(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(200))
    data = section(path, folder=tmp_path / "p")
    add, calls = shards.PartWriter.add, iter(range(100))

    def full(self: Any, rows: Any) -> None:
        add(self, rows)
        if next(calls) == 14:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.PartWriter, "add", full)
        with pytest.raises(EnvironmentProblem, match="no space is left"):
            prepare(data, tokenizer, workers=1)
    assert not finished(tmp_path)
    assert len(list(tmp_path.rglob("part-*.arrow"))) == 3, "the torn shard is gone"
    prepared = prepare(data, tokenizer, workers=1)
    assert content(prepared.root) == content(
        prepare(section(path, folder=tmp_path / "q"), tokenizer, workers=1).root
    )


def test_a_real_limit_on_file_size_is_told(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(2000))
    data = section(path, folder=tmp_path / "p")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(EnvironmentProblem, match="no space is left"):
            prepare(data, tokenizer, workers=1)

    assert in_child(limited) == 0
    assert not finished(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(3))
    with pytest.raises(EnvironmentProblem, match="cannot be made"):
        prepare(section(path, folder=Path("/proc/nothing/here")), tokenizer)


def test_two_processes_at_once_prepare_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(200))
    data = section(path, folder=tmp_path / "p")
    log = tmp_path / "log"
    real = preparing_module.prepare_tasks

    def slow(*args: Any) -> Any:
        with log.open("a") as file:
            file.write("prepared\n")
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(preparing_module, "prepare_tasks", slow)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if len(prepare(data, tokenizer, workers=1).train_dataset()) == 200 else 2
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert log.read_text() == "prepared\n"


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(40_000))
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from pathlib import Path\nfrom preparing import llama3, section\nfrom axolotl.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare(section(Path({str(path)!r}), folder=Path({str(tmp_path / 'p')!r})), llama3(), workers=2)\n"
    )
    parent = psutil.Process(subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL).pid)
    children: list[psutil.Process] = []
    for _ in _until(60):
        children = parent.children(recursive=True)
        if list(tmp_path.rglob("part-*.json")) and len(children) >= 2:
            break
    parent.kill()
    parent.wait(10)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) >= 2
    assert not alive


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)


def test_a_killed_worker_is_told(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(8000))
    start = workers.WorkerPool.__init__

    def and_kill(self: Any, *args: Any) -> None:
        start(self, *args)
        self._processes[0].kill()

    monkeypatch.setattr(workers.WorkerPool, "__init__", and_kill)
    with pytest.raises(EnvironmentProblem, match=r"signal 9.*memory"):
        prepare(section(path, folder=tmp_path / "p"), tokenizer, workers=2)


@pytest.mark.usefixtures("small_shards")
def test_processes_end_where_memory_runs_short_and_the_result_stays(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(300))
    ended: list[int | None] = []
    close = workers.WorkerPool.close

    def looked_at(pool: workers.WorkerPool) -> None:
        ended.extend(process.poll() for process in pool._processes)
        close(pool)

    monkeypatch.setattr(workers.WorkerPool, "close", looked_at)
    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(workers, "ram", lambda: Ram(10 << 30, 1 << 26, "container"))
    few = prepare(section(path, folder=tmp_path / "few"), tokenizer, workers=3)
    assert ended == [None, -signal.SIGKILL, -signal.SIGKILL]
    told = capfd.readouterr().err
    assert "2 processes prepare data from here on" in told
    assert "0.1 GiB of the container's 10.0 GiB are left" in told
    one = prepare(section(path, folder=tmp_path / "one"), tokenizer, workers=1)
    assert content(few.root) == content(one.root)


def test_bad_rows_are_named_and_nothing_is_left(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = alpaca(30)
    rows[3]["instruction"] = None
    rows[7]["output"] = {"a": 1}
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(section(path, folder=tmp_path / "p"), tokenizer)
    assert [p.places for p in caught.value.problems] == [(Place(str(path), 4),), (Place(str(path), 8),)]
    assert not list((tmp_path / "p").rglob("*"))


@pytest.mark.parametrize("count", [1, 2])
def test_the_mistakes_of_all_datasets_come_together(
    tmp_path: Path, tokenizer: Any, small_shards: None, count: int
) -> None:
    """A file that is damaged far from its beginning, bad rows in another, and in a test set, with and without workers."""
    damaged = write_rows(tmp_path / "a.jsonl", alpaca(1200))
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([*lines[:1100], '{"a": oops}', *lines[1100:]]))
    bad = {"instruction": "Hi", "output": None}
    other = write_rows(tmp_path / "b.jsonl", [*alpaca(100), bad, *alpaca(100)])
    test = write_rows(tmp_path / "t.jsonl", [*alpaca(5), bad])
    data = section(damaged, other, folder=tmp_path / "p")
    held_out = section(test, folder=tmp_path / "p").datasets
    with pytest.raises(DataError) as caught:
        prepare(data.model_copy(update={"test_datasets": held_out}), tokenizer, workers=count)
    found = [(Path(p.places[0].file).name, p.places[0].line) for p in caught.value.problems]
    assert found == [("a.jsonl", 1101), ("b.jsonl", 101), ("t.jsonl", 6)]
    assert not list((tmp_path / "p").iterdir())


def test_beside_a_dataset_that_is_not_there_the_first_rows_of_the_others_are_looked_at(
    tmp_path: Path, tokenizer: Any
) -> None:
    bad = {"instruction": "Hi", "output": None}
    path = write_rows(tmp_path / "a.jsonl", [*alpaca(5), bad])
    with pytest.raises(DataError) as caught:
        prepare(section(tmp_path / "gone.jsonl", path, folder=tmp_path / "p"), tokenizer)
    gone, row = caught.value.problems
    assert "gone.jsonl` does not exist" in gone.message
    assert row.places == (Place(str(path), 6),)


def test_no_more_than_twenty_bad_rows_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": None, "output": "x"}] * 5000)
    with pytest.raises(DataError) as caught:
        prepare(section(path, folder=tmp_path / "p"), tokenizer)
    assert len(caught.value.problems) == 21
    assert "stopped" in caught.value.problems[-1].message


def test_too_long_rows_are_named_when_that_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*alpaca(3), *alpaca(1, words=400)])
    data = section(path, folder=tmp_path / "p", excess_length_strategy="raise")
    with pytest.raises(DataError, match=r"a\.jsonl:4: row 4: longer than `sequence_len`"):
        prepare(data, tokenizer)


def test_a_format_that_raises_is_told_with_the_row(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "our_format.py"
    module.write_text(
        "from axolotl.data.types import Completion\n"
        "def load(row):\n    return Completion(row['output'] + row['nowhere'] if '7' in row['output'] else row['output'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_rows(tmp_path / "a.jsonl", alpaca(6))
    data = section(folder=tmp_path / "p", datasets=[{"path": str(path), "type": "our_format.load"}])
    with pytest.raises(DataError, match=r"our_format.*KeyError: 'nowhere'"):
        prepare(data, tokenizer)


def test_a_dataset_that_trains_nothing_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    good = write_rows(tmp_path / "good.jsonl", alpaca(5))
    empty = write_rows(tmp_path / "empty.jsonl", [{"instruction": "Hi", "output": ""}] * 4)
    with pytest.raises(DataError, match=r"no row of .*empty\.jsonl.* is left: 4 nothing in it is trained"):
        prepare(section(good, empty, folder=tmp_path / "p"), tokenizer)
    assert not finished(tmp_path)


def test_rows_that_are_all_too_long_are_told_with_their_lengths(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(9))
    lengths = sorted(
        len(row["input_ids"]) for row in prepare(section(path, folder=tmp_path / "p"), tokenizer).saved()
    )
    with pytest.raises(DataError) as told:
        prepare(section(path, folder=tmp_path / "q", sequence_len=16), tokenizer)
    (problem,) = told.value.problems
    assert f"They have {lengths[0]} to {lengths[-1]} tokens, {lengths[4]} in the middle" in problem.message
    assert f"`sequence_len: {lengths[-1]}` keeps all of them, {lengths[4]} half" in problem.remedy
    enough = section(path, folder=tmp_path / "q", sequence_len=lengths[-1])
    assert prepare(enough, tokenizer).summaries[0].counts.rows == 9


def test_too_many_dropped_rows_fail_the_run(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*alpaca(8), *[{"instruction": "Hi", "output": ""}] * 2])
    data = section(path, folder=tmp_path / "p")
    strict = data.model_copy(update={"max_dropped_fraction": 0.1})
    with pytest.raises(DataError, match=r"2 of 10 rows .* \(20\.0%: 2 nothing in it is trained\)"):
        prepare(strict, tokenizer)
    assert not finished(tmp_path)
    lenient = data.model_copy(update={"max_dropped_fraction": 0.2})
    assert len(prepare(lenient, tokenizer).train_dataset()) == 8
    with pytest.raises(DataError, match="max_dropped_fraction"):
        prepare(strict, tokenizer)


def test_holding_out_every_row_is_told_by_the_preparation(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(10))
    with pytest.raises(DataError, match="hold out 10 of 10 rows"):
        prepare(section(path, folder=tmp_path / "p", val_set_size=10), tokenizer)


def test_a_template_that_cannot_be_read_is_told_at_its_dataset(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    entry = {
        "path": str(path),
        "type": "chat_template",
        "chat_template": "jinja",
        "chat_template_jinja": "{{ x }",
    }
    with pytest.raises(DataError, match="not valid Jinja") as raised:
        prepare(section(folder=tmp_path / "p", datasets=[entry]), tokenizer, places=lambda k: Place(k, 7))
    assert raised.value.problems[0].places == (Place("datasets[0]", 7),)


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(20))
    real = preparing_module._prepare_set

    def meanwhile(*args: Any) -> None:
        real(*args)
        write_rows(path, alpaca(21))

    monkeypatch.setattr(preparing_module, "_prepare_set", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(section(path, folder=tmp_path / "p"), tokenizer)
    assert not finished(tmp_path)


def test_few_results_wait_in_memory(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading never runs far ahead of writing, however many rows there are."""
    monkeypatch.setattr(preparing_module, "CHUNK_ROWS", 8)
    path = write_rows(tmp_path / "a.jsonl", alpaca(800))
    ahead = 0
    given = taken = 0
    batches, add = preparing_module.chunks, shards.PartWriter.add

    def counted(source: Any, start: int) -> Iterator[Any]:
        nonlocal given
        for batch in batches(source, start):
            given += 1
            yield batch

    def adding(self: Any, rows: Any) -> None:
        nonlocal taken, ahead
        ahead = max(ahead, given - taken)
        taken += 1
        add(self, rows)

    monkeypatch.setattr(preparing_module, "chunks", counted)
    monkeypatch.setattr(shards.PartWriter, "add", adding)
    prepare(section(path, folder=tmp_path / "p"), tokenizer, workers=2)
    assert taken == 100
    assert ahead <= 12


def test_completions_are_split_and_the_ledger_says_so(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "word " * 300}, {"text": "short"}])
    data = section(
        folder=tmp_path / "p", datasets=[{"path": str(path), "type": "completion"}], sequence_len=64
    )
    prepared = prepare(data, tokenizer)
    first, second = pq.read_table(prepared.ledger).to_pylist()
    assert (first["outcome"], second["outcome"]) == ("split", "kept")
    assert first["rows"] == len(prepared.saved()) - 1 == -(-first["tokens"] // 64)
    assert second["first_row"] == first["rows"]


def test_test_sets_have_their_own_folders_and_length(tmp_path: Path, tokenizer: Any) -> None:
    train = write_rows(tmp_path / "a.jsonl", alpaca(10))
    test = write_rows(tmp_path / "b.jsonl", alpaca(6, words=60))
    other = write_rows(tmp_path / "c.jsonl", alpaca(4))
    entries = [{"path": str(p), "type": "alpaca"} for p in (test, other)]
    data = section(
        train, folder=tmp_path / "p", sequence_len=100, eval_sequence_len=500, test_datasets=entries
    )
    prepared = prepare(data, tokenizer)
    assert [len(load_from_disk(str(p))) for p in prepared.tests] == [6, 4]
    evaluation = prepared.eval_dataset()
    assert evaluation is not None
    assert len(evaluation) == 10
    assert prepared.eval_lengths().tolist() == [len(ids) for ids in evaluation["input_ids"]]
    assert prepared.eval_lengths().max() > 100


def test_shuffled_rows_and_their_lengths_agree(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", alpaca(40))
    prepared: Prepared = prepare(section(path, folder=tmp_path / "p", val_set_size=0.2), tokenizer, seed=5)
    dataset = prepared.train_dataset()
    assert len(dataset) == 32
    assert prepared.train_lengths().tolist() == [len(ids) for ids in dataset["input_ids"]]
    assert dataset["input_ids"][:] != prepared.saved()["input_ids"][:32]
    held_out = prepared.eval_dataset()
    assert held_out is not None
    everything = [*map(tuple, dataset["input_ids"]), *map(tuple, held_out["input_ids"])]
    assert sorted(everything) == sorted(map(tuple, prepared.saved()["input_ids"]))
