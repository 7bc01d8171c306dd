"""The page docs/config.md: every key with type, default, meaning and state; old keys; the rules across keys."""

from __future__ import annotations

from pydantic import BaseModel

from axolotl.config.descriptions import default_text, meaning, old_keys, state, type_of
from axolotl.config.keys import SECTIONS, nested
from axolotl.config.plugins import INTEGRATIONS
from axolotl.config.rules import RULES
from axolotl.config.section import default_of, facts

_HEAD = """\
# The config

One flat YAML file. Each key below belongs to one section; `axolotl explain KEY` tells the same at the terminal, and
`axolotl explain config.yml` where each value of a file came from. This page is generated from the source:
`python -m axolotl.cli.document`.

- `null` and an empty value mean "not set", and so does `false` where a key takes no boolean.
- A key that is not known is an error with its line and the nearest key. So is a key that stands twice.
- Several files are merged from left to right, and overrides come last: `axolotl train base.yml mine.yml --lora-r 8
  --no-sample-packing --datasets[0].path my.jsonl`. Mappings are merged key by key, everything else is replaced.
- `${NAME}` stands for an environment variable in keys that hold paths and names (`base_model`, `output_dir`,
  `datasets[].path`, `hub_…`, `wandb_…` and other trackers); `${NAME:-fallback}` works too. It is never replaced in
  templates.
- A config may also be an `https://` address, or `hf://owner/repo/file.yml`.
- Keys, tokens and passwords are neither printed nor saved.

States: **available**; *validated*: the key is checked, but its feature cannot run yet; *unavailable*: known, but not
built yet, so any value but "off" is refused; *idle*: accepted with a warning, since nothing is lost without it.
"""

_CHOICES = """\
## Where files contradict themselves

Some combinations that real files carry are read for the user's safety:

- `evals_per_epoch` without anything to evaluate on is a warning; so are `eval_steps` and `eval_strategy`, unless
  `val_set_size: 0` is written beside them, which is an error.
- An old boolean such as `flash_attention` beside `attn_implementation` is an error within one file, unless the latter
  names a kernel on the Hub of the same kind; a later file or an override wins over an earlier one.
- `0` means "off" for figures that cannot be 0, such as `save_steps`, `eval_steps`, `save_total_limit` and
  `neftune_noise_alpha`.
- `bf16: true` beside `fp16: true` is an error: neither is chosen silently. `cosine_constant_lr_ratio` without
  `cosine_min_lr_ratio` is one too: most of the run would learn nothing.
- A fused kernel that does not fit (LoRA kernels on 8-bit weights, a fused loss in float32) is a warning: the plain path
  computes the same.
- `trust_remote_code` and `gradio_share` are false unless they are written.
- `lora_r` and its like without `adapter` are a warning: the whole model is trained.
"""


def config_page() -> str:
    """The whole page as Markdown."""
    lines = [_HEAD]
    for section in SECTIONS.values():
        lines += [f"## {section.title}", "", (section.__doc__ or "").strip(), "", *_table(section), ""]
    places: dict[type[BaseModel], list[str]] = {}
    for home in nested():
        if home.parent not in places.setdefault(home.block, []):
            places[home.block].append(home.parent)
    for block, parents in places.items():
        heading = ", ".join(f"`{parent}`" for parent in parents)
        lines += [f"## {heading}", "", (block.__doc__ or "").strip(), "", *_table(block), ""]
    lines += [
        _CHOICES,
        "## Plugins",
        "",
        "Names that stand in old files under `plugins:`; any other name is a module of your own, or an entry point",
        "of the group `axolotl.plugins`.",
        "",
        "| `axolotl.integrations.…` | |",
        "|---|---|",
    ]
    for name, feature in INTEGRATIONS.items():
        lines.append(
            f"| `{name}` | {'built in: its keys work without it' if feature is None else f'unavailable: {feature}'} |"
        )
    lines += ["", "## Old keys", "", "| key | state | today |", "|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {_cell(text)} |" for key, (kind, text) in old_keys().items()]
    lines += ["", "## Rules across keys", "", "| rule | keys |", "|---|---|"]
    lines += [f"| {_cell(rule.doc)} | {', '.join(f'`{k}`' for k in rule.keys)} |" for rule in RULES]
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel]) -> list[str]:
    lines = ["| key | takes | default | meaning | state |", "|---|---|---|---|---|"]
    for key, field in model.model_fields.items():
        said = facts(model, key)
        required = said.get("required") or field.is_required()
        default = "required" if required else f"{default_text(default_of(model, key))}"
        how = state(model, key)
        told = how if how == "available" else f"*{how}*: {said['feature']}"
        lines.append(
            f"| `{key}` | {_cell(type_of(model, key))} | {_cell(default)} | {_cell(meaning(model, key))} | {told} |"
        )
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
