"""Runs `axolotl` commands in child processes that are forked from one in which the libraries are loaded already.

What runs in the child is the command's own entry point with its own arguments; only the seconds of imports are saved.
Reads one JSON object per line from stdin: {"start": {argv, cwd, log, env, fault}} → {"pid"}, {"wait": pid, "timeout"}
→ {"code"} (null where it still runs).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def child(order: dict) -> None:
    """Becomes the command; never returns."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["cwd"])
    os.environ.update(order.get("env", {}))
    if order.get("fault"):
        from faults.shim import install

        install(order["fault"])
    from axolotl.cli.main import main

    main(order["argv"])


def main() -> None:
    """Serves until stdin ends."""
    for name in (
        "axolotl.run.train",
        "axolotl.cli.main",
        "axolotl.plan.check",
        "axolotl.cli.overrides",
        "peft",
    ):
        importlib.import_module(name)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = os.fork()
            if pid == 0:
                # Its end is that of the whole process, with everything that runs at exit.
                return child(order["start"])
            answer: dict = {"pid": pid}
        else:
            pid, deadline = order["wait"], time.monotonic() + order["timeout"]
            while pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() >= deadline:
                    break
                else:
                    time.sleep(0.005)
            answer = {"code": codes.get(pid)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    main()
