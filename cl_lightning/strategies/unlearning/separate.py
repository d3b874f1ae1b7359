"""Base of methods that forget a task exactly, because the task has a network of its own."""

from torch import Tensor, nn

from cl_lightning.batch import ImageShape, mix
from cl_lightning.models import MAIN, TaskHead, TaskNetworks, drawn
from cl_lightning.strategies.base import TaskIncremental, Unlearns, routed
from cl_lightning.strategy import Batch, Output, Task

_BACKBONE, _HEAD = 0xBA5E, 0x4EAD  # salts of the seeds of initial weights


class SeparateNetworks(Unlearns, TaskIncremental):
    """A task-incremental method with several backbones, of which a task trains one.

    The initial weights of a backbone and of the rows of the head are drawn by the seed of the run and the task alone:
    a task leaves no trace in the random numbers of other tasks.

    Args:
        kwargs: Options of the base class; the head is a ``TaskHead``.
    """

    @property
    def nets(self) -> TaskNetworks:
        """The backbones."""
        backbone = self.network.backbone
        assert isinstance(backbone, TaskNetworks)
        return backbone

    @property
    def rows(self) -> TaskHead:
        """The head, which has rows of its own for each task."""
        head = self.task_head
        assert head is not None
        return head

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if self.task_head is None:
            name, head = type(self).__name__, type(self.network.head).__name__
            raise ValueError(f"{name}: head is {head}, which has no rows for each task to reset; use TaskHead")
        first = self.network.backbone
        self.network.backbone = TaskNetworks(image_shape, self.build_backbone, first)  # type: ignore[arg-type]
        self.nets.add(MAIN, mix(self.seed, _BACKBONE, 0))

    def begin_task(self, task: Task) -> None:
        """Add rows of the head for a task that is learnt; a request has no rows."""
        if not task.learns:
            self.rows.add_task((), task.num_seen)  # no rows, but a place, so that later tasks keep theirs
            return
        self.rows.add_task(task.columns, task.num_seen)
        self.reset_rows(task.index)

    def add_backbone(self, task: int) -> None:
        """Give a task a backbone of its own, or reset it to its initial weights."""
        self.nets.add(str(task), mix(self.seed, _BACKBONE, task + 1))

    def reset_rows(self, task: int) -> None:
        """Set the rows of a task in the head to their initial values."""
        block = self.rows.blocks[self.block_of(task)]
        size = self.rows.block_sizes()[self.block_of(task)]
        fresh = drawn(lambda: self.rows.new_block(size), mix(self.seed, _HEAD, task))
        block.load_state_dict(fresh.state_dict())

    def block_of(self, task: int) -> int:
        """Index of the block of the head of a task that was learnt."""
        return sum(earlier.learns for earlier in self.data.stream.tasks[:task])

    def frozen(self) -> list[nn.Module]:
        self.nets.task = self.task.index
        used = self.nets.name_of(self.task.index)
        return [*super().frozen(), *(net for name, net in self.nets.nets.items() if name != used)]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with routed(self.nets, task):
            return self.network.classify(images)
