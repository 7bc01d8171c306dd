"""Models without weights keep what belongs together."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl.model.empty import build_empty, keys_in_files, put_on_meta, put_placeholders, read_files


def test_a_head_that_is_the_embedding_stays_it(tiny_chatml: Path) -> None:
    config = AutoConfig.from_pretrained(str(tiny_chatml))
    model = build_empty(AutoModelForCausalLM, config, torch.float32, None)
    files = read_files(tiny_chatml)
    assert files is not None
    # The head is not in the files, and is not looked for.
    assert keys_in_files(model, files) is not None
    for step in (put_placeholders, put_on_meta):
        step(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
