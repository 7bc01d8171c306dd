"""An adapter whose tensors stay in their file until a layer needs them, so that memory does not grow with its rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from axolotl.errors import ModelError
from axolotl.model.adapter_files import unreadable_pickle
from axolotl.model.files import ADAPTER_WEIGHTS, TensorEntry, read_header
from axolotl.weights.tensors import read_tensor


class DeferredAdapter:
    """Puts placeholders of no size in the place of an adapter's weights, and the numbers where they are asked for.

    Where PEFT rebuilds the weights as it loads them (for experts that are stacked here, or for ranks that differ by
    layer), they are read at once instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ADAPTER_WEIGHTS
        self.entries: dict[str, TensorEntry] = read_header(self.file)[0] if self.file.is_file() else {}
        self._waiting: dict[nn.Parameter, str] = {}

    def refuse_not_finite(self) -> None:
        """Raises ModelError where a run that diverged left numbers that are none. Reads tensor by tensor, but a pickle."""
        stored = ((name, self._read(name)) for name in self.entries)
        for name, tensor in stored if self.entries else self._unpickled().items():
            # The least and the greatest are NaN where one number is, and take one pass without a mask.
            if tensor.numel() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
                raise ModelError(
                    f"The adapter `{self.folder}` holds numbers that are not finite, in `{name}`.",
                    "The training run diverged: merge an earlier checkpoint.",
                )

    def load_into(self, model: PeftModel) -> list[str]:
        """Gives the model the adapter's weights; returns the names of weights that the file lacks.

        Raises ModelError for a file without what the adapter's configuration promises.
        """
        if not self.entries:
            return self._set(model, self._unpickled())
        placeholders = {
            name: torch.zeros(1).expand(entry.shape) if len(entry.shape) > 1 else self._read(name)
            for name, entry in self.entries.items()
        }
        missing = self._set(model, placeholders)
        self._waiting.clear()
        by_storage = {
            tensor.untyped_storage().data_ptr(): name
            for name, tensor in placeholders.items()
            if tensor.dim() > 1
        }
        for parameter in model.parameters():
            name = None if parameter.is_meta else by_storage.get(parameter.untyped_storage().data_ptr())
            if name is not None and tuple(parameter.shape) == self.entries[name].shape:
                self._waiting[parameter] = name
        if len(self._waiting) < len(by_storage):
            self._waiting.clear()
            return self._set(model, {name: self._read(name) for name in self.entries})
        return missing

    def _unpickled(self) -> dict[str, torch.Tensor]:
        try:
            found: dict[str, torch.Tensor] = load_peft_weights(str(self.folder), device="cpu")
            return found
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(unreadable_pickle(self.folder, error)) from None

    def _set(self, model: PeftModel, weights: dict[str, torch.Tensor]) -> list[str]:
        try:
            result: Any = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
        except (KeyError, RuntimeError) as error:
            raise ModelError(
                f"`{self.file}` and `adapter_config.json` do not belong together: "
                f"{str(error).strip().splitlines()[0]}",
                "The adapter was not saved to its end: use an earlier checkpoint.",
            ) from None
        prefix = model.base_model.prefix
        return [key for key in result.missing_keys if prefix in key]

    def _read(self, name: str) -> torch.Tensor:
        tensor = read_tensor(self.file, name, self.entries[name])
        return tensor.float() if tensor.is_floating_point() else tensor

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of a weight of the model, read where they are not there yet."""
        name = self._waiting.get(tensor) if isinstance(tensor, nn.Parameter) else None
        return tensor.detach() if name is None else self._read(name)

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """While the block runs, the adapter's weights in that module have their numbers."""
        held = [(p, p.data) for p in module.parameters() if p in self._waiting]
        for parameter, _ in held:
            parameter.data = self._read(self._waiting[parameter])
        try:
            yield
        finally:
            for parameter, placeholder in held:
                parameter.data = placeholder
