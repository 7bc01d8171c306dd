"""What the exit code of a process says, in words."""

from __future__ import annotations

import signal

from axolotl.errors import Problem

_WAYS_ON = {
    "train": "What is finished is kept: the same command with `--auto-resume-from-checkpoints` goes on. It needs more RAM, "
    "`dataset_num_proc: 1`, or a smaller model.",
    "preprocess": "What is finished is kept, and the same command goes on from there. It needs more RAM, or "
    "`dataset_num_proc: 1`.",
}
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def killed(what: str, kernel_kills: int, verb: str = "train") -> Problem:
    """What is told of a process of `axolotl VERB` that ended by SIGKILL."""
    sure = "The kernel ended" if kernel_kills else "Something outside ended"
    guess = "" if kernel_kills else ", most likely the kernel"
    return Problem(
        f"{sure} {what} with SIGKILL (exit code -9){guess}, for want of memory.",
        _WAYS_ON.get(verb, "It needs more RAM, or a smaller model."),
        "environment",
        code="AX1405",
    )


def explain_exit(code: int, what: str, kernel_kills: int = 0) -> Problem | None:
    """Why a process ended, where its exit code alone tells: None for a process that spoke for itself.

    `what` names the process; `kernel_kills` is how many processes the kernel has ended for want of memory meanwhile.
    """
    if code in KILLED:
        return killed(what, kernel_kills)
    crashes = {
        -signal.SIGSEGV: "crashed (SIGSEGV)",
        -signal.SIGABRT: "gave up (SIGABRT)",
        -signal.SIGBUS: "crashed (SIGBUS)",
    }
    if code in crashes:
        return Problem(
            f"{what} {crashes[code]} inside a library.",
            "`axolotl doctor` looks for versions that do not fit together; SIGBUS also comes from a full /dev/shm.",
            "environment",
        )
    return None
