"""What stands beside the weights of a finished model: configuration, generation configuration, tokenizer, own code."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from axolotl.model.load import align_special_tokens


def save_beside(
    part: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    *,
    rows: int,
    tied: bool,
    dtype: torch.dtype | None = None,
    stop_tokens: Sequence[str] = (),
) -> None:
    """Writes into `part` all that a model folder needs besides its weights.

    `source` is the folder that the generation configuration and a model's own code are taken from. `rows`: of the
    embeddings; `tied`: whether input and output embedding are one tensor; `dtype`: the weights' number type, where
    it is not the one that `config` says.
    """
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = rows
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        if each.tie_word_embeddings and not tied:
            each.tie_word_embeddings = False
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    if (source / "generation_config.json").is_file():
        shell.generation_config = GenerationConfig.from_pretrained(source)
    align_special_tokens(shell, tokenizer, stop_tokens)
    shell.config.use_cache = True
    if dtype is not None:
        shell.config.dtype = dtype
    shell.config.architectures = shell.config.architectures or [type(shell).__name__]
    shell.config.save_pretrained(part)
    # A model's own sampling values may contradict one another; they are the base's and kept as they are.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shell.generation_config.save_pretrained(part)
        except ValueError:
            shell.generation_config.do_sample = True
            shell.generation_config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for pattern in ("*.py", "preprocessor_config.json", "processor_config.json"):
        for file in source.glob(pattern):
            shutil.copy2(file, part / file.name)
