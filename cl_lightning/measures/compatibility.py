"""How comparable the features of successive networks are: search and verification across networks.

``M`` is the compatibility matrix, float64 ``(T, T)``: M[t, k] in [0, 1] is the accuracy with the queries of the network
after task t and the gallery of the network after task k <= t. Entries above the diagonal are not used.
"""

# ruff: noqa: N803 - M is the name of the matrix in the papers

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import at_least

_NAN = float("nan")


def retrieval_accuracy(queries: Tensor, gallery: Tensor, labels: Tensor, *, chunk: int = 1024) -> float:
    """Share of images whose nearest image in the gallery, by cosine and apart from itself, has the same label.

    This is the rank-1 accuracy of 1:N search (cumulative match characteristic at 1). Of several nearest images the
    first one counts.

    Args:
        queries: Features of the images by one network, ``(n, d)``, n at least 2.
        gallery: Features of the same images by another network, ``(n, d)``.
        labels: int64 ``(n,)``.
        chunk: Number of queries whose similarities are computed at once.

    Returns:
        In [0, 1].
    """
    a, b = F.normalize(queries.float(), dim=1), F.normalize(gallery.float(), dim=1)
    right = 0
    for start in range(0, len(a), chunk):
        similarity = a[start : start + chunk] @ b.T
        own = torch.arange(start, start + len(similarity), device=a.device)
        similarity.scatter_(1, own[:, None], -torch.inf)
        right += int((labels[similarity.argmax(dim=1)] == labels[own]).sum())
    return right / len(a)


def verification_accuracy(first: Tensor, second: Tensor, same: Tensor, *, folds: int = 10) -> float:
    """Accuracy of "the same class" by a threshold of the cosine, the mean over folds of pairs.

    A pair is taken for one class if its cosine is at least the threshold. The threshold of a fold is the one that is
    best on all other pairs, among the cosines that occur there and infinity; of several best ones the highest is used.

    Args:
        first: Features of the first image of each pair by one network, ``(n, d)``.
        second: Features of the second image of each pair by another network, ``(n, d)``.
        same: Whether both are of one class, bool ``(n,)``.
        folds: Number of folds of consecutive pairs, at least 2 and at most n.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If there are fewer than 2 folds, or fewer pairs than folds.
    """
    at_least("verification_accuracy", 2, folds=folds)
    at_least("verification_accuracy", folds, pairs=len(same))
    scores = F.cosine_similarity(first.double(), second.double(), dim=1).cpu()
    same = same.cpu()
    accuracies = []
    for held in torch.arange(len(scores)).tensor_split(folds):
        trained = torch.ones(len(scores), dtype=torch.bool)
        trained[held] = False
        ordered, order = scores[trained].sort()
        labels = same[trained][order].long()
        # Threshold i, ordered[i] or infinity, is right on pairs of one class from i on, and on the others below i.
        right = F.pad(labels.flip(0).cumsum(0).flip(0), (0, 1)) + F.pad((1 - labels).cumsum(0), (1, 0))
        thresholds = F.pad(ordered, (0, 1), value=torch.inf)
        differs = F.pad(thresholds[1:] > thresholds[:-1], (1, 0), value=True)  # equal cosines are on one side
        best = thresholds.flip(0)[right.where(differs, -1).flip(0).argmax()]
        accuracies.append(((scores[held] >= best) == same[held]).double().mean())
    return float(torch.stack(accuracies).mean())


def average_compatibility(M: Tensor, *, strict: bool = False) -> float:
    """AC: share of the pairs k < t with M[t, k] >= M[k, k] (CL2R: Biondi et al., 2023, arXiv:2211.09032); in [0, 1].

    Queries of the later network then find at least as much in an old gallery as queries of the network that made it.

    Args:
        M: Compatibility matrix.
        strict: Whether M[t, k] must be greater, as in HOC (Biondi et al., CVPR 2024, arXiv:2405.02581).

    Returns:
        The share; nan for a single network.
    """
    t, k = torch.tril_indices(len(M), len(M), offset=-1)
    across, own = M[t, k], M.diagonal()[k]
    return float((across > own if strict else across >= own).double().mean()) if len(t) else _NAN


def average_multi_model_accuracy(M: Tensor) -> float:
    """AM: mean of M[t, k] over all k <= t (CL2R: Biondi et al., 2023, arXiv:2211.09032); in [0, 1]."""
    t, k = torch.tril_indices(len(M), len(M))
    return float(M[t, k].mean()) if len(t) else _NAN


def backward_compatibility(M: Tensor) -> float:
    """BC: mean over k < T of M[T, k] - M[k, k], T the last network; in [-1, 1], nan for a single network."""
    return float((M[-1, :-1] - M.diagonal()[:-1]).mean()) if len(M) > 1 else _NAN


def forward_compatibility(M: Tensor) -> float:
    """FC: mean over t > 0 of M[t, t - 1] - M[t, t]; in [-1, 1], nan for a single network."""
    return float((M.diagonal(offset=-1) - M.diagonal()[1:]).mean()) if len(M) > 1 else _NAN
