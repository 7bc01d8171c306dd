"""`axolotl doctor`: is this machine ready, and does a config's data end where generation will stop?"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import numpy as np
from transformers import GenerationConfig

from axolotl import console
from axolotl.config import Config
from axolotl.data.preview import as_text, choose_rows, read_tokens, wants_colour
from axolotl.data.survey import find_prepared, sample
from axolotl.distributed.world import detect_hardware
from axolotl.errors import UserError
from axolotl.model.files import check_base_model, local_folder
from axolotl.model.hub import check_hub
from axolotl.model.load import load_model_config
from axolotl.model.tokenizer import load_tokenizer
from axolotl.plan.machine import Finding, look_at_machine
from axolotl.plan.stops import Ends, compare_ends, ids_of
from axolotl.run.preprocess import stop_tokens
from axolotl.run.ready import ready, refuse

ROWS = 5
SICK = 1
"""The exit code where something is wrong."""


def doctor(cfg: Config | None, *, as_json: bool = False) -> int:
    """Shows what was found; 0 where nothing is wrong, else 1. Writes nothing."""
    hardware = detect_hardware()
    folder = Path(cfg.output.output_dir) if cfg else Path.cwd()
    machine = look_at_machine(hardware, folder)
    shown: list[str] = []
    about: list[Finding] = []
    if cfg is not None:
        try:
            about, shown = look_at_config(ready(cfg, hardware))
        except UserError as error:
            about = [Finding("config", "problem", p.message, p.remedy, p.shown_code) for p in error.problems]
    found = [*machine, *about]
    sick = any(f.state == "problem" for f in found)
    if as_json:
        rows = {"ok": not sick, "findings": [f.as_dict() for f in found], "rows": shown}
        console.out(json.dumps(rows, ensure_ascii=False))
        return SICK if sick else 0
    for line in shown:
        console.out(line)
    for finding in found:
        console.out(line_of(finding))
    console.out("\nTo paste into an issue:\n\n```text")
    for finding in found:
        console.out(without_names(line_of(finding)))
    console.out("```")
    return SICK if sick else 0


def line_of(finding: Finding) -> str:
    """One finding for people."""
    mark = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[finding.state]
    code = f" [{finding.code}]" if finding.code else ""
    remedy = f"\n        {finding.remedy}" if finding.remedy else ""
    return f"{mark} {finding.topic}: {finding.text}{code}{remedy}"


_SECRET = re.compile(r"\b(hf_|sk-|ghp_|glpat-|xox[bap]-)[A-Za-z0-9_-]{6,}|(?<=//)[^/@\s:]+:[^/@\s]+(?=@)")


def without_names(text: str) -> str:
    """A line without the user's home folder, tokens, or passwords in addresses."""
    return _SECRET.sub("***", text.replace(str(Path.home()), "~"))


def look_at_config(cfg: Config) -> tuple[list[Finding], list[str]]:
    """What a config's rows and stop tokens look like: findings, and five rows with what is trained marked.

    Raises a UserError for a tokenizer or data that cannot be read.
    """
    place = cfg.place("base_model")
    without_weights = cfg.model.model_copy(update={"reinit_weights": True})
    refuse([*check_base_model(without_weights, place), *check_hub(cfg.model.base_model, place=place)])
    tokenizer = load_tokenizer(cfg.model, place=place)
    seed = 42 if cfg.train.seed is None else cfg.train.seed
    data = cfg.data
    if data.streaming and not data.datasets:
        return [Finding("rows", "note", "the data is streamed; no row is looked at")], []
    _, tasks = find_prepared(data, tokenizer, seed=seed, places=cfg.place)
    seen = sample(tasks, rows=1)
    ends = np.cumsum(seen.lengths)
    rows = [
        (seen.ids[end - n : end], seen.labels[end - n : end])
        for end, n in zip(ends, seen.lengths, strict=True)
    ]
    colour = wants_colour()
    shown = [
        "What is learned stands in green:"
        if colour
        else "What is learned stands in ⟦ ⟧, special tokens in ‹ ›:"
    ]
    for i in choose_rows(len(rows), ROWS):
        ids, labels = rows[i]
        tokens = read_tokens(tokenizer, ids.tolist(), labels.tolist())
        shown += [
            "",
            f"--- {len(tokens):,} tokens, {sum(t.trained for t in tokens):,} trained",
            as_text(tokens, colour),
        ]
    shown.append("")
    tokens_seen, trained = int(seen.lengths.sum()), int(seen.trained.sum())
    share = trained / tokens_seen if tokens_seen else 0.0
    found = [
        Finding(
            "rows",
            "ok" if share >= 0.01 else "problem",
            f"of {len(rows):,} rows, {share:.1%} of the tokens are trained",
            "" if share >= 0.01 else "Look at `roles_to_train`, `train_on_inputs` and the rows above.",
            "" if share >= 0.01 else "AX1103",
        )
    ]
    return [*found, *compare_ends(_ends(cfg, tokenizer), tokenizer, [labels for _, labels in rows])], shown


def _ends(cfg: Config, tokenizer: object) -> Ends:
    config = load_model_config(cfg.model, cfg.place("base_model"))
    text = config.get_text_config()
    folder = local_folder(cfg.model.base_model)
    generation = None
    with contextlib.suppress(OSError, ValueError):
        generation = GenerationConfig.from_pretrained(str(folder) if folder else cfg.model.base_model)
    eos = tokenizer.eos_token_id  # type: ignore[attr-defined]
    return Ends(
        None if eos is None else (eos, str(tokenizer.eos_token)),  # type: ignore[attr-defined]
        ids_of(text.eos_token_id),
        None if generation is None else ids_of(generation.eos_token_id),
        tuple(stop_tokens(cfg, tokenizer)),
        max(text.vocab_size, len(tokenizer)),  # type: ignore[arg-type]
    )
