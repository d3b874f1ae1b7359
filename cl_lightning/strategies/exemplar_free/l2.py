"""L2 to the previous weights (Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", CVPR-W 2023,
arXiv:2203.17269).

With theta* the weights after the last task, or the pretrained weights during the first task,

    L(x, y) = CE(f(x), y) + lambda sum_j (theta_j - theta*_j)^2

which is EWC with importance 1 for every weight (and without its factor 1/2). lambda -> penalty_weight. Unlike EWC it
protects what pretraining has learnt, since it needs no data of pretraining (``hold_initial``). The paper's variant for
vision transformers trains the head and the projections of queries, keys and values alone, and penalises changes of
these projections: ``lr_factors`` with factor 0 freezes the other weights, ``names`` chooses the penalised weights (see
``experiments/methods/exemplar_free/l2_qkv_vit32.yaml``). Weight decay pulls the same weights towards 0, so leave it 0.
Departs from the paper: its classification loss is a sum of sigmoid cross-entropies over all classes; for this loss,
combine ``LwF(form="sigmoid")`` with the callback ``ImportancePenalty(estimator="l2")``.
"""

from typing import Any, Literal

from cl_lightning.memory import Consolidation
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategy import Traits


class L2(Consolidating):
    """Cross-entropy, and the squared distance of the weights from the weights after the previous task.

    Args:
        penalty_weight: lambda, at least 0.
        hold_initial: Whether changes from the initial weights of the backbone are penalised during the first task, for
            pretrained backbones.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        names: Patterns of parameter names, such as ``backbone.*.attn.qkv.*``: of the weights of ``on``, only those that
            match a pattern are penalised; None for all.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Smith et al., CVPR-W 2023, arXiv:2203.17269")

    def __init__(
        self,
        *,
        penalty_weight: float = 0.1,
        hold_initial: bool = False,
        on: Literal["backbone", "all"] = "all",
        names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation("l2", penalty_weight, on=on, names=names)
        super().__init__(consolidation=consolidation, hold_initial=hold_initial, **kwargs)
