"""How soon `axolotl --help` answers and a wrong config is told, beside the bare interpreter and the bare click.

usage: python benchmarks/startup.py [runs]      limits: help ≤ 0.3 s, wrong config ≤ 0.7 s, both the best of the runs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from measure import PROJECT, axolotl, python, quiet_environment, record, spread, timed

WRONG = "base_model: some/model\nlora_rnk: 8\nsequence_len: -1\nadapter: lorra\n"


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yml"
        wrong.write_text(WRONG, encoding="utf-8")
        commands = {
            "python": python("-c", "pass"),
            "python_click": python("-c", "import click"),
            "help": axolotl("--help"),
            "wrong_config": axolotl("train", wrong),
            "right_config_checked": axolotl(
                "check", "--config-only", PROJECT / "examples/llama-3/lora-8b.yml"
            ),
            "python_torch": python("-c", "import torch"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(runs):
            for name, command in commands.items():
                if name == "python_torch" and number >= 3:
                    continue
                took, done = timed(command, env=quiet_environment(), cwd=PROJECT)
                assert done.returncode == (2 if name == "wrong_config" else 0), (name, done.stderr)
                seconds[name].append(took)
    figures = {name: spread(values) for name, values in seconds.items()}
    best = {name: min(values) for name, values in seconds.items()}
    ratios = {
        "help_over_python": round(best["help"] / best["python"], 2),
        "help_over_python_click": round(best["help"] / best["python_click"], 2),
        "wrong_config_over_importing_torch": round(best["wrong_config"] / best["python_torch"], 2),
    }
    limits = {"help_0.3_s": best["help"] <= 0.3, "wrong_config_0.7_s": best["wrong_config"] <= 0.7}
    record("startup", {"seconds": figures, "ratios": ratios}, limits)


if __name__ == "__main__":
    main()
