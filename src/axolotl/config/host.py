"""What this machine gives a process beside its GPU: RAM, disk, shared memory, open files; containers' limits count."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

_UNLIMITED = 1 << 60
_GIB = 1 << 30


@dataclass(frozen=True)
class Ram:
    """Bytes of memory that this process may use in all, and that are free now."""

    total: int
    free: int
    limit: str
    """What sets the total: `machine` or `container`."""
    swap: int = 0
    """Bytes of swap that are free; the kernel fills them before it ends a process."""

    @property
    def scarce(self) -> bool:
        """Whether so little is left (a tenth, or 1 GiB) that work that can do with less should."""
        return bool(self.total) and self.free < min(_GIB, self.total // 10)

    @property
    def nearly_out(self) -> bool:
        """Whether so little is left (a twentieth, or half a GiB) that the kernel may soon end the process."""
        return bool(self.total) and self.free < min(_GIB // 2, self.total // 20)

    @property
    def gone(self) -> bool:
        """Whether nothing but a last reserve is left (a fiftieth, or a quarter of a GiB), in swap neither."""
        return bool(self.total) and self.free + self.swap < min(_GIB // 4, self.total // 50)


def ram(root: Path = Path("/")) -> Ram:
    """Memory within the limits of the machine and of each control group above this process.

    `root`: where /proc and /sys are looked for. Zeros where the system tells nothing.
    """
    total, free, swap = _machine(root)
    found = Ram(total, free, "machine", swap)
    for limit, used, swap in _groups(root):
        swap = min(swap, found.swap)
        if limit < min(found.total or _UNLIMITED, _UNLIMITED):
            found = Ram(limit, min(found.free or _UNLIMITED, max(0, limit - used)), "container", swap)
        elif limit < _UNLIMITED:
            found = Ram(found.total, min(found.free, max(0, limit - used)), found.limit, swap)
        else:
            found = replace(
                found, swap=swap
            )  # a group may forbid swap and leave memory to the groups below it
    return found


def _machine(root: Path) -> tuple[int, int, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return _by_sysconf()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    free = values.get("MemAvailable", values.get("MemFree", 0))
    return values.get("MemTotal", 0), free, values.get("SwapFree", 0)


def _by_sysconf() -> tuple[int, int, int]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0, 0, 0
    return total, total, 0


def _groups(root: Path) -> list[tuple[int, int, int]]:
    """(limit, memory in use that cannot be given back, swap left) of each control group of this process, both versions."""
    found = []
    for folder, old in _folders(root):
        limit_file, used_file = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        )
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None:
            left = _swap_left_old(folder, limit, used) if old else _swap_left(folder)
            found.append((limit, max(0, used - _given_back(folder, old)), left))
    return found


def _folders(root: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of the control groups of this process that watch over memory, the innermost first; whether the first
    version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # Inside a container its own group is mounted as the root, whatever path the kernel names.
        folders = [base / path.lstrip("/"), *(base / path.lstrip("/")).parents]
        for folder in dict.fromkeys([*(f for f in folders if base in (f, *f.parents)), base]):
            yield folder, bool(controllers)


def _swap_left(folder: Path) -> int:
    """Bytes of swap that a control group may still use; without limit where it does not say."""
    limit, used = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    return _UNLIMITED if limit is None or used is None else max(0, limit - used)


def _swap_left_old(folder: Path, memory: int, in_memory: int) -> int:
    """The same for the first version, whose limit is that of memory and swap together."""
    limit, used = (_number(folder / f"memory.memsw.{name}_in_bytes") for name in ("limit", "usage"))
    if limit is None or used is None or limit >= _UNLIMITED:
        return _UNLIMITED
    return max(0, (limit - used) - max(0, memory - in_memory))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return _UNLIMITED if text == "max" else min(int(text), _UNLIMITED) if text.isdigit() else None


def _given_back(folder: Path, old: bool) -> int:
    """Bytes that the kernel drops before it ends anything: files that were read (weights among them, those in use too)
    and its own lists of files."""
    if old:
        # The first version does not say how much of the kernel's own memory are such lists; mostly it is they.
        lists = _number(folder / "memory.kmem.usage_in_bytes") or 0
        return lists + _sum_of(folder / "memory.stat", ("total_inactive_file", "total_active_file"))
    return _sum_of(folder / "memory.stat", ("inactive_file", "active_file", "slab_reclaimable"))


def _sum_of(file: Path, keys: tuple[str, ...]) -> int:
    found = 0
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in keys and value.isdigit():
                found += int(value)
    except OSError:
        pass
    return found


def memory_stalls(root: Path = Path("/")) -> float | None:
    """Seconds in which anything in this process's control group (else in the machine) has waited for memory, since it
    began; None where the kernel does not count them."""
    for file in (
        *(f / "memory.pressure" for f, old in _folders(root) if not old),
        root / "proc/pressure/memory",
    ):
        try:
            found = re.search(r"^some .*total=(\d+)", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found is not None:
            return int(found[1]) / 1e6
    return None


def bytes_as_gib(count: int) -> str:
    """For people."""
    return f"{count / 2**30:.1f} GiB"


def oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel has ended a process of this container, or of this machine, for want of memory; 0 where it
    does not say."""
    # The machine's own count is the last resort: it holds what has been ended in other containers too.
    for file in ("sys/fs/cgroup/memory.events", "sys/fs/cgroup/memory/memory.oom_control", "proc/vmstat"):
        try:
            for line in (root / file).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return 0


def disk_free(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    for there in (folder, *folder.absolute().parents):
        if there.exists():
            return shutil.disk_usage(there).free
    return 0


def shared_memory_free() -> int | None:
    """Bytes free in /dev/shm, through which loader processes and NCCL pass tensors; None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def open_files() -> tuple[int, int] | None:
    """(soft, hard) limit of open files; None where the platform has none."""
    return None if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)
