"""`axolotl export`: the finished model as a GGUF file, through llama.cpp's converter."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from axolotl import console
from axolotl.config import Config
from axolotl.config.host import ram
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError
from axolotl.inference.generate import find_stops
from axolotl.inference.prompting import Prompter
from axolotl.registry import require_extra
from axolotl.run.finished import finished_model
from axolotl.run.preprocess import tokenizer_of
from axolotl.run.ready import ready, refuse, told_with_places
from axolotl.weights.folder import gigabytes
from axolotl.weights.gguf_file import (
    SCRIPT,
    Looked,
    check_source,
    convert,
    convert_command,
    find_converter,
    look_at,
)


@told_with_places
def export(
    cfg: Config,
    *,
    outtype: str = "auto",
    base_model: str | None = None,
    destination: Path | None = None,
    converter: Path | None = None,
    show: bool = False,
) -> Looked | None:
    """Writes `{output_dir}/model-{outtype}.gguf` from `base_model`, else `{output_dir}/merged`, else what was trained.

    `show`: print the command for another machine and run nothing; returns None. Raises EnvironmentProblem without a
    converter, ModelError without a whole model and for one that the converter does not know.
    """
    cfg = ready(cfg, detect_hardware())
    source = finished_model(cfg, base_model, "exported")
    code = bool(cfg.model.trust_remote_code)
    refuse(check_source(source, trust_remote_code=code))
    file = destination or Path(cfg.output.output_dir).expanduser() / f"model-{outtype}.gguf"
    if file.suffix != ".gguf" or file.is_dir():
        raise ConfigError(f"`--output {file}` is no name of a GGUF file.", "Give it the ending .gguf.")
    tokenizer = tokenizer_of(cfg, source)
    if tokenizer.chat_template is None:
        console.warn(f"`{source}` has no chat template: llama.cpp will lay out chats by a guess of its own.")
    if show:
        console.out(shlex.join(convert_command(converter or SCRIPT, source, file, outtype, python="python")))
        return None
    require_extra("gguf", "gguf", "`axolotl export`")
    script = find_converter(converter)
    console.note(f"Writing `{source}` as {outtype} by {script}.")
    replaced = file.exists()
    stops = find_stops(tokenizer, [tokenizer.eos_token_id], Prompter(tokenizer, cfg.data).stop_tokens())

    def look(part: Path) -> Looked:
        return look_at(
            part,
            source,
            outtype,
            tokenizer,
            stops.ids,
            free_memory=ram().free,
            trust_remote_code=code,
            named=file,
        )

    looked = convert(script, source, file, outtype, look)
    assert looked is not None
    if replaced:
        console.note(f"`{file}` existed and is replaced.")
    _tell(file, looked)
    return looked


def _tell(file: Path, looked: Looked) -> None:
    compared = (
        f"every tensor within {looked.difference:.2g} of the source's"
        if looked.difference is not None
        else f"tensors not compared: {looked.reason}"
    )
    console.success(
        f"{file}: {gigabytes(looked.bytes)}, {looked.tensors} tensors, {looked.tokens:,} tokens; {compared}."
    )
    for token in looked.deaf_to:
        console.warn(
            f"Training ends turns with `{token}`, at which llama.cpp would go on.\n"
            f"  gguf-new-metadata --special-token eot {shlex.quote(token)} {file} {file.with_suffix('')}-eot.gguf"
        )
    console.out(
        json.dumps(
            {
                "file": str(file),
                "bytes": looked.bytes,
                "tensors": looked.tensors,
                "difference": looked.difference,
            }
        )
    )
    console.note(f"Next:\n  llama-cli -m {file} -cnv")
