"""`axolotl publish`: uploads what was trained to the Hub."""

from __future__ import annotations

from pathlib import Path

from axolotl import console
from axolotl.config import Config
from axolotl.distributed.world import detect_hardware
from axolotl.errors import ConfigError, Problem
from axolotl.model.hub import check_upload
from axolotl.run.ready import ready, refuse, told_with_places
from axolotl.weights.publish import files_to_publish
from axolotl.weights.publish import publish as upload


@told_with_places
def publish(cfg: Config, *, folder: Path | None = None) -> str:
    """Uploads the finished weights of output_dir, or those of `folder`, to `hub_model_id`; returns the address.

    Raises ConfigError without `hub_model_id`, ModelError for a folder without weights, EnvironmentProblem where the Hub
    cannot be reached or refuses.
    """
    cfg = ready(cfg, detect_hardware())
    if not cfg.output.hub_model_id:
        raise ConfigError(
            Problem(
                "`hub_model_id` does not say where to upload to.", "Add it.", "missing", ("hub_model_id",)
            )
        )
    source = Path(folder or cfg.output.output_dir).expanduser()
    names = files_to_publish(source)
    refuse(check_upload(cfg.output.hub_model_id))
    console.note(f"Uploading {len(names)} files of {source} to {cfg.output.hub_model_id} …")
    address = upload(source, cfg.output)
    console.success(f"Uploaded: {address}")
    return address
