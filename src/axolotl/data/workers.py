"""A small pool of processes that keeps the order of its input, holds little in memory, and dies with its parent.

The standard pools leave their processes waiting for ever when the parent is killed, and start new ones in place of those
that the system killed for memory. Here each worker has a pipe of its own: when the parent is gone the pipe ends, and
when a worker is gone the parent says so.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait

from axolotl.config.host import bytes_as_gib, ram
from axolotl.console import note
from axolotl.data.formats import formats
from axolotl.data.work import ChunkResult, ChunkWorker, Job, Row
from axolotl.errors import EnvironmentProblem, Problem, UserError

_FEW_CHUNKS = 6
"""A dataset of no more chunks is prepared without workers: they would take longer to start."""
_WORKER_BYTES = 400 * 2**20
"""Memory of a worker process: libraries, tokenizer, chunks."""
_LOOK_SECONDS = 1.0
"""How often a pool looks at the memory that is left."""
_AHEAD = 2
"""Chunks that a worker has at a time: one in work, one waiting, so that it is never idle."""

Told = tuple[type[UserError], tuple[Problem, ...]]
"""A UserError on its way from a worker."""


class WorkerFailed(Exception):
    """A worker could not do its work for a reason that is no row's fault; holds its traceback."""


def serve(read_end: int, write_end: int) -> None:
    """What a worker process does until its pipe ends. The first message is what `ChunkWorker` is made of."""
    connection, answers = Connection(read_end, writable=False), Connection(write_end, readable=False)
    payload = connection.recv_bytes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    gc.freeze()
    gc.set_threshold(200_000, 50, 1_000)  # a chunk is millions of small objects, and none of them is a cycle
    tasks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def receive() -> None:
        # A thread of its own empties the pipe: parent and worker can never wait for each other with full pipes.
        try:
            while True:
                tasks.put(connection.recv_bytes())
        except (EOFError, OSError):
            tasks.put(None)

    threading.Thread(target=receive, daemon=True).start()
    worker: ChunkWorker | None = None
    while (task := tasks.get()) is not None:
        number, job, rows = pickle.loads(task)
        try:
            if worker is None:
                worker = ChunkWorker(*pickle.loads(payload))
            answer: tuple[int, ChunkResult | Told | str] = (number, worker.process(job, rows))
        except UserError as error:
            answer = (number, (type(error), error.problems))
        except Exception:
            answer = (number, traceback.format_exc())
        try:
            answers.send_bytes(pickle.dumps(answer, protocol=5))
        except OSError:
            break
    os._exit(0)  # the receiving thread and Rust threads need no farewell


_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from axolotl.data.workers import serve
serve(int(sys.argv[2]), int(sys.argv[3]))
"""
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""The processes are the parallelism: one thread each."""


class WorkerPool:
    """`count` processes that all know the same jobs. They never import the program's own main script."""

    def __init__(self, jobs: list[Job], modules: list[str], count: int) -> None:
        payload = pickle.dumps((jobs, modules), protocol=5)
        self._tasks: list[Connection] = []
        self._answers: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._load = dict.fromkeys(range(count), 0)
        """Chunks that each worker has; those that get no more are not in it."""
        self._leaving: dict[int, int] = {}
        """Chunks that workers still have which end after them."""
        self._gone: set[int] = set()
        self._looked = time.monotonic()
        self._sent = 0
        for _ in range(count):
            (their_tasks, tasks), (answers, their_answers) = os.pipe(), os.pipe()
            self._tasks.append(Connection(tasks, readable=False))
            self._answers.append(Connection(answers, writable=False))
            ends = str(their_tasks), str(their_answers)
            command = [sys.executable, "-c", _START, json.dumps([str(p) for p in sys.path]), *ends]
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints, stdout carries results only
                    pass_fds=(their_tasks, their_answers),
                    env={**os.environ, **_ENVIRONMENT},
                )
            )
            os.close(their_tasks)
            os.close(their_answers)
        try:
            for worker in range(count):
                self._send(worker, payload)
        except BaseException:
            self.close()
            raise

    def map(self, chunks: Iterable[tuple[int, list[Row]]]) -> Iterator[ChunkResult]:
        """Processes chunks, each with the number of its job; results come in the order of the chunks.

        Results of an earlier call that was left before its end are thrown away when they come.
        """
        done: dict[int, ChunkResult] = {}
        source = iter(chunks)
        due, more = self._sent, True
        while more or due < self._sent:
            self._look_at_memory()
            # A slow chunk holds back the results after it: no more are let in than this.
            limit = 2 * _AHEAD * len(self._load)
            while more and self._sent - due < limit and min(self._load.values()) < _AHEAD:
                item = next(source, None)
                if item is None:
                    more = False
                    break
                target = min(self._load, key=lambda w: self._load[w])
                self._send(target, pickle.dumps((self._sent, *item), protocol=5))
                self._load[target] += 1
                self._sent += 1
                self._collect(done, due, block=False)
            if due in done:
                yield done.pop(due)
                due += 1
            elif more or due < self._sent:
                self._collect(done, due, block=True)

    def _look_at_memory(self) -> None:
        """Lets a worker go where memory runs short: each that ends gives its own back, and the last one stays."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS or len(self._load) == 1 or self._leaving:
            return
        self._looked = now
        if not (left := ram()).scarce:
            return
        target = max(self._load)
        self._leaving[target] = self._load.pop(target)
        note(
            f"Memory runs short ({bytes_as_gib(left.free)} of the {left.limit}'s {bytes_as_gib(left.total)} are left): "
            f"{'one process prepares' if len(self._load) == 1 else f'{len(self._load)} processes prepare'} data from here "
            "on. [AX1405]"
        )
        if not self._leaving[target]:
            self._end(target)

    def _end(self, target: int) -> None:
        del self._leaving[target]
        self._processes[target].kill()
        self._processes[target].wait()
        self._gone.add(target)

    def _send(self, target: int, message: bytes) -> None:
        try:
            self._tasks[target].send_bytes(message)
        except OSError:
            raise self._dead(target) from None

    def _collect(self, done: dict[int, ChunkResult], due: int, *, block: bool) -> None:
        open_ends = [answers for i, answers in enumerate(self._answers) if i not in self._gone]
        for ready in wait(open_ends, None if block else 0):
            target = self._answers.index(ready)  # type: ignore[arg-type]
            try:
                number, result = pickle.loads(self._answers[target].recv_bytes())
            except (EOFError, OSError):
                raise self._dead(target) from None
            if target in self._leaving:
                self._leaving[target] -= 1
                if not self._leaving[target]:
                    self._end(target)
            else:
                self._load[target] -= 1
            if number < due:
                continue
            if isinstance(result, str):
                raise WorkerFailed(result)
            if isinstance(result, tuple):
                kind, problems = result
                raise kind(problems)
            done[number] = result

    def _dead(self, target: int) -> EnvironmentProblem:
        process = self._processes[target]
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        reason = " (the system does that when memory runs out)" if code == -9 else ""
        return EnvironmentProblem(
            f"a process that prepared data was ended {how}{reason}.",
            "What is finished is kept, and the same command goes on from there; `dataset_num_proc: 1` needs less memory.",
            code="AX1405" if code == -9 else "",
        )

    def close(self) -> None:
        """Ends the workers at once."""
        for process in self._processes:
            process.kill()  # it holds nothing: only the parent writes
        for process in self._processes:
            process.wait()
        for connection in (*self._tasks, *self._answers):
            connection.close()


def worker_count(wanted: int | None) -> int:
    """How many processes prepare data: as asked for, else one per CPU that this program may use, 16 at most, and no
    more than its memory has room for.
    """
    if wanted:
        return wanted
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = ram().free // _WORKER_BYTES or 1
    return max(1, min(cpus, 16, room))


class Engine:
    """Runs chunks through format, renderer and filters: here while there are few, in worker processes beyond that."""

    def __init__(self, jobs: list[Job], workers: int) -> None:
        self.jobs, self.workers = jobs, workers
        self._here: ChunkWorker | None = None
        self._pool: WorkerPool | None = None

    def map(self, job: Job, chunks: Iterable[list[Row]]) -> Iterator[ChunkResult]:
        """Results in the order of the chunks."""
        index = next(i for i, j in enumerate(self.jobs) if j is job)
        rows = iter(chunks)
        first = list(islice(rows, _FEW_CHUNKS + 1))
        if len(first) > _FEW_CHUNKS and self._has_pool(job):
            assert self._pool is not None
            return self._pool.map((index, chunk) for chunk in chain(first, rows))
        here = self._here = self._here or ChunkWorker(self.jobs)
        return (here.process(index, chunk) for chunk in chain(first, rows))

    def stream(self, chunks: Iterable[tuple[int, list[Row]]]) -> Iterator[ChunkResult]:
        """The same for chunks without end, each with the number of its job."""
        if all(self._has_pool(job) for job in self.jobs):
            assert self._pool is not None
            return self._pool.map(chunks)
        here = self._here = self._here or ChunkWorker(self.jobs)
        return (here.process(index, chunk) for index, chunk in chunks)

    def _has_pool(self, job: Job) -> bool:
        if self._pool is None and self.workers > 1:
            modules = {formats.describe(name).module for name in formats.names()}
            plugins = sorted(m for m in modules if m and m.split(".")[0] not in ("axolotl", "__main__"))
            if _own_module(job) != "__main__":
                self._pool = WorkerPool(self.jobs, plugins, self.workers)
        return self._pool is not None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _own_module(job: Job) -> str:
    kind = job.entry.type
    name = kind.partition(":")[0] if isinstance(kind, str) else ""
    return formats.describe(name).module if name in formats else ""
