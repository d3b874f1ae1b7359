"""A memory in which its owner decides which held sample a new sample replaces."""

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.memory.replay import Memory


class SlotMemory(Memory):
    """Memory whose samples are replaced one by one, for selections that depend on more than keys, classes and tasks.

    ``add`` fills the free room; :meth:`exchange` replaces samples of a full memory.
    """

    @torch.no_grad()
    def exchange(
        self,
        slots: Tensor,
        accepted: Tensor,
        images: Tensor,
        labels: Tensor,
        tasks: Tensor,
        draw: Draw,
        **fields: Tensor,
    ) -> None:
        """Write new samples over held ones. Without a synchronisation with a GPU.

        Every process must call this with the same arguments: new samples are gathered from all processes before.

        Args:
            slots: Row that each new sample may replace, distinct, int64 ``(n,)``, on the device of the samples.
            accepted: Whether it replaces the row, bool ``(n,)``; other new samples are dropped.
            images: Raw images, uint8 ``(n, C, H, W)``.
            labels: Columns, int64 ``(n,)``.
            tasks: Task indices, int64 ``(n,)``.
            draw: Random numbers of the step; only its key is used.
            fields: The further tensors of the memory, with n rows.

        Raises:
            ValueError: If names, dtypes or shapes differ from the held ones.
        """
        rows = {"images": images, "labels": labels, "tasks": tasks, **fields}
        self._check(rows)
        rows["keys"] = self.policy.keys(len(slots), int(self.num_seen), draw)
        self.num_seen += len(slots)
        fitted = {name: self._fitted(name, value.detach()) for name, value in rows.items()}
        self._overwrite(slots, fitted, torch.arange(len(slots), device=slots.device), accepted)
