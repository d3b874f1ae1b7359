"""Compatible Lifelong Learning Representations, CL2R (Biondi, Pernici, Bruni, Mugnai & Del Bimbo, ACM TOMM 2023).

Features of a gallery that earlier networks have computed stay comparable with features of the present network
(arXiv:2211.09032). With phi(x) the features in front of a classifier w that is fixed from the start, the corners of a
simplex of K classes, phi_old the features of the network before the task, and R samples of a memory,

    L = CE(w phi(x)) on the batch and on R  +  lambda_t * mean over R of ( 1 - cos( phi(x), phi_old(x) ) )
    lambda_t = lambda sqrt( C_new / C_old )

The cross-entropy is over all K corners, also corners of classes that have not arrived, which keeps their space free.
The memory has random samples of each class, and a step has as many of them as the batch has samples. lambda ->
alignment_weight; C_old and C_new are the numbers of classes before and in the task. The callback
``CompatibilityMatrix`` measures how comparable the features are.
"""

import math
from typing import Any

from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.losses import cosine_feature_distillation
from cl_lightning.strategies.rehearsal.compatible import CompatibleReplay
from cl_lightning.strategy import Batch, Output, Traits


class CL2R(CompatibleReplay):
    """Cross-entropy over a fixed simplex, and cosine distillation of the features of replayed samples.

    Args:
        alignment_weight: lambda, at least 0.
        kwargs: Options of ``CompatibleReplay``: memory_per_class, replay_size, head, and options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Biondi et al., ACM TOMM 2023, arXiv:2211.09032", keeps_exemplars=True)

    def __init__(self, *, alignment_weight: float = 5.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, alignment_weight=alignment_weight)
        self.alignment_weight = alignment_weight

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        features = self.head.embed(output.features)
        terms = {"ce": self.simplex_loss(features, output, batch)}
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output._replace(features=features))
            weight = self.alignment_weight * math.sqrt(self.task.num_new / (self.task.num_seen - self.task.num_new))
            terms["align"] = share * weight * cosine_feature_distillation(of_part.features, self.taught(samples.images))
        return terms
