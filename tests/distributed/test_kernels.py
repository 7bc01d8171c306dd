"""Our kernels under DDP, in Triton's interpreter; and what DDP sends: trained gradients only, once a step, early."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.runs import Runs, furthest

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


@pytest.mark.extras
@pytest.mark.slow
def test_kernels_on_two_processes_have_the_losses_of_plain_torch_on_one(
    tmp_path: Path, tiny_llama3: Path
) -> None:
    pytest.importorskip("triton")
    runs = Runs(
        tmp_path, tiny_llama3, **LORA, sequence_len=64, max_steps=2, save_strategy="no", save_steps=None,
        val_set_size=0, gradient_accumulation_steps=2,
    )  # fmt: skip
    runs.run("plain")
    said = runs.run(
        "fused",
        *("--num-processes", "2", "--gradient-accumulation-steps", "1", "--fused-kernels", "true"),
        timeout=900,
        TRITON_INTERPRET="1",
    )
    for kernel in ("RMS norm", "rotary", "LoRA feed-forward layer", "fused loss"):
        assert kernel.lower() in said.lower().partition("kernels:")[2].splitlines()[0], said
    assert furthest(runs.losses("plain"), runs.losses("fused")) < 1e-4
    assert furthest(runs.weights("plain"), runs.weights("fused")) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_only_trained_gradients_travel_once_a_step_and_while_others_are_computed(
    tmp_path: Path, tiny_llama3: Path, kind: str
) -> None:
    keys = LORA | {"fused_kernels": True} if kind == "lora" else {"ddp_bucket_cap_mb": 1}
    runs = Runs(
        tmp_path, tiny_llama3, **keys, max_steps=3, save_strategy="no", save_steps=None, val_set_size=0,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    traffic = tmp_path / "traffic"
    runs.run("out", "--num-processes", "2", "--plugins", "[traffic]", TRAFFIC=str(traffic))
    for rank in (0, 1):
        first, *lines = Path(f"{traffic}-{rank}").read_text().splitlines()
        trained = int(first.split()[1])
        steps = "\n".join(lines).split("step")[:3]
        for step in steps:
            events = step.split("\n")
            assert sum(int(e.split()[1]) for e in events if e.startswith("sent")) == trained
            assert events.count("last gradient") == 2, "two micro batches"
        # DDP orders its buckets by the first step; from the second on the first one leaves early.
        events = [e for e in steps[2].split("\n") if e]
        if kind == "full":
            # After the first micro batch nothing is sent; in the second, before the backward pass has ended.
            second = events[events.index("last gradient") + 1 :]
            assert second[0].startswith("sent") and len([e for e in second if e.startswith("sent")]) > 2
            assert second.index("last gradient") > 1
        else:
            assert trained < 4 * 50_000
