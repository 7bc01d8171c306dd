"""An adapter's weights stay in their file until a layer is merged, and come out the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl.errors import ModelError
from axolotl.model.adapter_files import adapter_config
from axolotl.model.load import load_model_config
from axolotl.weights.skeleton import Skeleton
from trained import LLAMA, lora, section, train


def skeleton(folder: Path) -> Skeleton:
    return Skeleton(load_model_config(section(LLAMA)), adapter_config(folder), folder, 4096)


def memory(model: PeftModel) -> int:
    """Bytes of all weights that stand in memory."""
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(stores.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_read_layer_by_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = train(tmp_path, LLAMA, lora(lora_r=16, peft_use_dora=True))
    file = folder / "adapter_model.safetensors"
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    made = skeleton(folder)
    small = memory(made.peft_model)
    assert small < file.stat().st_size / 4
    path = "base_model.model.model.layers.2.mlp.up_proj"
    layer = made.peft_model.get_submodule(path)
    weight = layer.lora_A["default"].weight
    with made.deferred.present(layer):
        assert torch.equal(weight, stored[f"{path}.lora_A.weight"].float())
        assert small < memory(made.peft_model)
    assert memory(made.peft_model) == small
    assert torch.equal(made.deferred.value(weight), stored[f"{path}.lora_A.weight"].float())


def test_weights_that_peft_rebuilds_are_read_at_once(tmp_path: Path) -> None:
    """Where the numbers that arrive are not those of the file, placeholders would arrive as zeros."""
    folder = train(tmp_path, LLAMA, lora())
    made = skeleton(folder)

    peft_set = made.deferred._set
    made.deferred._set = lambda model, weights: peft_set(  # type: ignore[method-assign]
        model, {name: tensor * 1 for name, tensor in weights.items()}
    )
    assert made.deferred.load_into(made.peft_model) == []
    stored = load_file(folder / "adapter_model.safetensors")
    found = made.peft_model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(found[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize("pickled", [False, True])
def test_numbers_that_are_none_are_refused(pickled: bool, tmp_path: Path) -> None:
    folder = train(tmp_path, LLAMA, lora())
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if "layers.1" in name and "lora_B" in name)
    stored[name][0, 0] = torch.nan
    save_file(stored, file)
    if pickled:
        file.unlink()
        torch.save(stored, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"not finite, in `.*lora_B"):
        skeleton(folder)


def test_a_weight_that_the_file_lacks(tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(LLAMA),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    del stored[next(name for name in stored if "layers.1" in name and "lora_B" in name)]
    save_file(stored, file)
    with pytest.raises(ModelError, match=r"lacks 1 of the adapter's weights, such as `.*layers\.1.*lora_B"):
        skeleton(tmp_path)
