"""The models of the GPU measurements: shapes of published models, with random weights, so that nothing is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
LLAMA |= {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "rope_theta": 1e6,
}
QWEN3 |= {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu", "head_dim": 128}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "vocab_size": 256000,
    "rope_theta": 1e4,
}
GEMMA |= {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA | _sizes(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3b": LLAMA | _sizes(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "llama-8b": LLAMA | _sizes(4096, 14336, 32, 32, 8, head_dim=128),
    "llama-70b": LLAMA | _sizes(8192, 28672, 80, 64, 8, head_dim=128),
    "qwen3-1.7b": QWEN3 | _sizes(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": QWEN3 | _sizes(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": QWEN3 | _sizes(4096, 12288, 36, 32, 8, tie_word_embeddings=False),
    "gemma-2b": GEMMA | _sizes(2048, 16384, 18, 8, 1),
    "gemma-7b": GEMMA | _sizes(3072, 24576, 28, 16, 16),
}


def write_model(name: str, folder: Path, tokenizer_from: Path) -> Path:
    """A folder with the geometry's config.json and a tokenizer, without weights: for `reinit_weights: true`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy2(tokenizer_from / file, folder / file)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(GEOMETRIES[name] | ids, indent=1), encoding="utf-8")
    return folder
