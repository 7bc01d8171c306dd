"""The picture of the measured speeds in docs/images/, made from results/. `--check` only says whether it is fresh.

usage: python benchmarks/gpu/plot.py [--check]

One panel per card, since the columns of two cards do not compare; one bar per library of a row, rows not run left out.
"""

from __future__ import annotations

import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "gpu-speed.svg"
RESULTS = ("gpu-speed", "gpu-speed-h100")
ROWS = {
    "lora-8b": "LoRA, bf16",
    "lora-8b-recompute": "LoRA, recomputed",
    "lora-8b-offload": "LoRA, offloaded",
    "lora-8b-fp8": "LoRA, fp8 base",
    "qlora-8b": "QLoRA, nf4",
    "lora-8b-packed-8k": "LoRA, packed 8k",
    "full-1b": "1B, all weights",
}
WIDTH, LABELS, FIGURES, BAR, GAP, HEAD = 760, 230, 130, 18, 8, 34
"""Pixels: of the picture, of the names left of the bars and the figures right of them, of a bar, between rows, of a title."""
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 } .quiet { fill: #59636e }
.axolotl { fill: #d1477a } .peer { fill: #8c959f }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .quiet { fill: #9198a1 } .peer { fill: #656c76 } }
"""


@dataclass(frozen=True)
class Bar:
    name: str
    library: str
    tokens_per_second: int
    peak_gib: float


def bars(result: dict[str, dict[str, dict[str, dict[str, float]]]]) -> list[Bar]:
    """The runs of one file in the order of ROWS, ours first in each; `result["rows"][row][library]` are the figures."""
    return [
        Bar(name, library, round(run["tokens_per_second"]), run["peak_gib"])
        for row, name in ROWS.items()
        for library, run in sorted(
            result["rows"].get(row, {}).items(), key=lambda each: (each[0] != "axolotl", each[0])
        )
        if run.get("tokens_per_second")
    ]


def picture() -> str:
    """The whole SVG."""
    files = [json.loads((ROOT / "benchmarks" / "results" / f"{n}.json").read_text("utf-8")) for n in RESULTS]
    panels = [(next(iter(each["starts"].values()))["card"], bars(each)) for each in files]
    longest = max(bar.tokens_per_second for _, panel in panels for bar in panel)
    parts, y = [], 0
    for card, panel in panels:
        y += HEAD
        title = f"{card}: tokens per second, 8B with LoRA r=32, 2 × 4,096 tokens"
        parts.append(f'<text class="title" x="0" y="{y - 12}">{html.escape(title)}</text>')
        for bar in panel:
            length = round((WIDTH - LABELS - FIGURES) * bar.tokens_per_second / longest)
            kind, middle = "axolotl" if bar.library == "axolotl" else "peer", y + BAR - 5
            parts += [
                f'<text x="0" y="{middle}">{html.escape(bar.name)}</text>',
                f'<text class="quiet" x="{LABELS - 10}" y="{middle}" text-anchor="end">{html.escape(bar.library)}</text>',
                f'<rect class="{kind}" x="{LABELS}" y="{y}" width="{length}" height="{BAR}" rx="2"/>',
                f'<text x="{LABELS + length + 6}" y="{middle}">{bar.tokens_per_second:,} '
                f'<tspan class="quiet">{bar.peak_gib:.1f} GiB</tspan></text>',
            ]
            y += BAR + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def main() -> None:
    drawn = picture()
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(drawn, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != drawn:
        sys.exit("docs/images/gpu-speed.svg is not that of the results: run `make docs`.")


if __name__ == "__main__":
    main()
