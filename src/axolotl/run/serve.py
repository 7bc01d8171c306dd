"""`axolotl vllm-serve`: hands what was trained to vLLM."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
from pathlib import Path

from axolotl import console
from axolotl.config import Config
from axolotl.config.method_blocks import Vllm
from axolotl.distributed.world import detect_hardware
from axolotl.errors import EnvironmentProblem, ModelError
from axolotl.inference.loading import Trained, find_trained, nothing_trained
from axolotl.inference.serve import serve_command
from axolotl.model.files import WEIGHTS, WEIGHTS_INDEX
from axolotl.run.ready import named_on_purpose, ready, told_with_places


@told_with_places
def serve(cfg: Config, *, show: bool = False) -> int:
    """Starts vLLM on `{output_dir}/merged` where that is, else on what was trained; returns its exit code.

    `show`: print the command on stdout and start nothing. Raises ConfigError, ModelError and
    EnvironmentProblem before vLLM starts.
    """
    cfg = ready(cfg, detect_hardware())
    merged = Path(cfg.output.output_dir).expanduser() / "merged"
    found = find_trained(cfg.model, cfg.adapter, cfg.output.output_dir)
    if not cfg.adapter.lora_model_dir and any((merged / n).is_file() for n in (WEIGHTS, WEIGHTS_INDEX)):
        found = Trained(model=merged)
    if found.adapter is None and found.model is None:
        nothing = nothing_trained(cfg.model, cfg.adapter, cfg.output.output_dir)
        if nothing and not found.alone and not named_on_purpose(cfg):
            raise ModelError(nothing)
        console.note(f"`{cfg.model.base_model}` is served alone.")
    code = bool(cfg.model.trust_remote_code)
    vllm = cfg.method.vllm or Vllm()
    if show:
        console.out(
            shlex.join(
                serve_command(cfg.model.base_model, found, vllm, trust_remote_code=code, python=("vllm",))
            )
        )
        return 0
    command = serve_command(cfg.model.base_model, found, vllm, trust_remote_code=code)
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentProblem(
            "`axolotl vllm-serve` needs the package `vllm`, which is not installed.",
            "Install it with: pip install 'axolotl[vllm]'. `--show` prints the command for another machine.",
        )
    console.note(shlex.join(command))
    return subprocess.run(command, check=False).returncode
