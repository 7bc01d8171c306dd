"""The table of figures in the README, made from results/. `--check` only says whether it is fresh.

usage: python benchmarks/table.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
README = BENCHMARKS.parent / "README.md"
START, END = "<!-- figures -->\n", "<!-- /figures -->"


def result(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    """Rows of what was measured, how much, and the command that measures it again."""
    startup, first, overhead, loss = map(result, ("startup", "first_step", "overhead", "loss_equality"))
    apart = loss["greatest_differences"]
    rows = [
        ("`axolotl --help`", f"{startup['seconds']['help']['min']:.2f} s", startup),
        ("a wrong config told", f"{startup['seconds']['wrong_config']['min']:.2f} s", startup),
        (
            "from the command to the first training step (tiny model, 400 rows)",
            f"{first['seconds']['to_first_step']['min']:.1f} s, {first['ratios']['first_step_over_importing_libraries']:.2f} × "
            "importing the libraries",
            first,
        ),
        (
            "steps per second beside a bare PyTorch loop over the same batches (tiny model)",
            f"{overhead['ratios']['axolotl_over_bare_loop']:.2f} × ({overhead['work']['threads']} thread"
            f"{'s' if overhead['work']['threads'] > 1 else ''})",
            overhead,
        ),
        (
            "loss beside a plain transformers + PEFT loop: greatest difference",
            f"{apart['plain_loop_loss']:.0e}",
            loss,
        ),
        ("loss with accumulation 8 × 1 beside 1 × 8", f"{apart['accumulation_loss']:.0e}", loss),
        ("loss of packed rows beside the same unpacked", f"{apart['packing_loss']:.0e}", loss),
    ]
    faults, saving, cost = map(result, ("faults", "async_save", "run_cost"))
    rows += [
        (
            f"faults injected into runs ({faults['faults']['SIGKILL']['injected']} of them SIGKILL); survived; bytes of results lost",
            f"{faults['injected']}; {faults['survived']}; {faults['bytes_lost']}",
            faults | {"benchmark": "faults/run"},
        ),
        (
            f"wait of a step for a checkpoint of {saving['work']['checkpoint_gib']:.1f} GiB with `save_async`, beside a save without",
            f"{saving['ratios']['wait_over_save']:.3f} × (a run's first: {saving['ratios']['first_wait_over_save']:.2f} ×)",
            saving,
        ),
        (
            "watchdogs and what exact resuming needs, as a share of a step (tiny model)",
            f"{cost['ratios']['watching_over_step']:.2%}",
            cost,
        ),
    ]
    merging = result("merge")
    small, large = merging["sizes"]["2_GB"], merging["sizes"]["8_GB"]
    rows += [
        (
            "peak memory of merging a LoRA into 2 GB; into 8 GB; of that for the libraries; PEFT's, 8 GB",
            f"{small['peak_bytes']['merge_checked'] / 1e6:.0f} MB; {large['peak_bytes']['merge_checked'] / 1e6:.0f} MB; "
            f"{large['libraries_bytes'] / 1e6:.0f} MB; {large['peak_bytes']['peft'] / 1e6:,.0f} MB",
            merging,
        ),
        (
            "time of merging beside `cp` of the same files, 2 GB; 8 GB; with every tensor read back and checked; that beside "
            "PEFT, 8 GB",
            f"{small['ratios']['merge_over_copy']:.2f} ×; {large['ratios']['merge_over_copy']:.2f} ×; "
            f"{small['ratios']['merge_checked_over_copy']:.2f} × and {large['ratios']['merge_checked_over_copy']:.2f} ×; "
            f"{large['ratios']['merge_over_peft']:.2f} ×"
            + (" (on a busy machine)" if merging["machine"]["load"] > 2 * merging["machine"]["cpus"] else ""),
            merging,
        ),
    ]
    gpu, other = result("gpu-speed"), result("gpu-speed-h100")
    ours = {row: runs["axolotl"] for row, runs in gpu["rows"].items()}
    card = next(iter(gpu["starts"].values()))["card"]
    work = {
        "lora-8b": "8B LoRA r=32, 2 × 4096",
        "lora-8b-recompute": "the same with `gradient_checkpointing: true`",
        "lora-8b-fp8": "the same with `lora_fp8_base: true`, without recomputing",
        "qlora-8b": "8B QLoRA r=32, 2 × 4096",
    }
    command = "gpu/speed.py --out benchmarks/results/gpu-speed.json"
    more = [
        (
            f"{what}: tokens/s and peak memory on one {card}",
            f"{ours[row]['tokens_per_second']:,}; {ours[row]['peak_gib']:.1f} GiB",
            command,
        )
        for row, what in work.items()
        if row in ours
    ]
    beside = other["rows"]["lora-8b"]
    more.append(
        (
            "8B LoRA r=32, 2 × 4096: tokens/s of an earlier commit on one NVIDIA H100; Unsloth's bare loop, same start",
            f"{beside['axolotl']['tokens_per_second']:,}; {beside['unsloth']['tokens_per_second']:,}",
            "gpu/speed.py --out benchmarks/results/gpu-speed-h100.json",
        )
    )
    lines = ["| what | figure | command |", "|---|---|---|"]
    lines += [
        f"| {what} | {figure} | `python benchmarks/{made['benchmark']}.py` |" for what, figure, made in rows
    ]
    lines += [f"| {what} | {figure} | `python benchmarks/{script}` |" for what, figure, script in more]
    machine = startup["machine"]
    lines += [
        "",
        f"On {machine['cpus']} cores of an {machine['processor']}, torch {startup['versions']['torch']}; times are the best of several; the GPU rows with torch {next(iter(gpu['starts'].values()))['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    """The README with its table as the results have it now."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(
            None
            if renewed(text) == text
            else "README.md: the figures are stale; run: python benchmarks/table.py"
        )
    README.write_text(renewed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
