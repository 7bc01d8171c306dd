"""The run report: what it says of a run that is complete, going on, damaged or hostile, and that it needs nothing else."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from axolotl.errors import EnvironmentProblem
from axolotl.report.curves import MOST_POINTS, curve, number, thinned, ticks
from axolotl.report.run import render_run_report, write_run_report

CHROMIUM = next(
    (
        c
        for c in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
        if Path(c).exists()
    ),
    None,
)


def a_run(folder: Path, steps: int = 8, *, complete: bool = True, **run: Any) -> Path:
    """An output_dir as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"kind": "eval", "step": 0, "eval_loss": 4.5, "eval_ppl": 90.0, "time": 1.7e9}
    ]
    for step in range(1, steps + 1):
        line = {
            "kind": "train",
            "step": step,
            "loss": None if step == 3 else 4.0 / step,
            "learning_rate": 1e-4 * step,
            "grad_norm": 1.5,
            "tokens": 100 * step,
            "trained_tokens": 60 * step,
            "tokens_per_second": 1234.0,
            "peak_memory_gib": 2.5,
            "data_seconds": 0.1,
            "forward_seconds": 0.3,
            "backward_seconds": 0.5,
            "optimizer_seconds": 0.1,
            "time": 1.7e9 + step,
        }
        lines.append(line)
        if step == 3:
            lines.append(
                {"kind": "event", "step": 2, "message": "The loss of step 3 is <not> finite", "time": 1.7e9}
            )
        if step % 4 == 0:
            lines.append(
                {"kind": "eval", "step": step, "eval_loss": 3.0 - step / 10, "eval_ppl": 9.0, "time": 1.7e9}
            )
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "run_id": "abc",
        "complete": complete,
        "total_steps": steps,
        "asked": {
            "base_model": "some/model",
            "adapter": "lora",
            "datasets": [{"path": "a.jsonl"}],
            "note": "</code><script>alert(1)</script>",
        },
        "origins": {"base_model": "config.yml:1", "adapter": "--adapter"},
        "sources": ["my config.yml"],
        "warnings": ["`seed` is unset"],
        "environment": {"python": "3.11", "torch": "2.13", "git": "abc123-dirty"},
        "data": {
            "tokens_per_epoch": 800,
            "steps_per_epoch": 4,
            "epochs": 2.0,
            "packing": 0.93,
            "plan": "f00d",
        },
    } | run
    (folder / "run.json").write_text(json.dumps(values))
    return folder


def test_it_says_what_a_run_was(tmp_path: Path) -> None:
    page = render_run_report(a_run(tmp_path / "out"))
    assert '<span id="state">complete</span>' in page
    assert '<b id="steps">8 of 8</b>' in page
    assert '<b id="loss">4 → 0.5</b>' in page
    assert '<b id="best">2.2</b>best evaluation loss, step 8' in page
    for name in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory"):
        assert f'aria-label="{name} by step"' in page
    # A step without a number leaves a gap: two stretches, and three dots for the evaluations.
    loss = page[page.index('aria-label="Loss by step"') : page.index('aria-label="Learning rate by step"')]
    assert loss.count("<polyline") == 2
    assert loss.count("<circle") == 3
    evaluation = page[page.index('id="evaluation"') :]
    assert evaluation[: evaluation.index("</table>")].count("<tr>") == 4
    text = html.unescape(page)
    assert "0.8 s, 10.0%" in text and "4 s, 50.0%" in text
    assert (
        '<td><code>base_model</code></td><td><code>some/model</code></td><td class="soft">config.yml:1</td>'
        in page
    )
    assert "a.jsonl" in page and "93.0%" in page and "abc123-dirty" in page
    assert "`seed` is unset" in text and "step 2: The loss of step 3 is <not> finite" in text


def test_it_names_the_commands_to_go_on(tmp_path: Path) -> None:
    done = html.unescape(render_run_report(a_run(tmp_path / "out")))
    folder = tmp_path / "out"
    assert f"axolotl merge-lora 'my config.yml' --lora-model-dir {folder}" in done
    assert f"axolotl inference 'my config.yml' --lora-model-dir {folder} --chat" in done
    assert "auto-resume" not in done
    broken = html.unescape(render_run_report(a_run(tmp_path / "out", complete=False)))
    assert "axolotl train 'my config.yml' --auto-resume-from-checkpoints" in broken
    torchrun = ["--launcher", "torchrun", "--", "--nproc-per-node=2"]
    several = html.unescape(
        render_run_report(a_run(tmp_path / "out", complete=False, launch_options=torchrun))
    )
    assert f"--auto-resume-from-checkpoints {' '.join(torchrun)}" in several
    assert "not complete; the last step was logged" in broken
    full = html.unescape(render_run_report(a_run(tmp_path / "out", asked={"base_model": "m"})))
    assert "merge-lora" not in full and f"--base-model {folder}" in full


def test_it_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    page = render_run_report(a_run(tmp_path / "out"))
    assert not re.search(r"https?://|src=|href=|@import|url\(|<script|<link|<iframe", page)
    assert "&lt;script&gt;" in page


def test_checkpoints_are_listed_with_what_is_wrong(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out")
    for name, size in (("checkpoint-4", 3), ("checkpoint-8", 5)):
        (folder / name).mkdir()
        (folder / name / "a").write_text("abc")
        (folder / name / "manifest.json").write_text(
            json.dumps({"files": {"a": {"size": size, "sha256": ""}}})
        )
    page = render_run_report(folder)
    assert "<code>checkpoint-4</code></td><td>whole" in page
    assert "<code>checkpoint-8</code></td><td>a has 3 bytes instead of 5" in page


@pytest.mark.parametrize("left", ["run.json", "run.jsonl"])
def test_half_a_record_still_gives_a_report(tmp_path: Path, left: str) -> None:
    folder = a_run(tmp_path / "out", complete=False)
    for name in {"run.json", "run.jsonl"} - {left}:
        (folder / name).unlink()
    page = render_run_report(folder)
    assert ("8 of 0" if left == "run.jsonl" else "no step logged yet") in page


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out", complete=False)
    with (folder / "run.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 9, "lo')
    assert '<b id="steps">8 of 8</b>' in render_run_report(folder)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="holds no run"):
        write_run_report(tmp_path)


def test_the_command_prints_where_the_report_is(tmp_path: Path, axolotl: Any) -> None:
    folder = a_run(tmp_path / "out")
    done = axolotl("report", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "run_report.html")
    assert not list(folder.glob(".*"))
    assert axolotl("report", tmp_path).returncode == 2


@pytest.mark.browser
def test_it_opens_in_a_browser(tmp_path: Path) -> None:
    file = write_run_report(a_run(tmp_path / "out", 2000))
    page = file.read_text()
    assert len(page) < 400_000
    assert page.count("<svg") == page.count("</svg>") == 6
    assert CHROMIUM, "no Chromium is installed"
    shot = tmp_path / "page.png"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--screenshot={shot}",
        "--window-size=1000,3000",
    ]
    subprocess.run([*command, f"file://{file}"], check=True, capture_output=True, timeout=120)
    dumped = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{file}"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert shot.stat().st_size > 20_000
    assert "2,000 of 2,000" in dumped


def test_curves() -> None:
    made = curve("loss", "", [(1, 2.0), (2, 1.0), (3, math.nan), (4, 0.5)], [(4, 0.7)])
    assert made is not None
    assert [line.count(",") for line in made.lines] == [2, 1]
    first, second = (tuple(map(float, p.split(","))) for p in made.lines[0].split())
    assert first[0] == made.left and first[1] < second[1] <= made.bottom
    assert made.dots[0][0] == made.right and made.last == "0.5"
    assert curve("loss", "", [(1, math.nan)]) is None
    flat = curve("lr", "", [(1, 1.0), (2, 1.0)])
    assert flat is not None and len({p.split(",")[1] for p in flat.lines[0].split()}) == 1
    many = thinned([(i, float(i)) for i in range(10_000)])
    assert len(many) <= MOST_POINTS and many[-1][0] == 9999
    assert ticks(0, 10, 5, whole=True) == [0, 2, 4, 6, 8, 10]
    assert ticks(1, 1, 5, whole=True) == [1]
    assert [number(x) for x in (0, 12345.6, 0.00012)] == ["0", "12,346", "0.00012"]
