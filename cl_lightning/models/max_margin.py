"""Linear classifiers of maximum margin, learnt task after task by projections.

The weights that classify a task with margin 1 are a convex set. The smallest change of a weight that reaches the set is
its Euclidean projection. Everything is in float64.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, at_least, one_of
from cl_lightning.models.closed_form import ClosedFormHead

Against = Literal["seen", "task"]
Order = Literal["cyclic", "random", "greedy"]
_LARGEST = 1e10  # squared norm of a change, with margins of 1, above which a task counts as not separable


def margins(weight: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Margin of each row x of class y against each class c, ``(w_y - w_c) . x``; 0 for c = y.

    Args:
        weight: ``(C, D)``.
        inputs: ``(n, D)``.
        labels: Int64 ``(n,)``.

    Returns:
        ``(n, C)``.
    """
    scores = inputs @ weight.T
    return scores.gather(1, labels[:, None]) - scores


def shortfall(weight: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """What each of the :func:`margins` lacks to 1, negative where it is larger; 0 for c = y. ``(n, C)``."""
    return (1 - margins(weight, inputs, labels)).scatter(1, labels[:, None], 0.0)


def forgetting(weight: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Largest squared hinge loss of a task, ``max_{i,c} max(0, 1 - (w_y - w_c) . x)^2``; 0 in the set of the task."""
    return float(shortfall(weight, inputs, labels).clamp(min=0).square().max())


@torch.no_grad()
def least_change(weight: Tensor, inputs: Tensor, labels: Tensor, *, tolerance: float = 1e-10) -> Tensor:
    """Projection of a classifier onto the set of those that classify a task with margin 1.

        argmin_V ||V - W||^2   subject to   (v_y - v_c) . x >= 1   for each row x of class y and each class c != y

    With two classes and w = w_1 - w_0 this is the projection of the binary classifier, ``y w.x >= 1`` with y = 1 or -1:
    the step of sequential max-margin (Evron et al., ICML 2023, arXiv:2306.03534). For one row it is the
    passive-aggressive step ``w + max(0, 1 - y w.x) / ||x||^2 y x``.

    Solved exactly, as a least-distance problem, by the active set of Lawson & Hanson (1974, chapter 23): the number of
    systems that are solved is about the number of rows with margin 1.

    Args:
        weight: W, ``(C, D)``.
        inputs: ``(n, D)``.
        labels: Int64 ``(n,)``, below C.
        tolerance: Shortfall of a margin that is allowed, above 0.

    Returns:
        V, float64 ``(C, D)``.

    Raises:
        ValueError: If the task is not separable, or only by a change of norm 10^5 and more.
    """
    above("least_change", 0, tolerance=tolerance)
    start, inputs = weight.double(), inputs.double()
    classes = len(start)
    missing = shortfall(start, inputs, labels).flatten()  # h of each constraint, (n C,); constraint i C + c
    active = torch.zeros(0, dtype=torch.int64, device=inputs.device)
    dual = missing[:0]
    refused: set[int] = set()  # constraints that cannot enter, by rounding, until the set changes

    def normals(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Row and difference of classes whose outer product is the normal of a constraint."""
        rows, others = chosen // classes, chosen % classes
        difference = F.one_hot(labels[rows], classes) - F.one_hot(others, classes)
        return inputs[rows], difference.double()

    def change() -> Tensor:
        """Change of the weight for the present multipliers: ``sum_j a_j v_j``, ``(C, D)``."""
        x, difference = normals(active)
        share = 1 - missing[active] @ dual
        if len(active) and share * _LARGEST < 1:
            raise ValueError(
                f"least_change: {len(inputs)} samples of {len(torch.unique(labels))} classes are not separable by a "
                "linear map with a change of norm below 1e5; use more features, or regularisation above 0"
            )
        return (difference * (dual / share)[:, None]).T @ x

    def solved(chosen: Tensor) -> Tensor:
        x, difference = normals(chosen)
        gram = (x @ x.T) * (difference @ difference.T) + missing[chosen, None] * missing[chosen]
        factor, info = torch.linalg.cholesky_ex(gram)
        if info:
            found: Tensor = torch.linalg.lstsq(gram.cpu(), missing[chosen, None].cpu(), driver="gelsd").solution
            return found[:, 0].to(gram)
        return torch.cholesky_solve(missing[chosen, None], factor)[:, 0]

    while True:
        step = change()
        short = missing - margins(step, inputs, labels).flatten()
        short[active] = 0.0
        if refused:
            short[list(refused)] = 0.0
        worst = int(short.argmax()) if len(short) else 0
        if not len(short) or short[worst] <= tolerance:
            return start + step
        active, dual = torch.cat([active, active.new_tensor([worst])]), torch.cat([dual, dual.new_zeros(1)])
        found = solved(active)
        if found[-1] <= 0:
            active, dual = active[:-1], dual[:-1]
            refused.add(worst)
            continue
        refused.clear()
        while (found <= 0).any():
            falls = found <= 0
            dual = dual + (dual[falls] / (dual[falls] - found[falls])).min() * (found - dual)
            kept = dual > 1e-14 * dual.max()
            active, dual = active[kept], dual[kept]
            found = solved(active)
        dual = found


@torch.no_grad()
def weakly_regularised(
    weight: Tensor, inputs: Tensor, labels: Tensor, *, regularisation: float, iterations: int = 200
) -> Tensor:
    """Minimum of the summed cross-entropy and the squared distance to a weight.

        argmin_V sum_i CE(V x_i, y_i) + lambda / 2 ||V - W||^2

    For lambda -> 0 the direction of the result converges to the direction of :func:`least_change`, at the rate of 1 /
    ln(1 / lambda), and its norm grows with ln(1 / lambda) (arXiv:2306.03534 has the exponential loss, whose limit is
    the same). Newton's method with conjugate gradients and backtracking, from W.

    Args:
        weight: W, ``(C, D)``.
        inputs: ``(n, D)``.
        labels: Int64 ``(n,)``.
        regularisation: lambda, above 0.
        iterations: Largest number of Newton steps.

    Returns:
        V, float64 ``(C, D)``.
    """
    above("weakly_regularised", 0, regularisation=regularisation)
    start, inputs = weight.detach().double(), inputs.detach().double()
    targets = F.one_hot(labels, len(start)).double()
    found = start.clone()

    def value(at: Tensor) -> Tensor:
        loss = F.cross_entropy(inputs @ at.T, labels, reduction="sum")
        return loss + regularisation / 2 * (at - start).square().sum()

    for _ in range(iterations):
        share = (inputs @ found.T).softmax(dim=1)  # (n, C)
        slope = (share - targets).T @ inputs + regularisation * (found - start)
        step = _newton_step(slope, share, inputs, regularisation)
        fall, before, size = (slope * step).sum(), value(found), 1.0
        if fall <= 1e-15 * before.abs():
            break
        while value(found - size * step) > before - 1e-4 * size * fall and size > 1e-10:
            size /= 2
        found = found - size * step
    return found


def _newton_step(slope: Tensor, share: Tensor, inputs: Tensor, regularisation: float) -> Tensor:
    """Solution s of ``H s = slope`` by conjugate gradients, with H of the regularised cross-entropy; ``(C, D)``."""

    def curve(direction: Tensor) -> Tensor:
        scores = inputs @ direction.T
        weighted = share * (scores - (share * scores).sum(dim=1, keepdim=True))
        return weighted.T @ inputs + regularisation * direction

    found, rest = torch.zeros_like(slope), slope.clone()
    along, size = rest.clone(), rest.square().sum()
    enough = 1e-6 * size  # a Newton step need not be exact
    for _ in range(4 * slope.numel()):
        if size <= enough:
            break
        curved = curve(along)
        rate = size / (along * curved).sum()
        found, rest = found + rate * along, rest - rate * curved
        size, before = rest.square().sum(), size
        along = rest + size / before * along
    return found


def recurring(
    tasks: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    *,
    num_classes: int = 2,
    order: Order = "cyclic",
    seed: int = 0,
    regularisation: float = 0.0,
) -> tuple[Tensor, list[int]]:
    """Weights of sequential max-margin on tasks that recur, starting from 0.

    Args:
        tasks: Inputs ``(n, D)`` and labels ``(n,)`` of each task.
        steps: Number of tasks that are learnt, one after the other.
        num_classes: C; with 2 the binary classifier is ``w_1 - w_0``.
        order: ``cyclic``: in the given order again and again; ``random``: each step draws a task; ``greedy``: the task
            with the largest :func:`forgetting`.
        seed: Seed of the random order.
        regularisation: lambda of :func:`weakly_regularised`; 0 for :func:`least_change`.

    Returns:
        The weights before the first and after each step, float64 ``(steps + 1, C, D)``, and the task of each step.

    Raises:
        ValueError: If a task is not separable, or an option is out of range.
    """
    at_least("recurring", 1, steps=steps)
    at_least("recurring", 0, regularisation=regularisation)
    one_of("recurring", get_args(Order), order=order)
    weights = [torch.zeros(num_classes, tasks[0][0].shape[1], dtype=torch.float64)]
    drawn = torch.randint(len(tasks), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    learnt: list[int] = []
    for step in range(steps):
        if order == "greedy":
            lost = [forgetting(weights[-1], inputs.double(), labels) for inputs, labels in tasks]
            chosen = lost.index(max(lost))
        else:
            chosen = drawn[step] if order == "random" else step % len(tasks)
        learnt.append(chosen)
        weights.append(_learnt(weights[-1], *tasks[chosen], regularisation))
    return torch.stack(weights), learnt


def _learnt(weight: Tensor, inputs: Tensor, labels: Tensor, regularisation: float) -> Tensor:
    if regularisation == 0:
        return least_change(weight, inputs, labels)
    return weakly_regularised(weight, inputs, labels, regularisation=regularisation)


class MaxMarginHead(ClosedFormHead):
    """Linear classifier that changes as little as possible to classify each task with margin 1.

    No sums are kept: the state is the weight, which :func:`least_change` projects at the end of each task. There is no
    bias; a constant feature is one.

    Args:
        num_features: Size of a feature vector, D.
        against: Margins between the class of a sample and all other classes ``seen`` so far, or only the other classes
            of its ``task``, so that the rows of other classes stay as they are.
        regularisation: lambda of :func:`weakly_regularised`, at least 0; 0 for its limit, the projection.

    Raises:
        ValueError: If an option is out of range.
    """

    needs_all_rows = True

    def __init__(self, num_features: int, *, against: Against = "seen", regularisation: float = 0.0) -> None:
        super().__init__(num_features)
        one_of(self, get_args(Against), against=against)
        at_least(self, 0, regularisation=regularisation)
        self.against, self.regularisation = against, regularisation

    def add(self, features: Tensor, labels: Tensor) -> None:
        weight = self.weight()
        chosen, local = torch.unique(labels, return_inverse=True)
        if self.against == "seen":
            chosen, local = torch.arange(len(weight), device=labels.device), labels
        weight[chosen] = _learnt(weight[chosen], features, local, self.regularisation)
        self._place(weight, None)

    def solution(self) -> tuple[Tensor, None]:
        return self.weight(), None
