"""Supervised fine-tuning: predict the trained tokens of each row."""

from __future__ import annotations

from axolotl.methods.registry import Method, methods

SFT = methods.register("sft")(
    Method(name="sft", trainer="transformers.Trainer", arguments="transformers.TrainingArguments")
)
