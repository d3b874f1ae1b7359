"""Sequential fine-tuning: the lower bound of continual learning.

The network f is trained by cross-entropy on the data of each task in turn, starting from its weights after the
previous task:

    L(x, y) = CE(f(x), y)

The softmax is over all classes seen so far (``loss_classes="all"``: the loss lowers the logits of old classes, and they
are forgotten at once), over the classes of the current task (``"current"``: old rows of the head get no gradient and
are not in the optimizer, so that neither weight decay nor momentum changes them), or over the classes of the task of
each sample (``"task"``).
"""

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.data import TARGET_KINDS
from cl_lightning.models import Output
from cl_lightning.strategy import ContinualStrategy, Traits


class Finetune(ContinualStrategy):
    """Cross-entropy on the current task, without any measure against forgetting."""

    traits = Traits(family="baseline", paper="lower bound", targets=TARGET_KINDS, losses_use_images=False)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
