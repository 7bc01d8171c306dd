"""What stands behind the page: two models asked side by side, answers that grow and can be stopped, and its address."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl.config.output import OutputSection
from axolotl.errors import DataError, EnvironmentProblem
from axolotl.inference import ui
from axolotl.inference.generate import Answer, Sampling, generate
from axolotl.inference.loading import Loaded
from axolotl.inference.sides import Sides
from axolotl.inference.talks import Talks, answers, messages_for, shown_for
from scripted import scripted

TEXT = "The old blue house"
ASK = [{"role": "user", "content": "hi"}]
SHORT = Sampling(max_new_tokens=20)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return scripted(TEXT)


def with_adapter(start: Any = True) -> Loaded:
    """The scripted model under a LoRA that was moved far from zero."""
    plain = scripted(TEXT)
    model: Any = get_peft_model(
        plain.model,
        LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=start, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    return Loaded(model.eval(), plain.tokenizer, plain.prompter, plain.stops, "adapter")


def ids_of(loaded: Loaded) -> str:
    prompt = loaded.prompter.chat(ASK)
    return generate(loaded.model, loaded.tokenizer, prompt, SHORT, loaded.stops).text


def test_the_base_is_the_model_with_its_adapter_off(loaded: Loaded) -> None:
    sides = Sides(with_adapter(), lambda: pytest.fail("the base needs no second model"))
    assert sides.comparable
    assert sides.shared
    with sides.opened("base") as base:
        assert base is not None
        assert ids_of(base) == TEXT
    with sides.opened("tuned") as tuned:
        assert tuned is not None
        assert ids_of(tuned) != TEXT


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base_has_its_base_loaded(start: str, loaded: Loaded) -> None:
    sides = Sides(with_adapter(start), lambda: loaded)
    assert not sides.shared
    with sides.opened("base") as base:
        assert base is loaded


def test_without_a_base_there_is_one_side(loaded: Loaded) -> None:
    assert not Sides(loaded).comparable
    assert not Sides(loaded, lambda: loaded).shared


def test_an_answer_grows_and_ends_with_its_reader(loaded: Loaded) -> None:
    grown = list(answers(Sides(loaded), "tuned", ASK, SHORT, threading.Event()))
    texts = [g for g in grown if isinstance(g, str)]
    assert texts[-1] == TEXT
    assert isinstance(grown[-1], Answer) and grown[-1].text == TEXT
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    stream = answers(Sides(loaded), "tuned", ASK, SHORT, threading.Event())
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "axolotl-answer"]
    with pytest.raises(DataError, match="context holds"):
        list(
            answers(
                Sides(loaded), "tuned", [{"role": "user", "content": "x " * 9000}], SHORT, threading.Event()
            )
        )


def test_a_wait_for_the_model_can_be_stopped(loaded: Loaded) -> None:
    """Somebody else holds the model: whoever waits may give up."""
    sides, stop = Sides(loaded), threading.Event()
    with sides.opened("tuned"):
        threading.Timer(0.2, stop.set).start()
        started = time.monotonic()
        assert [a.finish for a in answers(sides, "tuned", ASK, SHORT, stop) if isinstance(a, Answer)] == [
            "cancelled"
        ]
        assert time.monotonic() - started < 10
    with sides.opened("tuned") as free:
        assert free is loaded


def last(stream: Iterator[Any]) -> Any:
    *_, end = stream
    return end


def test_each_side_keeps_its_own_conversation() -> None:
    other = scripted("Another")
    talks = Talks(Sides(scripted(TEXT), lambda: other))
    turns, said = last(talks.ask("a", [], "hi", "", SHORT, both=False))
    assert turns == [{"question": "hi", "answers": {"tuned": TEXT}}]
    assert "tokens/s" in said["tuned"]
    turns, said = last(talks.ask("a", turns, "hi", "Be terse.", SHORT, both=True))
    assert turns[1] == {"question": "hi", "answers": {"tuned": TEXT, "base": "Another"}}
    assert set(said) == {"tuned", "base"}
    assert [m["content"] for m in messages_for("tuned", turns, "next", "")] == [
        "hi",
        TEXT,
        "hi",
        TEXT,
        "next",
    ]
    assert [m["content"] for m in messages_for("base", turns, "next", " S ")] == [
        "S",
        "hi",
        "Another",
        "next",
    ]
    assert len(shown_for("base", turns)) == 2
    turns[0]["answers"]["tuned"] = "<think>hm</think>Yes"
    assert messages_for("tuned", turns, "next", "")[1]["content"] == "Yes"


def test_a_stop_ends_the_tab_that_asks_for_it(loaded: Loaded) -> None:
    talks = Talks(Sides(loaded, lambda: loaded))
    stream = talks.ask("a", [], "hi", "", SHORT, both=True)
    next(stream)
    talks.stop("b")
    talks.stop("a")
    turns, said = last(stream)
    assert set(turns[0]["answers"]) == {"tuned"}
    assert "stopped" in said["tuned"]
    talks.stop("a")


def test_an_address_that_cannot_be_had_names_its_key() -> None:
    ui.check_place(OutputSection())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"`gradio_server_port: {port}` cannot be used") as told:
            ui.check_place(OutputSection(gradio_server_port=port))
    assert told.value.problems[0].keys == ("gradio_server_port",)
    with pytest.raises(ValueError, match="65535"):
        OutputSection(gradio_server_port=65536)
    with pytest.raises(EnvironmentProblem, match=r"`gradio_server_name: 203\.0\.113\.7` cannot be used"):
        ui.check_place(OutputSection(gradio_server_name="203.0.113.7"))
    with pytest.raises(EnvironmentProblem, match="`gradio_server_name: no such host`"):
        ui.check_place(OutputSection(gradio_server_name="no such host", gradio_server_port=8000))


class FakeBlocks:
    """Stands in for a page of gradio's: remembers how it was started."""

    options: dict[str, Any]

    def queue(self, **_: Any) -> FakeBlocks:
        return self

    def launch(self, **options: Any) -> tuple[None, str, str | None]:
        self.options = options
        return None, "http://127.0.0.1:7860/", None


def test_the_page_stays_on_this_machine(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = FakeBlocks()
    monkeypatch.setattr(ui, "require_extra", lambda *_: None)
    monkeypatch.setattr(ui, "build_page", lambda *_: page)
    ui.serve_page(Sides(loaded), OutputSection(), SHORT, block=False)
    assert (page.options["server_name"], page.options["share"]) == ("127.0.0.1", False)
    assert "whoever" not in capsys.readouterr().err
    ui.serve_page(Sides(loaded), OutputSection(gradio_server_name="0.0.0.0"), SHORT, block=False)
    assert "whoever reaches this machine can ask" in capsys.readouterr().err
    ui.serve_page(Sides(loaded), OutputSection(gradio_share=True), SHORT, block=False)
    assert page.options["share"] is True
    assert "no public link could be made" in capsys.readouterr().err


def test_a_missing_gradio_is_told_before_the_model_is_loaded(
    tmp_path: Path, tiny_llama3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.config import load_config
    from axolotl.run import inference as verb

    config = tmp_path / "config.yml"
    config.write_text(
        f"base_model: {tiny_llama3}\ndatasets: [{{path: x.jsonl, type: alpaca}}]\nlearning_rate: 1e-4\n"
        f"micro_batch_size: 1\ngradient_accumulation_steps: 1\nnum_epochs: 1\noutput_dir: {tmp_path}/out\n"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(verb, "load_trained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(EnvironmentProblem, match="gradio"):
        verb.inference(load_config(str(config)), gradio=True)
