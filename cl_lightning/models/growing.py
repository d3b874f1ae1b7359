"""Parameters to which tasks add."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class GrowingParameters(nn.Module):
    """A list of parameters that takes its length and its shapes from the state dict that it loads.

    Parameters that exist stay the same objects when others are added.
    """

    def append(self, value: Tensor) -> None:
        """Add a parameter with a copy of the values of a tensor, on the device of the first parameter."""
        like = next(iter(self), value)
        self.register_parameter(str(len(self)), nn.Parameter(value.detach().to(like.device, copy=True)))

    def pop(self) -> None:
        """Remove the last parameter."""
        del self._parameters[str(len(self) - 1)]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(cast(Mapping[str, nn.Parameter], self._parameters).values())

    def __getitem__(self, index: int) -> nn.Parameter:
        return list(self)[index]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved: list[Tensor] = []
        while (value := state_dict.get(f"{prefix}{len(saved)}")) is not None:
            saved.append(value)
        if [value.shape for value in saved] != [parameter.shape for parameter in self]:
            device = next(iter(self), torch.empty(0)).device
            self._parameters.clear()
            for value in saved:
                self.append(torch.empty(value.shape, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
