"""The missed goals, with ratios and reasons: the end of docs/benchmarks.md, from the numbers of all benchmarks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import avalanche, data_path, feature_store, scaling, steps
from benchmarks.numbers import table

SECTION = """## Missed goals

{rows}
"""
WHY = {
    "a step of mlp_64": "0.3 ms of loop, hooks and measures",
    "a step of mlp_10": "0.3 to 0.5 ms of loop, hooks and measures, half of it Lightning's, plus 1.1 ms of network",
    "a step of resnet32_128": "not found: hooks and measures take about 0.4 ms, less than the noise of convolutions",
    "Replay compared with Avalanche": "a plain loop on batches of twice 64 is 3.5 times as fast as Avalanche, without "
    "tests and without replay in the first task",
    "EWC compared with Avalanche": "the penalty reads weights, anchors and importances, 1.9 MB each, in each step; the "
    "Fisher information is computed per sample, in Avalanche per batch",
    "online ER compared with Avalanche": "a plain reservoir loop is 4.0 times as fast as Avalanche on this network",
    "crop, flip, RandAugment (2, 9) in the data path": "a hundred small kernels per batch, pixels to float32 and back; "
    "the 2 workers had a core each, so that by processor time the ratio is twice as large",
    "training, 100 tasks of Finetune": "a head of 100 tasks is 200 small parameters: 1.1 ms per step in autograd, 0.6 "
    "in the optimizer, 0.5 in the forward pass, plus 4.6 ms of network",
    "training, 100 tasks of ER": "as above",
    "training, 30 tasks of Finetune": "as with 100 tasks",
    "training, 30 tasks of ER": "as with 100 tasks",
}


class Goal(NamedTuple):
    """A number and what it is to be: at most ``aim`` where ``most``, else at least."""

    name: str
    value: float
    aim: float
    most: bool

    @property
    def missed(self) -> bool:
        return round(self.value, 2) > self.aim if self.most else round(self.value, 2) < self.aim


def goals(stored: dict[str, dict[str, Any]]) -> Iterator[Goal]:
    """All goals of what was measured, by name of the benchmark."""
    for name, part in stored[steps.NAME].items():
        yield Goal(f"a step of {name}", part["ratio"], part["goal"], most=True)
    for name, part in stored[avalanche.NAME].get("rows", {}).items():
        row = avalanche.ROWS[name]
        yield Goal(
            f"{row.title} compared with Avalanche",
            avalanche.ratio(part, avalanche.SIDES[1], row.of),
            row.goal,
            most=False,
        )
    for name, part in stored[data_path.NAME].get("rows", {}).items():
        yield Goal(f"{data_path.ROWS[name].title} in the data path", part["ratio"], part["goal"], most=False)
    for part in stored[feature_store.NAME].values():
        ratio = part["rows"][feature_store.SECOND]["learning_ratio"]
        yield Goal("a second method from the feature store", ratio, feature_store.GOAL, most=False)
    for part in stored[scaling.NAME].get("streams", []):
        name = f"training, {part['tasks']} tasks of {part['method']}"
        yield Goal(name, part["training_ms_ratio"], scaling.GOAL, most=True)


def section(stored: dict[str, dict[str, Any]]) -> str:
    """Of the page."""
    rows = [
        [
            goal.name,
            f"{goal.value:.2f}",
            f"{'at most' if goal.most else 'at least'} {goal.aim:g}",
            WHY.get(goal.name, ""),
        ]
        for goal in goals(stored)
        if goal.missed
    ]
    return SECTION.format(rows=table(["what", "ratio", "goal", "reason"], rows))
