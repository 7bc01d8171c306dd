"""The keys of what comes out: folder, Hub, the page for trying the model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from axolotl.config.section import NonNegativeFloat, Port, PositiveInt, Section, Text, later


class OutputSection(Section):
    """Where the result goes, and how it is shown."""

    title: ClassVar[str] = "Output"

    output_dir: Text = "./model-out"
    """Folder for checkpoints and the finished weights."""
    hub_model_id: Text | None = None
    """Hub repository that gets the finished weights; it is made private."""
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None = None
    """What to upload: finished weights (end), also each save's (every_save), also what resumes from the last or from all."""
    hub_revision: Text | None = None
    """Branch to upload to."""
    gradio_title: Text | None = None
    """Title of the page."""
    gradio_share: bool = False
    """Make the page public through Gradio's servers."""
    gradio_server_name: Text = "127.0.0.1"
    """Address the page listens on; 0.0.0.0 opens it to the network."""
    gradio_server_port: Port | None = None
    """Port the page listens on."""
    gradio_max_new_tokens: PositiveInt = 1024
    """Longest answer on the page, in tokens."""
    gradio_temperature: NonNegativeFloat = 0.7
    """Randomness of the answers on the page."""
    strict: bool = False
    """Refuse what would otherwise be replaced with a word in the log, such as an attention that is not installed."""
    export: dict[str, Any] | None = later("export by a key")
    """File for llama.cpp: name, number type, where llama.cpp lies."""
