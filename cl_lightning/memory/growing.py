"""Modules whose buffers take their shape from the state dict that they load."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def restore_shapes(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, names: Iterable[str], *, keep_dtype: bool = False
) -> None:
    """Re-allocate buffers in the shape that a state dict has for them, so that it can be loaded.

    ``torch.nn.Module`` refuses a buffer of another shape. Call this in ``_load_from_state_dict``, before the method of
    the base class: a buffer of shape ``(5, d)`` becomes zeros of shape ``(10, d)`` if ``state_dict`` has 10 rows.

    Args:
        module: Owner of the buffers, which stay on their present devices.
        state_dict: State dict that is about to be loaded.
        prefix: Prefix of the module's keys in ``state_dict``, with the final dot, such as ``"head.prototypes."``.
        names: Names of registered buffers of ``module`` itself. A buffer whose key is missing is left as it is.
        keep_dtype: Whether a buffer keeps its present dtype; by default it takes the saved one.

    Raises:
        KeyError: If a name is not a registered buffer.
    """
    for name in names:
        buffer = module._buffers[name]
        saved = state_dict.get(prefix + name)
        if saved is not None and buffer is not None:
            dtype = buffer.dtype if keep_dtype else saved.dtype
            module._buffers[name] = torch.zeros_like(saved, dtype=dtype, device=buffer.device)


class GrowingBuffers(nn.Module):
    """Base of modules whose buffers have one row per class (or task), and more rows after each task.

    A state dict with another number of rows can be loaded: a new module with 0 rows restores the state of one with
    100, and a module with 100 rows the state of one with 50. Buffers keep their dtype and device. Other dimensions are
    fixed: for a state of shape ``(100, 32)`` and a buffer of shape ``(0, 64)``, ``load_state_dict`` reports a size
    mismatch. A subclass with other rules overrides :meth:`restore_buffers`.
    """

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Give the buffers of this module, without those of its submodules, the shapes that a state dict has.

        Called when ``state_dict`` is about to be loaded.

        Args:
            state_dict: State dict of this module or of a module that contains it.
            prefix: Prefix of this module's keys in ``state_dict``, with the final dot; empty for the module itself.
        """
        names = []
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.ndim == buffer.ndim and saved.shape[1:] == buffer.shape[1:]:
                names.append(name)
        restore_shapes(self, state_dict, prefix, names, keep_dtype=True)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.restore_buffers(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
