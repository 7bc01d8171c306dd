"""Two simulated machines: network namespaces joined by a cable that can be cut. Run inside `unshare -rn`.

Reads a JSON object from stdin: `commands` (one per machine), `folder`, `environment`, `cut` (a file whose
appearance cuts the cable; none: it stays), `limit` in seconds. Writes one to stdout: exit codes, what each said, seconds
from the cut to the end of each, and processes that were left. Works without being root, where the kernel lets users
make namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_not() -> str:
    """Why machines cannot be simulated here; empty where they can."""
    for program in ("unshare", "ip", "nsenter"):
        if subprocess.run(["which", program], capture_output=True).returncode:
            return f"there is no `{program}` here"
    tried = subprocess.run(
        ["unshare", "-rn", "sh", "-c", "ip link add name near type veth peer name far"],
        capture_output=True,
        text=True,
    )
    return f"the kernel forbids namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def simulate(given: dict[str, Any]) -> dict[str, Any]:
    """Runs `main` in namespaces of its own."""
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, __file__],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=given["limit"] + 60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def _mine() -> set[int]:
    """Processes that descend from this one, or whose mark says that they did."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SIMULATED={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def main() -> None:
    """Sets the network up, runs both commands, cuts, reports."""
    given = json.load(sys.stdin)
    _sh("ip link set lo up && ip link add name near type veth peer name far")
    other = subprocess.Popen(["unshare", "-n", "sleep", "10000"])
    while os.readlink(f"/proc/{other.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    inside = ["nsenter", "-t", str(other.pid), "-n"]
    _sh(f"ip link set far netns {other.pid} && ip addr add {ADDRESSES[0]}/24 dev near && ip link set near up")
    _sh(
        f"{' '.join(inside)} sh -c 'ip link set lo up && ip addr add {ADDRESSES[1]}/24 dev far && ip link set far up'"
    )
    folder = Path(given["folder"])
    running, files = [], []
    for n, command in enumerate(given["commands"]):
        files.append(folder / f"machine{n}.txt")
        running.append(
            subprocess.Popen(
                [*(inside if n else []), *command],
                cwd=folder,
                stdout=files[n].open("w"),
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | given["environment"]
                | {
                    "SIMULATED": str(os.getpid()),
                    "GLOO_SOCKET_IFNAME": ("near", "far")[n],
                    "NCCL_SOCKET_IFNAME": ("near", "far")[n],
                },
            )
        )
    began, cut_at = time.monotonic(), None
    ends: list[float | None] = [None, None]
    while time.monotonic() - began < given["limit"] and None in ends:
        if given.get("cut") and cut_at is None and (folder / given["cut"]).exists():
            _sh("ip link set near down")
            cut_at = time.monotonic()
        for n, process in enumerate(running):
            if ends[n] is None and process.poll() is not None:
                ends[n] = time.monotonic() - (cut_at or began)
        time.sleep(0.05)
    codes = [process.poll() for process in running]
    # What looks whether an agent is stuck ends by itself.
    time.sleep(3)
    left = sorted(_mine())
    said_of_left = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    other.kill()
    json.dump(
        {"codes": codes, "ends": ends, "said": [f.read_text() for f in files], "left": said_of_left},
        sys.stdout,
    )


if __name__ == "__main__":
    main()
