"""Loads the tokenizer that a config asks for: special tokens, added tokens, rewritten reserved tokens, a pad token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl.console import note, warn
from axolotl.errors import ModelError, Place, Problem
from axolotl.model.files import TOKENIZER_FILES, could_be_hub_id, local_folder, missing_folder
from axolotl.model.overrides import rewrite_added_tokens

if TYPE_CHECKING:
    from axolotl.config.model import ModelSection

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Tokens that published vocabularies keep free for padding, in the order in which they are preferred.
_PAD_LIKE = (
    "<|finetune_right_pad_id|>",
    "<|finetune_right_pad|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<PAD>",
    "<|padding|>",
    "<|vision_pad|>",
    "<unk>",
    "<|endoftext|>",
)
_RESERVED = re.compile(
    r"<\|?(reserved_special_token_|reserved_|dummy_|extra_id_|unused)\d+\|?>|\[control_\d+\]"
)
_PROBE = "Hello, world!  12345 naïve\n\tdef f(x): return x ** 2 # 日本語 🙂"


def load_tokenizer(
    model: ModelSection, adapter_dir: Path | None = None, *, place: Place | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model with the config's changes, always with a pad token and padding on the right.

    `adapter_dir`: a folder that training wrote. Where it holds a tokenizer, that one is used as it is, since the
    config's changes are in it already. Raises ModelError for a missing or unreadable tokenizer and for changes that
    contradict the vocabulary; `place` is where the config names the base model.
    """
    if adapter_dir is not None and _holds_tokenizer(Path(adapter_dir)):
        tokenizer = _read(model, str(adapter_dir), "lora_model_dir", place, own_class=False)
        tokenizer.padding_side = "right"
        _guarantee_pad(tokenizer)
        return tokenizer
    key = "tokenizer_config" if model.tokenizer_config else "base_model"
    tokenizer = _read(model, model.tokenizer_config or model.base_model, key, place)
    known = set(tokenizer.get_vocab())
    if model.added_tokens_overrides:
        tokenizer = rewrite_added_tokens(tokenizer, model.added_tokens_overrides)
    _set_special_tokens(tokenizer, _as_dict(model.special_tokens))
    if model.tokens:
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in model.tokens])
    tokenizer.padding_side = "right"
    _guarantee_pad(tokenizer)
    vocabulary = tokenizer.get_vocab()
    # A pad token is never attended to and never a target, so its row needs no training.
    new = [text for text in vocabulary if text not in known and text != tokenizer.pad_token]
    tokenizer.new_token_ids = sorted(vocabulary[text] for text in new)
    added = [text for text in vocabulary if text not in known and vocabulary[text] >= len(known)]
    if added:
        shown = ", ".join(f"`{t}`" for t in sorted(added, key=vocabulary.__getitem__)[:8])
        note(f"The vocabulary grows by {len(added)}: {shown}{' …' if len(added) > 8 else ''}.")
    return tokenizer


def new_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that the config brought in and that the base model has never been trained on."""
    return list(getattr(tokenizer, "new_token_ids", ()))


def _as_dict(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    plain = dict(value) if isinstance(value, Mapping) else value.model_dump(exclude_none=True)
    return {k: v for k, v in plain.items() if v is not None}


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _no_tokenizer(key: str, name: str, place: Place | None) -> Problem:
    return _said(
        key,
        f"`{key}: {name}` holds no tokenizer.",
        f"One of these files has to be there: {', '.join(TOKENIZER_FILES[:4])}.",
        place,
    )


def _read(
    model: ModelSection, name: str, key: str, place: Place | None, own_class: bool = True
) -> PreTrainedTokenizerBase:
    folder = local_folder(name)
    if folder is None and not could_be_hub_id(name):
        raise ModelError(missing_folder(key, name, place))
    if folder is not None and not _holds_tokenizer(folder):
        raise ModelError(_no_tokenizer(key, name, place))
    options: dict[str, Any] = {"use_fast": model.tokenizer_use_fast is not False}
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    if folder is None and model.revision_of_model and key == "base_model":
        options["revision"] = model.revision_of_model
    if model.tokenizer_legacy is not None:
        options["legacy"] = model.tokenizer_legacy
    source = str(folder) if folder is not None else name
    try:
        if own_class and model.tokenizer_type and model.tokenizer_type != "AutoTokenizer":
            tokenizer = _read_as(model.tokenizer_type, source, options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(explain_load_failure(error, key, name, "tokenizer", place)) from error
    return tokenizer


def _read_as(class_name: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer through the class the user wrote, unless that class reads the vocabulary wrongly."""
    cls = getattr(transformers, class_name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        if options.get("trust_remote_code"):
            return AutoTokenizer.from_pretrained(source, **options)
        raise ModelError(_no_class(class_name))
    plain = {k: v for k, v in options.items() if k != "use_fast"}
    file = Path(source) / "tokenizer.json"
    try:
        tokenizer = cls.from_pretrained(source, **plain)
        if not file.is_file() or _encodes_alike(tokenizer, file):
            return tokenizer
        reason = "it splits text differently from the model's own `tokenizer.json`"
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if not file.is_file():
            raise
        reason = f"it cannot read this model ({str(error).splitlines()[0][:100]})"
    chosen = AutoTokenizer.from_pretrained(source, **options)
    warn(f"`tokenizer_type: {class_name}` is not used: {reason}. {type(chosen).__name__} is used instead.")
    return chosen


def _no_class(class_name: str) -> Problem:
    return _said(
        "tokenizer_type",
        f"`tokenizer_type: {class_name}` is no class of transformers.",
        "Leave `tokenizer_type` out, or write `AutoTokenizer`.",
        None,
    )


def check(model: ModelSection) -> list[Problem]:
    """What is wrong with the tokenizer's keys and folder, as far as it can be seen without reading a vocabulary."""
    problems = []
    name, kind = model.tokenizer_config, model.tokenizer_type
    if name and (folder := local_folder(name)) is None and not could_be_hub_id(name):
        problems.append(missing_folder("tokenizer_config", name))
    elif name and folder is not None and not _holds_tokenizer(folder):
        problems.append(_no_tokenizer("tokenizer_config", name, None))
    if kind and kind not in dir(transformers) and not model.trust_remote_code:
        problems.append(_no_class(kind))
    return problems


def _encodes_alike(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    own = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
    return list(tokenizer.encode(_PROBE, add_special_tokens=False)) == own


def _said(key: str, message: str, remedy: str, place: Place | None) -> Problem:
    return Problem(message, remedy, "model", (key,), (place,) if place else ())


def explain_load_failure(
    error: Exception, key: str, name: str, what: str, place: Place | None = None
) -> Problem:
    """Why `from_pretrained` failed for `name`, as a Problem: missing folder, no network, no access, unreadable."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(e).__name__ for e in chain}
    text = " ".join(str(e) for e in chain)
    said = f"`{key}: {name}`"
    if local_folder(name) is None:
        if "GatedRepoError" in kinds or "gated repo" in text:
            return _said(
                key,
                f"{said} is a gated model that this account may not read.",
                "Ask for access on its Hub page, then `hf auth login` (or set HF_TOKEN).",
                place,
            )
        if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text or "404" in text:
            return _said(
                key,
                f"{said} is neither a folder here nor a model on the Hub.",
                "Check the spelling; a private model needs `hf auth login` (or HF_TOKEN).",
                place,
            )
        if "RevisionNotFoundError" in kinds:
            return _said(key, f"{said} has no such revision.", "Check `revision_of_model`.", place)
        offline = {
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectionError",
            "ConnectError",
            "ProxyError",
            "ConnectTimeout",
            "ReadTimeout",
            "LocalEntryNotFound",
        }
        if kinds & offline or "connect to" in text or "couldn't connect" in text or "offline" in text.lower():
            return _said(
                key,
                f"{said} is not a folder here, not in the local cache, and the Hub cannot be reached.",
                "Check the path, or connect to the network (HF_HUB_OFFLINE forbids it where set).",
                place,
            )
    if isinstance(error, ImportError):
        return _said(
            key,
            f"The {what} of {said} needs a package: {str(error).strip().splitlines()[0]}",
            "Install that package.",
            place,
        )
    if "trust_remote_code" in text:
        return _said(
            key,
            f"{said} brings its own code.",
            "Set `trust_remote_code: true` after reading it, if you trust where it comes from.",
            place,
        )
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _said(
        key,
        f"The {what} of {said} cannot be read: {first.strip()[:300]}",
        "Copy or download the model again, or check that transformers knows it.",
        place,
    )


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, wanted: dict[str, Any]) -> None:
    extra = wanted.pop("additional_special_tokens", None) or wanted.pop("extra_special_tokens", None) or []
    unknown = [k for k in wanted if k not in NAMED]
    if unknown:
        raise ModelError(f"`special_tokens.{unknown[0]}` is no special token.", f"Known: {', '.join(NAMED)}.")
    before = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token")}
    vocabulary = tokenizer.get_vocab()
    if wanted:
        # A token that stands in the vocabulary already keeps its id; only its role changes.
        tokenizer.add_special_tokens({k: _special(v) for k, v in wanted.items()})
    if extra:
        tokenizer.add_tokens([_special(t) for t in extra if t not in vocabulary], special_tokens=True)
        _mark_special(tokenizer, list(extra))
    swaps: dict[str, Any] = {
        before[k]: (wanted[k], tokenizer.convert_tokens_to_ids(wanted[k]))
        for k in before
        if k in wanted and before[k] is not None and before[k] != wanted[k]
    }
    if swaps:
        _swap_in_post_processor(tokenizer, swaps)


def _special(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True)


def _mark_special(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Adds to the list of additional special tokens and keeps those that are in it."""
    attribute = (
        "extra_special_tokens" if hasattr(tokenizer, "extra_special_tokens") else "additional_special_tokens"
    )
    present = [str(t) for t in getattr(tokenizer, attribute, None) or []]
    merged = list(dict.fromkeys([*present, *texts]))
    key = (
        "additional_special_tokens"
        if "additional_special_tokens" in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        else attribute
    )
    tokenizer.add_special_tokens({key: [_special(t) for t in merged]})


def _swap_in_post_processor(tokenizer: PreTrainedTokenizerBase, swaps: dict[str, tuple[str, int]]) -> None:
    """Puts the new BOS and EOS where the tokenizer inserts the old ones, so that the old never stand in a row."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.post_processor is None:
        return
    state = backend.post_processor.__getstate__()
    changed = _swap_tokens(json.loads(state), swaps)
    fresh = processors.ByteLevel()
    fresh.__setstate__(json.dumps(changed).encode())
    backend.post_processor = fresh


def _swap_tokens(node: Any, swaps: dict[str, tuple[str, int]]) -> Any:
    """A post-processor's JSON with the named tokens exchanged: templates by text, Bert and Roberta pairs by text and id."""
    if isinstance(node, list):
        if len(node) == 2 and isinstance(node[0], str) and node[0] in swaps:
            return list(swaps[node[0]])
        return [_swap_tokens(n, swaps) for n in node]
    if not isinstance(node, dict):
        return node
    result = {k: _swap_tokens(v, swaps) for k, v in node.items()}
    if "SpecialToken" in node and node["SpecialToken"].get("id") in swaps:
        result["SpecialToken"] = {**node["SpecialToken"], "id": swaps[node["SpecialToken"]["id"]][0]}
    if isinstance(node.get("special_tokens"), dict):
        table = {}
        for text, entry in node["special_tokens"].items():
            if text in swaps:
                new, number = swaps[text]
                entry = {"id": new, "ids": [number], "tokens": [new]}
            table[entry["id"]] = entry
        result["special_tokens"] = table
    return result


def _guarantee_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    free = [t for t in _PAD_LIKE if t in vocabulary and t not in taken]
    free += sorted(
        (t for t in vocabulary if _RESERVED.fullmatch(t) and t not in taken), key=vocabulary.__getitem__
    )[:1]
    if free:
        tokenizer.pad_token = free[0]
        note(f"The tokenizer names no pad token: `{free[0]}` (id {vocabulary[free[0]]}) is used.")
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        warn(
            f"The tokenizer has no pad token and none to spare: its EOS `{tokenizer.eos_token}` is used for padding."
        )
    else:
        raise ModelError(
            "The tokenizer has neither a pad token nor an EOS token.",
            "Name them: special_tokens: {eos_token: ..., pad_token: ...}.",
        )
