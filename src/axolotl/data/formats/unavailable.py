"""Types that configs carry and that are not built: named, so that the answer says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.data.formats.registry import Convert, formats
from axolotl.errors import ConfigError

if TYPE_CHECKING:
    from axolotl.config.data import DataSection, DatasetEntry


def _absent(entry: DatasetEntry, data: DataSection) -> Convert:
    raise ConfigError(f"the dataset type `{entry.type}` is not available yet.")


formats.register(
    "creative_acr.load_critique",
    "creative_acr.load_revise",
    "reflection",
    unavailable="its long fixed prompt is not known here to the letter. A mapping under `type:` (field_instruction, "
    "field_output, format) writes any prompt.",
)(_absent)

formats.register(
    "stepwise_supervised",
    unavailable="its labels grade steps, for process reward models, which cannot be trained yet. `type: completion` "
    "trains on plain text.",
)(_absent)

formats.register(
    "bradley_terry.chat_template", "bradley_terry.llama3", unavailable="it comes with reward models."
)(_absent)

formats.register(
    "chatml.default",
    "chatml.argilla",
    "chatml.argilla_chat",
    "chatml.icr",
    "chatml.intel",
    "chatml.prompt_pairs",
    "chatml.ultra",
    "llama3.default",
    "llama3.argilla",
    "llama3.argilla_chat",
    "llama3.icr",
    "llama3.intel",
    "llama3.prompt_pairs",
    "llama3.ultra",
    "chat_template.argilla",
    "chat_template.argilla_chat",
    "zephyr.nectar",
    "passthrough",
    "user_defined.default",
    unavailable="its rows hold preferred and rejected answers, and nothing here learns from pairs yet. A mapping under "
    "`type:` (field_instruction, field_output) trains on one of them.",
)(_absent)

formats.register(
    "ebft_chat_multiturn.transform",
    "ebft_opencode.transform",
    "ebft_pretrain.transform",
    "ebft_reasoning.transform",
    "ebft_strided_chat.transform",
    "ebft_strided_structured.transform",
    "ebft_chat_multiturn.transform_last_turn",
    "ebft_chat_multiturn.transform_all_turns",
    "ebft_reasoning.transform_split_thinking",
    "ebft_reasoning.transform_answer_only",
    "ebft_reasoning.transform_strided",
    unavailable="it comes with energy-based fine-tuning.",
)(_absent)

formats.register("diffusion_decision.jsonl", unavailable="it comes with diffusion language models.")(_absent)
