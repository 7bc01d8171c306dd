"""A model on the Hub that cannot be had is told at once."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub
import pytest

from axolotl.errors import Place
from axolotl.model.hub import check_hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.usefixtures("no_network")
def test_a_hub_name_without_a_network_is_told_with_its_place() -> None:
    (problem,) = check_hub("owner/name", place=Place("c.yml", 1, 13))
    assert problem.fatal
    assert "`base_model: owner/name`" in problem.message
    assert str(problem.places[0]) == "c.yml:1:13"


@pytest.mark.usefixtures("no_network")
def test_folders_ask_nobody(tmp_path: Path) -> None:
    assert check_hub(str(tmp_path)) == []


def test_a_hub_that_answers_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert check_hub("owner/name") == []
