"""Speed-up of a method over a reference, at equal accuracy."""

from collections.abc import Sequence


def speed_up(
    accuracies: Sequence[float],
    costs: Sequence[float],
    reference_accuracies: Sequence[float],
    reference_costs: Sequence[float],
    accuracy: float | None = None,
) -> float:
    """Cost of the reference to reach an accuracy, divided by the cost of the method to reach it.

    The cost to reach it is the sum of the costs of all rounds up to the first one with this accuracy (Das et al., TMLR
    2023, arXiv:2305.06408).

    Args:
        accuracies: Accuracy of the method after each round, in [0, 1].
        costs: Cost of each round, such as seconds of training or samples in steps.
        reference_accuracies, reference_costs: Of the reference, which retrains with all labels in each round.
        accuracy: The accuracy; None for the highest one that both reach.

    Returns:
        The ratio, above 1 where the method is faster; nan where one of both does not reach the accuracy.
    """
    wanted = min(max(accuracies), max(reference_accuracies)) if accuracy is None else accuracy

    def needed(found: Sequence[float], spent: Sequence[float]) -> float:
        total = 0.0
        for value, cost in zip(found, spent, strict=True):
            total += cost
            if value >= wanted:
                return total
        return float("nan")

    return needed(reference_accuracies, reference_costs) / needed(accuracies, costs)
