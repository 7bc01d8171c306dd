"""A chat page in the browser: what was trained beside its base, on this machine only unless the config says otherwise."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from axolotl.console import note, warn
from axolotl.errors import EnvironmentProblem, Problem, UserError
from axolotl.inference.generate import Sampling
from axolotl.inference.sides import Sides
from axolotl.inference.talks import Talks, Turn, shown_for
from axolotl.inference.thinking import THINKING
from axolotl.registry import require_extra

if TYPE_CHECKING:
    from axolotl.config.output import OutputSection

# Address in use; no right to a port below 1024.
_PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)
_CSS = "footer {display: none !important} .speed {min-height: 1.6em; opacity: .7; font-size: .85em}"


@dataclass(frozen=True)
class Page:
    """A page that is open: gradio's blocks, and where they are."""

    blocks: Any
    address: str
    public: str | None

    def close(self) -> None:
        """Ends the server."""
        self.blocks.close(verbose=False)


def build_page(gr: Any, sides: Sides, title: str, sampling: Sampling, system: str = "") -> Any:
    """The page. `gr` is the gradio module; `sampling` and `system` are what its parameters begin with."""
    talks = Talks(sides)
    both_at_first = sides.comparable and sides.shared

    def ask(
        again: bool,
        question: str,
        turns: list[Turn],
        both: bool,
        system: str,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition: float,
        longest: float,
        seed: float | None,
        request: Any,
    ) -> Iterator[tuple[Any, ...]]:
        before, turns = turns, turns[:-1] if again else turns
        if again and before:
            question = before[-1]["question"]
        if not question.strip():
            gr.Warning("There is no question. Write one.")
            yield shown(before, {}, question=question)
            return
        chosen = replace(
            sampling,
            temperature=float(temperature),
            top_p=float(top_p) if top_p < 1 else None,
            top_k=int(top_k) or None,
            repetition_penalty=float(repetition) if repetition != 1 else None,
            max_new_tokens=int(longest),
            seed=None if seed is None else int(seed),
        )
        grown: list[Turn] = turns
        said: dict[str, str] = {}
        try:
            for grown, said in talks.ask(request.session_hash, turns, question, system, chosen, both=both):
                yield shown(grown, said, busy=True)
        except UserError as error:
            gr.Warning(" ".join(f"{p.message} {p.remedy}" for p in error.problems), duration=None)
            yield shown(before, {}, question=question)
            return
        except Exception:
            # Gradio tells it, and the console has its traceback; the page has to stay usable.
            yield shown(before, {}, question=question)
            raise
        yield shown(grown, said)

    def undo(turns: list[Turn]) -> tuple[Any, ...]:
        if not turns:
            gr.Warning("There is nothing to undo.")
            return shown(turns, {})
        return shown(turns[:-1], {}, question=turns[-1]["question"])

    def stop(request: Any) -> None:
        talks.stop(str(request.session_hash))

    def shown(
        turns: list[Turn], said: dict[str, str], *, question: str = "", busy: bool = False
    ) -> tuple[Any, ...]:
        """The values of all that changes, in the order of `changing`."""
        return (
            question,
            turns,
            shown_for("tuned", turns),
            shown_for("base", turns),
            said.get("tuned", ""),
            said.get("base", ""),
            gr.Button(interactive=busy),
            *[gr.Button(interactive=not busy)] * 4,
        )

    # Gradio finds a parameter that wants the request by its class, which is known only here.
    for function in (ask, stop):
        function.__annotations__["request"] = gr.Request

    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {title}")
        turns = gr.State([])
        chats, speeds = {}, {}
        with gr.Row():
            for side, label in (("tuned", "Tuned" if sides.comparable else "Answers"), ("base", "Base")):
                visible = side == "tuned" or both_at_first
                with gr.Column(visible=visible, elem_id=f"column-{side}") as column:
                    chats[side] = gr.Chatbot(
                        label=label,
                        elem_id=f"chat-{side}",
                        height=300,
                        buttons=["copy"],
                        reasoning_tags=list(THINKING),
                        latex_delimiters=[],
                    )
                    speeds[side] = gr.Markdown(elem_id=f"speed-{side}", elem_classes=["speed"])
        base_column = column
        question = gr.Textbox(
            label="Question",
            placeholder="Enter sends, Shift-Enter begins a new line.",
            elem_id="question",
            lines=1,
            max_lines=8,
            autofocus=True,
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send")
            stopping = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            again = gr.Button("Retry", elem_id="retry")
            back = gr.Button("Undo", elem_id="undo")
            clear = gr.Button("Clear", elem_id="clear")
        both = gr.Checkbox(
            both_at_first,
            label="Ask the base model too" + ("" if sides.shared else " (it is loaded beside the tuned one)"),
            visible=sides.comparable,
            elem_id="both",
        )
        with gr.Accordion("Parameters", open=False):
            told = gr.Textbox(system, label="System message", elem_id="system")
            with gr.Row():
                temperature = gr.Slider(
                    0.0,
                    2.0,
                    value=sampling.temperature or 0.0,
                    step=0.05,
                    label="Temperature (0: the likeliest)",
                )
                longest = gr.Slider(
                    1, 8192, value=sampling.max_new_tokens, step=1, label="Longest answer (tokens)"
                )
                top_p = gr.Slider(0.05, 1.0, value=sampling.top_p or 1.0, step=0.05, label="Top p (1: all)")
            with gr.Row():
                top_k = gr.Number(sampling.top_k or 0, label="Top k (0: all)", precision=0, minimum=0)
                repetition = gr.Slider(
                    0.5,
                    2.0,
                    value=sampling.repetition_penalty or 1.0,
                    step=0.05,
                    label="Repetition penalty (1: none)",
                )
                seed = gr.Number(sampling.seed, label="Seed (empty: another each time)", precision=0)

        parameters = [both, told, temperature, top_p, top_k, repetition, longest, seed]
        changing = [
            *(question, turns, chats["tuned"], chats["base"], speeds["tuned"], speeds["base"]),
            *(stopping, send, again, back, clear),
        ]
        # Several tabs may ask: they wait for each other in `Sides`, where a wait can be stopped.
        long: dict[str, Any] = {
            "outputs": changing,
            "concurrency_limit": None,
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        gr.on(
            [question.submit, send.click],
            ask,
            [gr.State(False), question, turns, *parameters],
            trigger_mode="once",
            **long,
        )
        again.click(ask, [gr.State(True), question, turns, *parameters], trigger_mode="once", **long)
        # Not in the queue, where it would wait for what it is to end.
        stopping.click(stop, None, None, queue=False, api_visibility="private", show_progress="hidden")
        back.click(undo, [turns], **long)
        gr.on([clear.click, *(chat.clear for chat in chats.values())], lambda: shown([], {}), None, **long)
        both.change(
            lambda on: gr.Column(visible=on), both, base_column, queue=False, api_visibility="private"
        )
        page.unload(stop)
    return page


def serve_page(
    sides: Sides, output: OutputSection, sampling: Sampling, *, system: str = "", block: bool = True
) -> Page:
    """Opens the page and serves it until it is stopped.

    Raises EnvironmentProblem where gradio is not installed, and where address or port cannot be had.
    """
    gr = require_extra("gradio", "gradio", "`--gradio`")
    check_place(output)
    page = build_page(gr, sides, output.gradio_title or f"axolotl: {sides.tuned.source}", sampling, system)
    _, address, public = page.queue(default_concurrency_limit=None).launch(
        server_name=output.gradio_server_name,
        server_port=output.gradio_server_port,
        share=output.gradio_share,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        # Nothing of a conversation is kept or sent, and no font comes from elsewhere.
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        css=_CSS,
    )
    note(f"The page is at {address} Ctrl-C stops it.")
    if output.gradio_share:
        if public:
            note(f"Anyone who has this link can ask: {public}")
        else:
            warn("`gradio_share: true`, but no public link could be made: Gradio's servers were not reached.")
    elif not _is_local(output.gradio_server_name):
        warn(f"`gradio_server_name: {output.gradio_server_name}`: whoever reaches this machine can ask.")
    opened = Page(page, address, public)
    if block:
        page.block_thread()
    return opened


def check_place(output: OutputSection) -> None:
    """Raises EnvironmentProblem where the page's address or port cannot be had."""
    name, port = output.gradio_server_name, output.gradio_server_port
    host = name.strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        key, value, remedy = (
            "gradio_server_name",
            name,
            "127.0.0.1 is this machine alone, 0.0.0.0 all its addresses.",
        )
        if port is not None and not isinstance(error, socket.gaierror) and error.errno in _PORT_ERRORS:
            key, value, remedy = "gradio_server_port", str(port), "Name another port, or leave the line out."
        reason = (error.strerror or str(error)).lower()
        raise EnvironmentProblem(
            Problem(f"`{key}: {value}` cannot be used: {reason}.", remedy, "environment", (key,))
        ) from None


def _is_local(name: str) -> bool:
    return name.strip("[]") in ("localhost", "::1") or name.startswith("127.")
