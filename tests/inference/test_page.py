"""The page in a real browser: a question is typed, answers of both models appear, and a stop ends them on the server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from axolotl.config.output import OutputSection
from axolotl.inference import talks, ui
from axolotl.inference.generate import Answer, Sampling
from axolotl.inference.loading import Loaded
from axolotl.inference.sides import Sides
from chromium import Chromium
from scripted import scripted, teach

ENTER = ("Enter", 13)
PHOTOGRAPH = os.environ.get("AXOLOTL_PHOTOGRAPH")
"""A file to which the picture for the docs is written."""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as tab:
        yield tab


@contextlib.contextmanager
def open_page(sides: Sides, **keys: Any) -> Iterator[ui.Page]:
    page = ui.serve_page(
        sides, OutputSection.model_validate(keys), Sampling(max_new_tokens=4000), block=False
    )
    try:
        yield page
    finally:
        page.close()


def ask(tab: Chromium, question: str) -> None:
    """Types a question and sends it; a page that still comes to life loses what is typed into it."""
    tab.wait("!!document.querySelector('#question textarea')")
    for _ in range(40):
        tab.click("#question textarea")
        tab.value("document.querySelector('#question textarea').select()")
        tab.type(question)
        time.sleep(0.3)
        if tab.value("document.querySelector('#question textarea').value") == question:
            tab.press(*ENTER)
            return
    raise AssertionError("the question cannot be typed")


def idle(tab: Chromium) -> None:
    tab.wait("!document.querySelector('#send').disabled && document.querySelector('#stop').disabled")


class Endless:
    """A model that never ends by itself, and counts its steps."""

    def __init__(self) -> None:
        loaded = scripted("x")
        far = loaded.tokenizer.encode(" far", add_special_tokens=False)[0]
        teach(loaded.model, [[loaded.prompter.ask("hi")[-1], far, far]])
        self.steps = 0
        forward = loaded.model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            time.sleep(0.01)
            return forward(*args, **kwargs)

        loaded.model.forward = counted
        self.loaded = loaded


def thinking(*_: Any, on_text: Callable[[str], None], **__: Any) -> Answer:
    """Stands in for a model that thinks aloud first."""
    for piece in ("<think>", "hm, well", "</think>", "Yes"):
        on_text(piece)
    return Answer("<think>hm, well</think>Yes", 4, 0.1, "stop")


def working() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "axolotl-answer"]


@pytest.mark.extras
def test_a_stop_ends_the_answer_on_the_server(browser: Chromium) -> None:
    model = Endless()
    with open_page(Sides(model.loaded)) as page:
        assert page.address.startswith("http://127.0.0.1:")
        assert page.public is None
        browser.open(page.address)
        ask(browser, "hi")
        browser.wait("document.querySelector('#chat-tuned').innerText.includes('f f f')")
        assert not browser.text("#chat-base")
        browser.click("#stop")
        idle(browser)
        steps, told = model.steps, browser.text("#chat-tuned")
        assert 2 < steps < 3000
        assert working() == []
        time.sleep(1)
        assert (model.steps, browser.text("#chat-tuned")) == (steps, told)
        assert "stopped" in browser.text("#speed-tuned")
        # The same question once more; then the tab goes away.
        browser.click("#retry")
        browser.wait("!document.querySelector('#stop').disabled")
        browser.wait("document.querySelector('#chat-tuned').innerText.includes('f f')")
        browser.open("about:blank")
        until = time.monotonic() + 30
        while working() and time.monotonic() < until:
            time.sleep(0.2)
        assert working() == []


@pytest.mark.extras
def test_two_models_beside_each_other(browser: Chromium, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model and its base, which is loaded when it is first asked; turns, parameters and mistakes."""
    loads: list[int] = []

    def base() -> Loaded:
        loads.append(1)
        return scripted("A plain one")

    with open_page(Sides(scripted("The tuned model"), base), gradio_title="Two <b>of</b> them") as page:
        browser.open(page.address)
        ask(browser, "hi")
        browser.wait("document.querySelector('#chat-tuned').innerText.includes('The tuned model')")
        idle(browser)
        assert loads == []
        browser.click("#both input")
        ask(browser, "hi")
        browser.wait("document.querySelector('#chat-base')?.innerText.includes('A plain one')")
        idle(browser)
        assert loads == [1]
        assert browser.text("#chat-tuned").count("The tuned model") == 2
        assert re.search(r"\d+ tokens in .* tokens/s", browser.text("#speed-base"))
        browser.click("#undo")
        browser.wait("document.querySelector('#question textarea').value == 'hi'")
        assert browser.text("#chat-tuned").count("The tuned model") == 1
        browser.click("#clear")
        browser.wait("!document.querySelector('#chat-tuned').innerText.includes('The tuned model')")
        browser.click("#undo")
        browser.wait("document.body.innerText.includes('nothing to undo')")
        ask(browser, "word " * 9000)
        browser.wait("document.body.innerText.includes('context holds 8,192')")
        idle(browser)
        assert "word" not in browser.text("#chat-tuned")
        # Thinking has a fold of its own, and is no part of what is asked next.
        monkeypatch.setattr(talks, "generate", thinking)
        ask(browser, "hi")
        browser.wait("document.querySelector('#chat-tuned').innerText.includes('Yes')")
        idle(browser)
        assert "<think>" not in browser.text("#chat-tuned")
        assert [u for u in browser.requested if not u.startswith(("data:", "blob:", page.address))] == []


@pytest.mark.extras
def test_the_command_as_a_user_starts_it(
    browser: Chromium, tmp_path: Path, project: Path, axolotl: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The quickstart, far enough to write dates, and to its end for the picture of the docs, which is made here."""
    shutil.copytree(project / "examples", tmp_path / "examples")
    config = "examples/quickstart/lora.yml"
    few = () if PHOTOGRAPH else ("--max-steps", "120")
    trained = axolotl("train", config, *few, cwd=tmp_path, timeout=1500)
    assert trained.returncode == 0, trained.stderr
    command = [sys.executable, "-m", "axolotl", "inference", config, "--gradio", "--temperature", "0"]
    command += ["--gradio-title", "Dates"]
    said = tmp_path / "said"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            # What a shell starts in the background ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        until = time.monotonic() + 240
        while not (found := re.search(r"The page is at (http://127\.0\.0\.1:\d+/)", said.read_text())):
            assert process.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        browser.open(found[1])
        ask(browser, "the 4th of July, '84")
        browser.wait("/\\d{4}-\\d\\d-\\d\\d/.test(document.querySelector('#chat-tuned').innerText)")
        idle(browser)
        time.sleep(1)  # buttons change their colour slowly
        picture = tmp_path / "page.png"
        browser.photograph(picture)
        assert 10_000 < picture.stat().st_size < 150_000
        ask(browser, "May the 3rd, 2007")
        browser.wait("/(\\d{4}-\\d\\d-\\d\\d[^]*){2}/.test(document.querySelector('#chat-tuned').innerText)")
        idle(browser)
        assert not re.search(r"\d{4}-\d\d-\d\d", browser.text("#chat-base"))
        assert browser.text("#chat-base").count("May the 3rd, 2007") == 1
        if PHOTOGRAPH:
            shutil.copy(picture, PHOTOGRAPH)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, 130)
        assert "Traceback" not in said.read_text()
    finally:
        process.kill()
        process.wait()
