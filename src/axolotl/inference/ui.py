"""A chat page in the browser, on this machine only unless the config says otherwise."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from axolotl.console import note
from axolotl.errors import UserError
from axolotl.inference.generate import Sampling, generate
from axolotl.inference.loading import Loaded
from axolotl.registry import require_extra

if TYPE_CHECKING:
    from axolotl.config.output import OutputSection


def answers(
    loaded: Loaded, messages: list[dict[str, Any]], sampling: Sampling, stop: threading.Event
) -> Iterator[str]:
    """The growing text of an answer. It ends when `stop` is set or the reader goes away."""
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            prompt = loaded.prompter.chat(messages)
            generate(
                loaded.model,
                loaded.tokenizer,
                prompt,
                sampling,
                loaded.stops,
                on_text=pieces.put,
                cancelled=stop.is_set,
            )
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    text = ""
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, UserError):
                yield f"{text}\n\n{piece}"
                return
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            yield text
    finally:
        stop.set()
        worker.join()


def build_page(gr: Any, loaded: Loaded, output: OutputSection, sampling: Sampling) -> Any:
    """The page. `gr` is the gradio module."""

    def respond(
        message: str,
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
    ) -> Iterator[str]:
        earlier = [{"role": m["role"], "content": _text(m["content"])} for m in history]
        opening = [{"role": "system", "content": system}] if system.strip() else []
        chosen = Sampling(
            **{
                **vars(sampling),
                "max_new_tokens": int(max_new_tokens),
                "temperature": temperature,
                "top_p": top_p,
            }
        )
        yield from answers(
            loaded, [*opening, *earlier, {"role": "user", "content": message}], chosen, threading.Event()
        )

    title = output.gradio_title or f"axolotl: {loaded.source}"
    with gr.Blocks(title=title) as page:
        gr.Markdown(f"# {title}")
        gr.ChatInterface(
            respond,
            additional_inputs=[
                gr.Textbox("", label="System message"),
                gr.Slider(0.0, 2.0, value=output.gradio_temperature, step=0.05, label="Temperature"),
                gr.Slider(0.05, 1.0, value=sampling.top_p or 1.0, step=0.05, label="Top p"),
                gr.Slider(
                    1, 8192, value=output.gradio_max_new_tokens, step=1, label="Longest answer (tokens)"
                ),
            ],
        )
    return page


def _text(content: Any) -> str:
    """A message's text; gradio gives it as a string or as a list of parts."""
    if isinstance(content, list):
        return "".join(str(p.get("text", "")) if isinstance(p, dict) else str(p) for p in content)
    return str(content)


def serve_page(loaded: Loaded, output: OutputSection, sampling: Sampling, *, block: bool = True) -> Any:
    """Opens the page and serves it until it is stopped. Raises EnvironmentProblem where gradio is not installed."""
    gr = require_extra("gradio", "gradio", "`--gradio`")
    page = build_page(gr, loaded, output, sampling)
    launched = page.queue().launch(
        server_name=output.gradio_server_name,
        server_port=output.gradio_server_port,
        share=output.gradio_share,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    note(f"The page is at {launched[1]}.{' It is public.' if output.gradio_share else ''} Ctrl-C stops it.")
    if block:
        page.block_thread()
    return page
