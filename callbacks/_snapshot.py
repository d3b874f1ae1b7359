"""A frozen copy of the network that a callback owns, and the base of callbacks with one."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from cl_lightning.callback import ContinualCallback
from cl_lightning.memory import Teacher
from cl_lightning.models import Network


class Snapshot(Teacher):
    """Teacher of an owner that is not a module, such as a callback; the owner saves, restores and moves it.

    When Lightning loads a checkpoint into a callback, the network with the structure of the copy is not available yet.
    :meth:`keep` therefore stores the saved state, and :meth:`restore` loads it into a copy of the network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        self._waiting: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """State to be saved: tensors by name; empty while there is no copy."""
        return dict(self.state_dict()) if self._waiting is None else self._waiting

    def keep(self, state: Mapping[str, Any]) -> None:
        """Store a result of :meth:`state` until :meth:`restore` is called."""
        self._waiting = dict(state)

    def restore(self, network: Network) -> None:
        """Load the state stored by :meth:`keep`, if any, into a copy of the network.

        Args:
            network: Network with the structure of the saved copy; its head may have grown since.
        """
        if self._waiting is not None:
            state, self._waiting = self._waiting, None
            self.restore_network(network, state, "")
            self.load_state_dict(state)
            self.requires_grad_(False).eval()  # resized heads have new parameters

    def forget(self) -> None:
        """Delete the copy and any stored state."""
        self.network, self._waiting = None, None

    def num_bytes(self) -> int:
        """Size of the copy or of the stored state in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())


class Taught(ContinualCallback):
    """Base of callbacks with a teacher, which is in the checkpoint and on the device of the fit."""

    def __init__(self) -> None:
        self.teacher = Snapshot()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teacher.restore(pl_module.network)  # type: ignore[arg-type]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit that is resumed loads the checkpoint again after `setup`.
        self.teacher.restore(pl_module.network)  # type: ignore[arg-type]
        self.teacher.to(pl_module.device)

    def bytes_kept(self) -> dict[str, int]:
        return {"teachers": self.teacher.num_bytes()}

    def state_dict(self) -> dict[str, Any]:
        state = self.teacher.state()
        return {"teacher": state} if state else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.teacher.keep(state_dict["teacher"])
