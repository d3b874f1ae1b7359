"""A teacher that a callback keeps."""

from collections.abc import Mapping
from typing import Any

from cl_lightning.network import Network
from cl_lightning.teacher import Teacher


class Snapshot(Teacher):
    """Teacher whose owner is no module: its owner saves, restores and moves it.

    A checkpoint is read when the network, whose structure the copy shares, is not at hand yet. So what was saved waits
    in :meth:`keep` until :meth:`restore` is called with the network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        self._waiting: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What to save: tensors by name, none while there is no copy."""
        return dict(self.state_dict()) if self._waiting is None else self._waiting

    def keep(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state` gave; :meth:`restore` makes a network of it."""
        self._waiting = dict(state)

    def restore(self, network: Network) -> None:
        """Make a network of what was kept, if anything was.

        Args:
            network: Of the structure that was copied; its head may have grown since.
        """
        if self._waiting is not None:
            state, self._waiting = self._waiting, None
            self.restore_shape(network, state, "")
            self.load_state_dict(state)
            self.requires_grad_(False).eval()  # a head that took another shape has new parameters

    def forget(self) -> None:
        """Drop the copy."""
        self.network, self._waiting = None, None

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())
