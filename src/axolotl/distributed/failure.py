"""Which of several processes tells what went wrong: the first that fails, once, with its rank. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from axolotl import console
from axolotl.errors import AxolotlError, UserError

LAUNCH = "AXOLOTL_LAUNCH"
"""Set for the processes that `axolotl` starts itself: a folder in which the first that fails leaves its word."""
OPTIONS = "AXOLOTL_LAUNCH_OPTIONS"
"""The options of `axolotl train` that say how the processes are started, as a JSON list, for those processes."""
PEER_WAIT = 3.0
"""Seconds that a process which only lost another one gives that one to speak first."""
EXIT_WAIT = 10.0
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "failed to recv",
    "NCCL error",
    "NCCL watchdog",
    "remote process exited",
    "Connection refused",
)


def among_several() -> bool:
    """Whether this process is one of several that a launcher started."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def launch_options() -> list[str]:
    """How this run was told to start its processes, as words that end a command: `["--num-processes", "2"]`."""
    try:
        found = json.loads(os.environ.get(OPTIONS, "[]"))
    except ValueError:
        return []
    return [str(word) for word in found] if isinstance(found, list) else []


def started_by_us() -> bool:
    """Whether `axolotl` itself started this process as one of several."""
    return bool(os.environ.get(LAUNCH))


def launch_name() -> str:
    """What is the same for all processes of a launch, and for those that are started again after a failure."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return name if name not in ("", "none") else _parent()


def _parent() -> str:
    parent = os.getppid()
    try:
        # A number of a process is used again; together with its time of birth it is not.
        born = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        born = "0"
    return f"{parent}-{born}"


def word_file() -> Path:
    """The file that the first process to fail makes: one for each launch, restart and machine."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if started_by_us():
        return Path(os.environ[LAUNCH]) / f"failed-{restart}"
    name = f"axolotl-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}-{_parent()}-{restart}"
    return Path(tempfile.gettempdir()) / name.replace("/", "_")


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return any(sign in str(error) for sign in _PEER_LOST) and not isinstance(error, UserError)


def first_to_fail(error: BaseException) -> bool:
    """True in the one process of this machine whose error is told; always where it is alone."""
    if not among_several():
        return True
    if lost_a_peer(error):
        time.sleep(PEER_WAIT)
    try:
        os.close(os.open(word_file(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def tell_failure(error: Exception) -> int:
    """Shows an error unless another process has spoken, and returns the exit code. A bug keeps its traceback."""
    code = error.exit_code if isinstance(error, AxolotlError) else 1
    if among_several():
        # Others wait for this one in a collective, and it may wait for them on its way out.
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
    if not first_to_fail(error):
        return code
    if among_several():
        console.stderr().print(f"On rank {os.environ.get('RANK', '?')}:", style="red", markup=False)
    if isinstance(error, UserError):
        console.show_error(error)
    elif isinstance(error, AxolotlError):
        console.stderr().print(f"error: {error}", style="red", markup=False)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    return code


def _leave(code: int) -> None:
    time.sleep(EXIT_WAIT + PEER_WAIT)
    os._exit(code)


def end_with_parent() -> None:
    """Lets this process save and end when the one that started it is gone, however that happened. Linux only."""
    if not started_by_us() or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))
    if not Path(os.environ[LAUNCH]).exists() or os.getppid() == 1:
        os._exit(1)
