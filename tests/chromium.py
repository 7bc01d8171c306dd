"""A headless Chromium that a test types into and clicks at, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(
    (
        c
        for c in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
        if Path(c).exists()
    ),
    None,
)


class Chromium:
    """One tab. Use it in a `with`; mouse and keyboard events go through the browser, as a person's do."""

    def __init__(self, profile: Path, width: int = 1000, height: int = 820) -> None:
        assert PROGRAM, "no Chromium is installed"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser reads from 3 and writes to 4.
        command = [
            *("bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", PROGRAM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"),
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.requested: list[str] = []
        """The addresses that pages asked for."""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime"):
            self.tell(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.tell("Browser.close")
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                more = os.read(self._read, 1 << 16)
                assert more, "Chromium ended"
                self._buffer += more
            line, _, self._buffer = self._buffer.partition(b"\0")
            reply = json.loads(line)
            if reply.get("method") == "Network.requestWillBeSent":
                self.requested.append(reply["params"]["request"]["url"])
            if reply.get("id") == self._number:
                assert "error" not in reply, reply["error"]
                return dict(reply["result"])

    def open(self, address: str) -> None:
        self.tell("Page.navigate", url=address)

    def value(self, script: str) -> Any:
        """What an expression of the page's own language is worth; None where it fails."""
        return self.tell("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """The first value of an expression that counts as true."""
        until = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < until, f"never true: {script}\n{self.value('document.body.innerText')}"
            time.sleep(0.1)
        return found

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({selector!r})?.innerText") or "")

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, once it is there and can be seen."""
        place = self.wait(
            f"(() => {{const e = document.querySelector({selector!r}); if (!e || e.disabled) return null;"
            " e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            " return r.width ? {x: r.x + r.width / 2, y: r.y + r.height / 2} : null})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, text: str) -> None:
        self.tell("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.tell(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if code == 13 and kind == "keyDown" else "",
            )

    def photograph(self, file: Path) -> None:
        """The page as it is seen, as a PNG."""
        picture = self.tell("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(picture))
