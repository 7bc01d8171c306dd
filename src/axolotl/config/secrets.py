"""What must not be shown nor saved: keys, tokens, passwords, and credentials inside addresses."""

from __future__ import annotations

import re
from typing import Any

_NAME = r"(?:api|access|auth|hf|hub|secret|private|wandb|comet)_?(?:key|token)|(?:\w+_)?(?:api_key|secret|password|webhook_url)"
_KEY = re.compile(rf"(?:^|.*_)(?:{_NAME})$", re.IGNORECASE)
_WRITTEN = re.compile(rf"\b((?:\w+_)?(?:{_NAME})['\"]?\s*[:=]\s*)([^\s,}}\]]+)", re.IGNORECASE)
_VALUE = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
# A signed address carries what opens it in its query.
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential)|sig|se|sp|sv|X-Amz-[\w-]+|X-Goog-[\w-]+)=)"
    r"([^&;#\s'\"`,}\]]+)",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Whether a key of this name holds a secret; `pad_token` and its like do not."""
    return bool(_KEY.match(key))


def without_secrets(value: Any) -> Any:
    """The same value without secret keys, without tokens in texts and credentials in addresses."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if not is_secret(str(k))}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    if isinstance(value, str):
        return _QUERY.sub(r"\1", _CREDENTIALS.sub("", _VALUE.sub("", value)))
    return value


def masked(line: str) -> str:
    """A line of a config with stars for what is secret; every other character stays in its column."""
    line = _WRITTEN.sub(lambda found: found[1] + "*" * len(found[2]), line)
    line = _VALUE.sub(lambda found: "*" * len(found[0]), line)
    line = _QUERY.sub(lambda found: found[1] + "*" * len(found[2]), line)
    return _CREDENTIALS.sub(lambda found: "*" * (len(found[0]) - 1) + "@", line)
