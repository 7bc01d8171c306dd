"""`axolotl inference`: one question, many rows, a conversation, or a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.config import Config
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError
from axolotl.inference.batch import check_rows, run_batch
from axolotl.inference.chat import run_chat
from axolotl.inference.generate import Sampling
from axolotl.inference.loading import Loaded, load_trained
from axolotl.inference.once import answer_once, read_question
from axolotl.inference.prompting import Prompter
from axolotl.inference.sides import Sides
from axolotl.inference.ui import check_place, serve_page
from axolotl.registry import require_extra
from axolotl.run.ready import named_on_purpose, ready, refuse_untrained_adapter, told_with_places


@told_with_places
def inference(
    cfg: Config,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    system: str | None = None,
    chat: bool = False,
    gradio: bool = False,
    input_file: Path | None = None,
    output_file: Path | None = None,
    untrained: bool = False,
    **sampling: Any,
) -> None:
    """Loads the trained model and answers. `sampling`: fields of `Sampling`, None for the model's own. Without a terminal the question comes from stdin; nothing waits. Without trained weights this is an error, unless
    `untrained`, or a `--base-model`, says that the base model is meant.

    Raises a UserError for whatever the user can mend; a missing question or file is told before the model is loaded.
    """
    refuse_untrained_adapter(cfg, untrained)
    hardware = detect_hardware()
    cfg = ready(cfg, hardware)
    if gradio:
        page = {
            "temperature": cfg.output.gradio_temperature,
            "max_new_tokens": cfg.output.gradio_max_new_tokens,
        }
        sampling = {
            **sampling,
            **{name: value if sampling.get(name) is None else sampling[name] for name, value in page.items()},
        }
    chosen = Sampling(**{name: value for name, value in sampling.items() if value is not None})
    if (input_file is None) != (output_file is None):
        raise ConfigError(
            "`--input` and `--output` go together.", "Name both: --input ROWS.jsonl --output OUT.jsonl"
        )
    ways = {"--chat": chat, "--gradio": gradio, "--input": input_file is not None}
    ways |= {"--prompt": prompt is not None, "--prompt-file": prompt_file is not None}
    given = [flag for flag, on in ways.items() if on]
    if len(given) > 1:
        raise ConfigError(
            f"`{given[0]}` and `{given[1]}` are two ways to ask: only one can be had at a time.",
            "Leave one of them out.",
        )
    if gradio:
        require_extra("gradio", "gradio", "`--gradio`")
        check_place(cfg.output)
    alone = not (chat or gradio or input_file)
    question = read_question(prompt, prompt_file) if alone else None

    def load(**options: Any) -> Loaded:
        return load_trained(cfg.model, cfg.adapter, cfg.data, hardware, cfg.output.output_dir, **options)

    def look(prompter: Prompter) -> None:
        if system and not prompter.takes_system():
            raise ConfigError(
                "`--system`: prompts that are laid out as the training data was have no place for a system message.",
                "Leave it out, or write it into the question.",
            )
        if input_file and output_file:
            check_rows(input_file, output_file, prompter, system)

    loaded = load(before_weights=look, untrained=untrained, require_training=not named_on_purpose(cfg))
    if gradio:
        tuned = loaded.trained.adapter or loaded.trained.model
        sides = Sides(loaded, (lambda: load(untrained=True)) if tuned else None)
        serve_page(sides, cfg.output, chosen, system=system or "")
    elif input_file and output_file:
        run_batch(loaded, input_file, output_file, chosen, system=system)
    elif question is None:
        run_chat(loaded, chosen, system=system)
    else:
        answer_once(loaded, question, chosen, system=system)
