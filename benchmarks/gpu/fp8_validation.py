"""Is LoRA on an 8-bit base (`lora_fp8_base: true`) as good as on a bf16 base, where the weights were trained?

    python benchmarks/gpu/fp8_validation.py --out benchmarks/results/gpu-fp8-validation.json    # about 9 minutes on an H100
    python benchmarks/gpu/fp8_validation.py --tiny --work /tmp/w --out /tmp/fp8.json            # the same program on a CPU

A language model is trained from nothing by `axolotl train` on Python's standard library as it is installed (sources and
the texts of its documentation, 20 MB at most). Files that it never saw give a task: from the source of a function, say
its parameters and the first word of its docstring (`-` without one). LoRA learns it from other files, once for each seed on the bf16 base
and on the 8-bit one; a seed decides the adapter's start and the order of the rows, the same for both. Every adapter is
then put on the bf16 base by plain transformers and PEFT, as it would be served, and asked rows of files that neither
training saw: loss, and exact match.

Stated before any run: the bound within which two means count as the same is 2 % of the bf16 mean for the loss and 2
points for exact match. *Different*: an exact two-sided permutation test over all ways to divide the runs says p <= 0.05
and the difference lies beyond the bound. *Not distinguishable*: p > 0.05, and both one-sided sign-flip tests of the
seeds' paired differences against the bound say p <= 0.05 (five seeds are the fewest that can). Else *undecided*.

A step that is done is not done again: the same command goes on from `--work` and from the JSON, and the base model from
its last checkpoint. `--seconds` begins nothing that would not end in time.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed import card, versions

BOUND = {"loss": ("relative", 0.02), "exact_match": ("points", 0.02)}
ARMS = {"bf16": {}, "fp8": {"lora_fp8_base": True}}
END = "<|endoftext|>"
FULL: dict[str, Any] = {
    "files": 10_000, "bytes": 20_000_000, "vocabulary": 16384, "length": 1024, "hidden": 1024, "inner": 2816, "layers": 14, "heads": 16,
    "batch": 32, "epochs": 5, "rows": 4000, "asked": 500, "task_length": 512, "task_batch": 32, "task_epochs": 2,
    "save": 200, "rate": 6e-4, "task_rate": 5e-4,
}  # fmt: skip
TINY: dict[str, Any] = {
    "files": 40, "bytes": 150_000, "vocabulary": 600, "length": 128, "hidden": 64, "inner": 128, "layers": 2, "heads": 2, "batch": 8,
    "epochs": 1, "rows": 24, "asked": 8, "task_length": 256, "task_batch": 8, "task_epochs": 1, "save": 20, "rate": 2e-3,
    "task_rate": 1e-3,
}  # fmt: skip


class OutOfTime(Exception):
    """The next step would not end in time."""


class Clock:
    """Seconds that this call still has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.time() + seconds

    def left(self) -> float:
        return self.end - time.time()

    def need(self, seconds: float, what: str) -> None:
        if self.left() < seconds:
            raise OutOfTime(f"{what} needs about {seconds:.0f} s; {max(0, self.left()):.0f} s are left")


# --- text ---------------------------------------------------------------------------------------------------------


def sources() -> list[tuple[str, str]]:
    """(name, text) of every Python file of the standard library, in an order that does not follow its folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts)]
    files.sort(key=lambda f: hashlib.sha256(str(f.relative_to(root)).encode()).hexdigest())
    found = ((str(f.relative_to(root)), f.read_text(encoding="utf-8", errors="replace")) for f in files)
    return [(name, text) for name, text in found if len(text) > 200]


def divided(files: Sequence[tuple[str, str]], most: int) -> dict[str, list[tuple[str, str]]]:
    """The files in three heaps that share none: 2 of 20 to ask, 4 of 20 for the task, the rest to read."""
    parts: dict[str, list[tuple[str, str]]] = {"asked": [], "task": [], "read": []}
    size = 0
    for i, file in enumerate(files):
        heap = "asked" if i % 20 < 2 else "task" if i % 20 < 6 else "read"
        if heap != "read" or size + len(file[1].encode()) <= most:
            parts[heap].append(file)
            size += len(file[1].encode()) if heap == "read" else 0
    return parts


def questions(files: Sequence[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    """(source of a function, its answer), one for each function with parameters; `-` where there is no docstring."""
    found = []
    for _, text in files:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            words = (ast.get_docstring(node) or "").split() or ["-"]
            named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            named = [name for name in named if name not in ("self", "cls")]
            # The standard function reads the whole file once for each of its functions.
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
            if named and len(words[0]) < 20:
                found.append((source[:characters], f"{', '.join(named)} | {words[0]}"))
    return found


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def segments(rows: Sequence[tuple[str, str]]) -> str:
    def row(question: str, answer: str) -> dict[str, Any]:
        asked = {"label": False, "text": f"{question}\n# parameters and first word: "}
        return {"segments": [asked, {"label": True, "text": f"{answer}{END}"}]}

    return "".join(json.dumps(row(*each)) + "\n" for each in rows)


def prepare(work: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Text, tokenizer, blocks of tokens and the task's rows; returns what they hold."""
    said = work / "prepared.json"
    if said.is_file():
        return dict(json.loads(said.read_text()))
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    work.mkdir(parents=True, exist_ok=True)
    parts = divided(sources(), size["bytes"])
    texts = [text for _, text in parts["read"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size["vocabulary"] - 1, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(work / "shape")
    LlamaConfig(
        vocab_size=-(-len(fast) // 64) * 64,
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(work / "shape")  # type: ignore[no-untyped-call]
    stream = np.concatenate([[*each.ids, fast.eos_token_id] for each in tokenizer.encode_batch(texts)])
    length = size["length"]
    blocks = stream[: len(stream) // length * length].reshape(-1, length).tolist()
    columns = {"input_ids": blocks, "labels": blocks, "attention_mask": [[1] * length] * len(blocks)}
    pq.write_table(pa.table(columns), work / "read.parquet")
    draw = random.Random(0)
    counts = {}
    for name, most in (("task", size["rows"]), ("asked", size["asked"])):
        rows = questions(parts[name][: size["files"]], 2 * size["task_length"])
        draw.shuffle(rows)
        # A function that stands in both heaps, as a copy, would be asked though it was learned.
        known = set((work / "task.jsonl").read_text().splitlines()) if name == "asked" else set()
        rows = [row for row in dict.fromkeys(rows) if segments([row]).strip() not in known][:most]
        (work / f"{name}.jsonl").write_text(segments(rows), encoding="utf-8")
        counts[name] = len(rows)
    holds = {
        "python": sys.version.split()[0],
        "files": len(texts),
        "bytes": sum(len(t.encode()) for t in texts),
        "sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "tokens": len(blocks) * length,
        "blocks": len(blocks),
        "rows": counts,
    }
    write_json(said, holds)
    return holds


# --- training -----------------------------------------------------------------------------------------------------


def config(work: Path, name: str, values: dict[str, Any], tiny: bool) -> Path:
    file = work / f"{name}.yml"
    usual = {
        "dataset_prepared_path": str(work / "prepared"),
        "output_dir": str(work / "runs" / name),
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": "auto",
        "tf32": "auto",
        "logging_steps": 1 if tiny else 10,
        "save_total_limit": 1,
    }
    file.write_text(json.dumps({**usual, **values}, indent=1), encoding="utf-8")  # JSON is YAML
    return file


def base_config(work: Path, size: dict[str, Any], blocks: int) -> Path:
    steps = max(2, blocks // size["batch"]) * size["epochs"]
    return config(
        work,
        "base",
        {
            "base_model": str(work / "shape"),
            "reinit_weights": True,
            "datasets": [{"path": str(work / "read.parquet"), "ds_type": "parquet"}],
            "sequence_len": size["length"],
            "micro_batch_size": size["batch"],
            "max_steps": steps,
            "learning_rate": size["rate"],
            "adam_beta2": 0.95,
            "warmup_steps": max(1, steps // 20),
            "save_steps": size["save"],
            "auto_resume_from_checkpoints": True,
            "seed": 1,
        },
        size is TINY,
    )


def task_config(work: Path, size: dict[str, Any], arm: str, seed: int) -> Path:
    return config(
        work,
        f"{arm}-{seed}",
        {
            # Its own, since several are prepared at the same time.
            "dataset_prepared_path": str(work / "prepared" / f"{arm}-{seed}"),
            "base_model": str(work / "runs" / "base"),
            "datasets": [{"path": str(work / "task.jsonl"), "ds_type": "json", "type": "input_output"}],
            "test_datasets": [{"path": str(work / "asked.jsonl"), "ds_type": "json", "type": "input_output"}],
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_linear": True,
            "sequence_len": size["task_length"],
            "micro_batch_size": size["task_batch"],
            "num_epochs": size["task_epochs"],
            "learning_rate": size["task_rate"],
            "warmup_ratio": 0.05,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "seed": seed,
            **ARMS[arm],
        },
        size is TINY,
    )


def finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    log = folder / "run.jsonl"
    weights = any((folder / n).is_file() for n in ("model.safetensors", "adapter_model.safetensors"))
    return weights and log.is_file() and any('"kind": "end"' in line for line in log.read_text().splitlines())


def start(file: Path) -> subprocess.Popen[str]:
    with file.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "axolotl", "train", str(file)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], file: Path, clock: Clock) -> bool:
    """Waits for a run. One that would go on beyond the end of the time is asked to save and stop: then False."""
    try:
        code = process.wait(max(1.0, clock.left()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if code:
        raise RuntimeError(f"{file}: exit {code}\n{file.with_suffix('.log').read_text()[-3000:]}")
    return True


def curve(folder: Path) -> dict[str, Any]:
    """What a run says of itself: its last losses, its steps and its speed."""
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    train = [line for line in lines if line.get("kind") == "train" and "loss" in line]
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "first_loss": train[0]["loss"],
        "last_loss": train[-1]["loss"],
        "steps": next(line["step"] for line in reversed(lines) if line.get("kind") == "end"),
        "eval_loss": evals[-1] if evals else None,
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in train)),
    }


# --- asking -------------------------------------------------------------------------------------------------------


def measured(work: Path, names: Sequence[str], batch: int) -> dict[str, dict[str, float]]:
    """Loss and exact match of each adapter on the bf16 base, by plain transformers and PEFT, greedily."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    base = work / "runs" / "base"
    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    lines = [json.loads(line)["segments"] for line in (work / "asked.jsonl").read_text().splitlines()]
    rows = sorted(((q["text"], a["text"]) for q, a in lines), key=lambda row: len(row[0]))
    found = {}
    for name in names:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model: Any = PeftModel.from_pretrained(plain, work / "runs" / name).to(device).eval()
        lost, tokens, matches = 0.0, 0, 0
        with torch.inference_mode():
            for at in range(0, len(rows), batch):
                part = rows[at : at + batch]
                asked = tokenizer([q for q, _ in part], return_tensors="pt", padding=True).to(device)
                answers = model.generate(
                    input_ids=asked["input_ids"],
                    attention_mask=asked["attention_mask"],
                    max_new_tokens=48,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
                said = tokenizer.batch_decode(
                    answers[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
                )
                matches += sum(s.strip() == a.removesuffix(END) for s, (_, a) in zip(said, part, strict=True))
            for at in range(0, len(rows), 25):
                both = [[tokenizer(text)["input_ids"] for text in row] for row in rows[at : at + 25]]
                most = max(len(before) + len(after) for before, after in both)
                ids = torch.full((len(both), most), tokenizer.pad_token_id, device=device)
                labels = torch.full((len(both), most), -100, device=device)
                for i, (before, after) in enumerate(both):
                    ids[i, : len(before) + len(after)] = torch.tensor(before + after)
                    labels[i, len(before) : len(before) + len(after)] = torch.tensor(after)
                # Padding stands behind: what is counted does not see it.
                logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
                lost += float(
                    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
                )
                tokens += sum(len(after) for _, after in both)
        found[name] = {"loss": lost / tokens, "exact_match": matches / len(rows)}
        del model, plain
    return found


# --- the test -----------------------------------------------------------------------------------------------------


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided permutation test of the difference of means, over every way to divide the runs."""
    both, n = [*a, *b], len(a)
    seen = abs(statistics.fmean(a) - statistics.fmean(b))
    total, far, ways = sum(both), 0, 0
    for chosen in itertools.combinations(both, n):
        part = sum(chosen)
        ways += 1
        far += abs(part / n - (total - part) / (len(both) - n)) >= seen - 1e-12
    return far / ways


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact one-sided test that the mean of paired differences lies above 0, over all signs."""
    seen = sum(differences)
    sums = (
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    )
    found = [each >= seen - 1e-12 for each in sums]
    return sum(found) / len(found)


def verdict(bf16: Sequence[float], fp8: Sequence[float], kind: str, bound: float) -> dict[str, Any]:
    """The stated test on values paired by seed."""
    room = bound * statistics.fmean(bf16) if kind == "relative" else bound
    pairs = [b - a for a, b in zip(bf16, fp8, strict=True)]
    difference = statistics.fmean(pairs)
    p = permutation_p(bf16, fp8)
    within = max(sign_flip_p([d + room for d in pairs]), sign_flip_p([room - d for d in pairs]))
    if p <= 0.05 and abs(difference) > room:
        word = "different"
    elif p > 0.05 and within <= 0.05:
        word = "not distinguishable"
    else:
        word = "undecided"
    return {
        "bf16_mean": statistics.fmean(bf16),
        "fp8_mean": statistics.fmean(fp8),
        "difference": difference,
        "bound": room,
        "p_permutation": p,
        "p_within_bound": within,
        "verdict": word,
    }


def judged(runs: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The verdict of each figure on the seeds that both arms have."""
    whole = [s for s in seeds if all("exact_match" in runs.get(f"{arm}-{s}", {}) for arm in ARMS)]
    if len(whole) < 2:
        return {"seeds": whole}
    tests: dict[str, Any] = {"seeds": whole}
    for figure, (kind, bound) in BOUND.items():
        arms = [[runs[f"{arm}-{s}"][figure] for s in whole] for arm in ARMS]
        tests[figure] = verdict(arms[0], arms[1], kind, bound)
    return tests


def run(args: argparse.Namespace, result: dict[str, Any], clock: Clock) -> None:
    """Every step that is not done yet; `result` and its file hold what was done, whatever happens."""
    size = TINY if args.tiny else FULL
    work: Path = args.work
    seeds = list(range(1, args.seeds + 1))

    def keep() -> None:
        result["test"] = judged(result["runs"], seeds)
        write_json(args.out, result)

    clock.need(0 if args.tiny else 60, "collecting the text")
    result["text"] = prepare(work, size)
    keep()
    base = work / "runs" / "base"
    if not finished(base):
        clock.need(0 if args.tiny else 45, "the base model")
        file = base_config(work, size, result["text"]["blocks"])
        if not ended(start(file), file, clock):
            raise OutOfTime("the base model goes on from its last checkpoint in the next call")
    result["base"] = {**curve(base), "parameters": parameters(base)}
    keep()
    names = [f"{arm}-{seed}" for seed in seeds for arm in ARMS]
    waiting = [name for name in names if not finished(work / "runs" / name)]
    longest = 0.0 if args.tiny else 60.0
    while waiting:
        clock.need(longest, "the next adapters")
        began, going = time.time(), []
        for name in waiting[: args.parallel]:
            arm, seed = name.rsplit("-", 1)
            file = task_config(work, size, arm, int(seed))
            going.append((file, start(file)))
        whole = [ended(process, file, clock) for file, process in going]
        if not all(whole):
            raise OutOfTime("adapters that were stopped are trained anew in the next call")
        longest = 1.2 * (time.time() - began)
        waiting = waiting[args.parallel :]
    for name in names:
        if "exact_match" not in result["runs"].get(name, {}):
            clock.need(0 if args.tiny else 25, "asking")
            figures = measured(work, [name], 8 if args.tiny else 125)[name]
            trained = curve(work / "runs" / name)
            result["runs"][name] = {**figures, **trained}
            keep()
    result["state"] = "complete"


def parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for n in shape:
            count *= n
        total += count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/axolotl-fp8-validation"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--parallel", type=int, default=3, help="adapters trained at the same time")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing that would end later")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on a CPU: proves the program, not fp8"
    )
    args = parser.parse_args()
    if args.seeds < 5 and not args.tiny:
        parser.error("fewer than 5 seeds can show nothing by the stated test")
    args.work = args.work.resolve()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": {}}
    result |= {
        "benchmark": "fp8_validation",
        "tiny": args.tiny,
        "bound": {k: list(v) for k, v in BOUND.items()},
        "state": "unfinished",
        "versions": versions(),
        "card": card(),
    }
    result.setdefault("starts", []).append(time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
    began = time.time()
    try:
        run(args, result, Clock(args.seconds))
    except OutOfTime as error:
        result["next"] = str(error)
    else:
        result.pop("next", None)
    result["seconds"] = round(result.get("seconds", 0) + time.time() - began, 1)
    write_json(args.out, result)
    shown = {k: result.get(k) for k in ("state", "next", "base", "test", "seconds")}
    print(json.dumps(shown), flush=True)
    sys.exit(0 if result["state"] == "complete" else 3)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
