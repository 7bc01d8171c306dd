"""What an earlier run's weights were made into is set aside when new weights take their place."""

from __future__ import annotations

from pathlib import Path

from axolotl.console import note

_MADE_OF_WEIGHTS = (
    "merged",
    "merged-unverified",
    "quantized",
    "evaluation.json",
    "evaluation.csv",
    "lm_eval.json",
)


def set_aside(output_dir: Path) -> Path | None:
    """Moves merged and quantised models and evaluations of earlier weights into `earlier`, `earlier-2`, ...

    Returns that folder; None where there was nothing. Left in place they would be served, or taken for figures of the
    new weights.
    """
    stale = [output_dir / name for name in _MADE_OF_WEIGHTS if (output_dir / name).exists()]
    if not stale:
        return None
    number = 1
    while (target := output_dir / (f"earlier-{number}" if number > 1 else "earlier")).exists():
        number += 1
    target.mkdir()
    for path in stale:
        path.rename(target / path.name)
    names = ", ".join(f"`{path.name}`" for path in stale)
    note(f"{names} came from the weights that were here before: moved to `{target}`.")
    return target
