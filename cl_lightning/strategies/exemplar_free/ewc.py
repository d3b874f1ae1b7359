"""Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796), and online EWC (Schwarz et al.,
"Progress & Compress", ICML 2018, arXiv:1805.06370).

With theta*_k the weights after task k and F_k the diagonal of the Fisher information on its data,

    L(x, y) = CE(f(x), y) + lambda/2 * sum_k sum_j F_k,j (theta_j - theta*_k,j)^2            ``online=False``
    L(x, y) = CE(f(x), y) + lambda/2 * sum_j F_j (theta_j - theta*_j)^2,  F <- gamma F + F_k  ``online=True``

where the online form has a single anchor, the weights after the last task. lambda -> penalty_weight, gamma -> decay.
The sum over tasks is a single quadratic function, stored as one anchor and one importance per weight, with the same
value and gradient. F_j is the mean over samples of E_y (d log p(y|x) / d theta_j)^2, in eval mode. The label y is drawn
from the prediction (``labels="sampled"``, an unbiased estimate), or the expectation over all classes is computed
(``"exact"``). The softmax p is over the classes of the cross-entropy of the task (``loss_classes``).
Departs from the paper: one head for all classes.
The best lambda depends on the stream: on the number of earlier tasks and classes to retain, and on the certainty of
the network, since the Fisher information is small where predictions are certain. Frameworks that square the gradient of
the mean loss of a batch (``per_sample=False``) get a Fisher information smaller by about the batch size, and use a
lambda of about 5000. Gradient descent on a penalty of curvature lambda F diverges where lr * lambda * F > 2: lower the
learning rate or set ``trainer.gradient_clip_val``. In class-incremental streams the accuracy of EWC alone is known to
be hardly above fine-tuning.
"""

from typing import Any, Literal

from cl_lightning.memory import Consolidation
from cl_lightning.memory.sensitivity import Labels
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategy import Traits


class EWC(Consolidating):
    """Cross-entropy, and a quadratic penalty on weight changes, weighted by the Fisher information on earlier tasks.

    Args:
        penalty_weight: lambda, at least 0.
        online: Whether there is a single decaying Fisher information and anchor, instead of a term per task.
        decay: gamma of the online form, in [0, 1].
        labels: Labels of the Fisher information: ``exact`` expectation, ``sampled``, ``predicted`` or ``empirical``.
        per_sample: Whether the gradient of each sample is squared; False squares the gradient of the mean loss of each
            batch, to reproduce frameworks that do.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        fisher_samples: Number of samples of a task for the Fisher information, at least 1; None for all.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Kirkpatrick et al., PNAS 2017, arXiv:1612.00796")

    def __init__(
        self,
        *,
        penalty_weight: float = 100.0,
        online: bool = False,
        decay: float = 1.0,
        labels: Labels = "sampled",
        per_sample: bool = True,
        on: Literal["backbone", "all"] = "all",
        fisher_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation(
            "fisher",
            penalty_weight,
            merge="decay" if online else "add",
            decay=decay,
            labels=labels,
            per_sample=per_sample,
            on=on,
            samples=fisher_samples,
        )
        super().__init__(consolidation=consolidation, **kwargs)
