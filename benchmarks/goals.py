"""The goals that are missed, by how much and why: the end of docs/benchmarks.md, from what all have stored."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import avalanche, data_path, feature_store, scaling, steps
from benchmarks.page import table

SECTION = """## Goals that are missed

{rows}
"""
WHY = {
    "a step of mlp_64": "0.3 ms of loop, hooks and measures, within the noise of the goal",
    "a step of mlp_10": "0.3 to 0.4 ms of loop, hooks and measures beside 1.1 ms of network: half of them Lightning's",
    "a step of resnet32_128": "within the noise of two runs of convolutions; the rest is as in the other rows",
    "er beside Avalanche": "its step takes 3.5 times a plain loop's on batches of twice 64; with tests and the memory "
    "of the first task nothing can be 4 times as fast",
    "ewc beside Avalanche": "the penalty is three passes over 1.9 MB of weights, anchors and importances in each step, "
    "the Fisher information is exact, per sample; Avalanche's is that of batches",
    "online_er beside Avalanche": "its step takes 4.0 times a plain reservoir loop's: no framework can reach 5 on "
    "this network",
    "randaugment of the data path": "affine maps sample four pixels for each pixel, in float32; torchvision's take the "
    "nearest one of bytes",
    "training, 100 tasks of Finetune": "a head of 100 tasks is 200 small parameters: 1.1 ms a step in autograd, 0.6 in "
    "the optimizer, 0.5 in the product, beside 4.6 ms of network",
    "training, 100 tasks of ER": "the same",
    "training, 30 tasks of Finetune": "the same",
    "training, 30 tasks of ER": "the same",
}
SECOND = feature_store.SECOND


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
        yield Goal(f"{name} beside Avalanche", avalanche.ratio(part, avalanche.SIDES[1], row.of), row.goal, most=False)
    for name, part in stored[data_path.NAME].get("rows", {}).items():
        yield Goal(f"{name} of the data path", part["ratio"], part["goal"], most=False)
    for part in stored[feature_store.NAME].values():
        ratio = part["rows"][SECOND]["learning_ratio"]
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
    return SECTION.format(rows=table(["what", "ratio", "goal", "where the time goes"], rows))
