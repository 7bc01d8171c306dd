"""The quickstart: measure, train, merge, measure again, ask. It only runs axolotl commands and reads their figures.

usage: python examples/quickstart/run.py        (or: make quickstart)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

from axolotl.cli.main import cli

CONFIG = "examples/quickstart/lora.yml"
PROMPT = Path("examples/quickstart/prompt.txt")
OUT = Path("outputs/quickstart")
MERGED = str(OUT / "merged")
BEFORE_AT_MOST, AFTER_AT_LEAST, ROWS_AT_LEAST = 5.0, 90.0, 200


def axolotl(*args: str) -> None:
    """Runs one command in this process, as the shell would."""
    print(f"\n$ axolotl {' '.join(repr(a) if ' ' in a else a for a in args)}", flush=True)
    code = cli.main(args=list(args), prog_name="axolotl", standalone_mode=False)
    if code:
        sys.exit(code)


def exact_match() -> tuple[float, int]:
    """(percent, rows) of the last evaluation."""
    figures = json.loads((OUT / "evaluation.json").read_text(encoding="utf-8"))
    return 100 * figures["exact_match"], figures["asked"]


def question() -> str:
    """What the person at the terminal types; without a terminal, the prompt in the file."""
    typed = ""
    if sys.stdin.isatty():
        try:
            typed = input("\nA date, in any words (for example: the 3rd of March, '21): ").strip()
        except EOFError:
            typed = ""
    return typed or PROMPT.read_text(encoding="utf-8").strip()


def main() -> None:
    """Exits with 1 where the figures are missed."""
    # As the command `axolotl` does it, before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shutil.rmtree(OUT, ignore_errors=True)
    axolotl("evaluate", CONFIG, "--answers", "--untrained")
    before, rows = exact_match()
    axolotl("train", CONFIG)
    axolotl("merge-lora", CONFIG)
    axolotl("evaluate", CONFIG, "--answers", "--base-model", MERGED)
    after, _ = exact_match()
    asked = question()
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        axolotl("inference", CONFIG, "--base-model", MERGED, "--prompt", asked, "--max-new-tokens", "32")
    command, _, answer_text = answer.getvalue().strip().partition("\n")
    print(
        f"\n{command}\n\nheld-out exact match before: {before:.1f} % after: {after:.1f} % ({rows} rows)\n{answer_text}"
    )
    if before > BEFORE_AT_MOST or after < AFTER_AT_LEAST or rows < ROWS_AT_LEAST:
        sys.exit(
            f"The figures are missed: at most {BEFORE_AT_MOST} % before, at least {AFTER_AT_LEAST} % after."
        )


if __name__ == "__main__":
    main()
