"""One piece of work at a time, done by a thread beside the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Does one thing at a time in a thread that does not keep the process from ending."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is still being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begins some work, after what is being done. Raises what that raised."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for what is being done. Raises what it raised; a signal's handler may raise out of the waiting."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
