"""IF2Net, Innately Forgetting-Free Networks (Li et al., arXiv:2306.10480), without their tweak of representations.

Hidden weights are random and never trained; only the output weights W learn, in a space in which old outputs stay:

    h = activation(R^T f(x) + b),   scores W^T h,   f a frozen backbone or the pixels

``orthogonal``: W changes only along directions that no hidden vector so far has, with the projector P onto them. For
the hidden vectors H (rows) and one-hot labels Y of a task:

    G = P H^T (H P H^T)^+,   W <- W + G (Y - H W),   P <- P - G H P

which is the sample by sample update W += u (y - W^T h) / (h^T u), P -= u u^T / (h^T u) with u = P h, if the labels of
the task can be fitted without error. Outputs for old samples do not change; nothing is learnt when P = 0. It is ``ICL``
on a random layer.
``ridge``: P = (sum h h^T + alpha I)^-1 in place of the projector, so that W is the ridge regression on all samples so
far, in any order of tasks. For alpha -> 0 it tends to ``orthogonal`` where all samples can be fitted; otherwise it
weighs the errors of old and new samples equally, while ``orthogonal`` keeps the first tasks.
R, b -> RandomLayer with ``units``, alpha -> ridge. P and W are float64: H^2 + H C numbers.
No code and no hyper-parameters are available: the updates follow the abstract's "orthogonal space" of output weights,
and ``ridge`` is ours. The tweak of the representations to each task, by which the paper corrects the random hidden
layer, is left out: the abstract does not define it, and a correction per task would need the task at test time.
"""

import functools
from typing import Any, Literal, get_args

from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.models import Nonlinearity, NullSpaceHead, RandomLayer, RidgeHead
from cl_lightning.strategy import BackboneFactory, ContinualStrategy, HeadFactory, Phase, Task, Traits

Form = Literal["orthogonal", "ridge"]


class IF2Net(ContinualStrategy):
    """Output weights on a random hidden layer, solved in the space that is orthogonal to all earlier hidden vectors.

    Args:
        form: ``orthogonal`` or ``ridge``.
        units: Number of hidden units, H.
        activation: ``relu``, ``tanh`` or ``sigmoid``.
        tolerance: For ``orthogonal``: share of the largest singular value of a task's hidden vectors below which a
            direction stays free, in [0, 1).
        ridge: For ``ridge``: alpha, above 0.
        backbone: Builds f, which is frozen; None for the pixels.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Li et al., arXiv:2306.10480")

    def __init__(
        self,
        *,
        form: Form = "orthogonal",
        units: int = 5000,
        activation: Nonlinearity = "relu",
        tolerance: float = 1e-4,
        ridge: float = 1e-2,
        backbone: BackboneFactory | None = None,
        **kwargs: Any,
    ) -> None:
        one_of(self, get_args(Form), form=form)
        one_of(self, get_args(Nonlinearity), activation=activation)
        at_least(self, 1, units=units)
        within(self, "[0, 1)", tolerance=tolerance)
        above(self, 0, ridge=ridge)
        hidden = functools.partial(RandomLayer, units=units, activation=activation, backbone=backbone)
        head: HeadFactory = functools.partial(NullSpaceHead, tolerance=tolerance)
        if form == "ridge":
            head = functools.partial(RidgeHead, ridge=ridge, backend="recursive")
        super().__init__(backbone=hidden, head=head, loss_classes="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []
