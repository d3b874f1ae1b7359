"""Clustering accuracy of discovered classes."""

from typing import NamedTuple

from scipy.optimize import linear_sum_assignment
from torch import Tensor


class ClusteringAccuracy(NamedTuple):
    """Clustering accuracy in [0, 1]; nan where there are no samples.

    Attributes:
        all: Of all samples.
        old: Of the samples of classes that were known before.
        new: Of the samples of all other classes.
    """

    all: float
    old: float
    new: float


def clustering_accuracy(counts: Tensor, old: Tensor) -> ClusteringAccuracy:
    """Share of the samples whose cluster is assigned to their class, by the best assignment of clusters to classes.

        ACC = max_m 1/n sum_i [ m(cluster of i) = class of i ],   m one-to-one

    The assignment is found by the Hungarian algorithm, once for all samples; old and new classes use the same one
    (Vaze et al., CVPR 2022, arXiv:2201.02609). With more clusters than classes some clusters have no class.

    Args:
        counts: Samples of each class in each cluster, ``(classes, clusters)``.
        old: Classes that were known before, bool ``(classes,)``.
    """
    table, known = counts.cpu().double(), old.cpu()
    classes, clusters = linear_sum_assignment(table.numpy(), maximize=True)
    right = table.new_zeros(len(table))
    right[classes] = table[classes, clusters]
    sizes = table.sum(dim=1)

    def share(chosen: Tensor) -> float:
        total = float(sizes[chosen].sum())
        return float(right[chosen].sum()) / total if total else float("nan")

    return ClusteringAccuracy(share(known | ~known), share(known), share(~known))
