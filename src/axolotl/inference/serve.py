"""vllm-serve: hands a finished model, or base and adapter, to vLLM with the arguments that it needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from axolotl.errors import ConfigError, Problem
from axolotl.inference.loading import Trained
from axolotl.model.files import read_json

if TYPE_CHECKING:
    from axolotl.config.method_blocks import Vllm

# The ranks that vLLM can reserve room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_command(
    base_model: str,
    trained: Trained,
    vllm: Vllm,
    *,
    trust_remote_code: bool = False,
    python: Sequence[str] = (sys.executable, "-m", "vllm.entrypoints.cli.main"),
) -> list[str]:
    """The command that serves what was trained, as `base_model` or the adapter's own name.

    Raises ConfigError for options of `vllm` that today's vLLM does not have, and for an adapter that it cannot serve.
    """
    problems = []
    if vllm.device != "auto":
        problems.append(("`vllm.device`: today's vLLM finds its device itself.", "Remove the line."))
    if vllm.serve_module is not None:
        problems.append(
            (
                "`vllm.serve_module`: serving goes through `vllm serve`.",
                "Remove the line, or start the module itself.",
            )
        )
    if vllm.enable_reasoning and not vllm.reasoning_parser:
        problems.append(
            ("`vllm.enable_reasoning` needs `vllm.reasoning_parser`.", "Name the parser, such as `qwen3`.")
        )
    command = [*python, "serve", str(trained.model or base_model)]
    if trained.adapter is not None:
        config = read_json(trained.adapter / "adapter_config.json")
        whole = [*(config.get("modules_to_save") or ()), *(config.get("trainable_token_indices") or ())]
        if config.get("peft_type") != "LORA" or config.get("use_dora") or whole:
            kind = "DoRA" if config.get("use_dora") else str(config.get("peft_type"))
            what = f"{kind} adapter" + (" with embeddings or layers of its own" if whole else "")
            problems.append(
                (
                    f"vLLM cannot serve `{trained.adapter}`, a {what}.",
                    "Merge it first: axolotl merge-lora config.yml",
                )
            )
        rank = max([int(config.get("r") or 8), *(config.get("rank_pattern") or {}).values()])
        room = next((r for r in _RANKS if r >= rank), rank)
        name = Path(trained.adapter).resolve().name
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(room),
            "--lora-modules",
            f"{name}={trained.adapter}",
        ]
        # Else vLLM lays chats out, and ends answers, as the base model does.
        if (trained.adapter / "tokenizer_config.json").is_file():
            command += ["--tokenizer", str(trained.adapter)]
        if (trained.adapter / "generation_config.json").is_file():
            command += ["--generation-config", str(trained.adapter)]
    if problems:
        raise ConfigError(
            Problem(message, remedy, "invalid_value", ("vllm",)) for message, remedy in problems
        )
    for flag, value in (
        ("--host", vllm.host),
        ("--port", vllm.port),
        ("--dtype", vllm.dtype),
        ("--gpu-memory-utilization", vllm.gpu_memory_utilization),
        ("--tensor-parallel-size", vllm.tensor_parallel_size),
        ("--data-parallel-size", vllm.data_parallel_size),
        ("--max-model-len", vllm.max_model_len),
        ("--reasoning-parser", vllm.reasoning_parser),
        ("--worker-extension-cls", vllm.worker_extension_cls),
    ):
        if value is not None:
            command += [flag, str(value)]
    if vllm.enable_prefix_caching is not None:
        command.append(f"--{'' if vllm.enable_prefix_caching else 'no-'}enable-prefix-caching")
    if vllm.enforce_eager:
        command.append("--enforce-eager")
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command
