"""Contents of ``results.json`` that are made up, and a reader of the page of a report."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from cl_lightning.loop import results
from cl_lightning.measures import AccuracyMatrix, EvaluationResult
from cl_lightning.report import runs
from cl_lightning.report.runs import Run

FINETUNE = "cl_lightning.strategies.baselines.finetune.Finetune"
ER = "cl_lightning.strategies.rehearsal.er.ER"


def content(
    strategy: str = ER,
    seed: int = 0,
    *,
    level: float = 0.8,
    tasks: int = 3,
    finished: int | None = None,
    options: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    size: int = 2,
    data: str = "x",
) -> dict[str, Any]:
    """What a run of ``tasks`` tasks of ``size`` classes with 50 test samples each has written."""
    finished = tasks if finished is None else finished
    names = classes or [f"class {index}" for index in range(size * tasks)]
    matrix = AccuracyMatrix()
    per_task = []
    for t in range(finished):
        share = [level - 0.05 * (t - i) - 0.01 * seed for i in range(t + 1)]
        hits = torch.tensor([round(100 * value) for value in share])
        columns = size * (t + 1)
        confusion = torch.eye(columns, dtype=torch.int64) * 40
        confusion[:, -1] += 10
        totals = torch.full_like(hits, 100)
        matrix.fill(
            t,
            EvaluationResult(
                totals, hits, (hits + 10).clamp(max=100), confusion=confusion, ece=torch.full((t + 1,), 0.1)
            ),
        )
        per_task.append(matrix.measures(t))
    cost = {
        "seconds": [
            {"training": 1.0 + seed, "statistics": 0.25, "evaluation": 0.5, "saving": 9.0} for _ in range(finished)
        ],
        "images_per_second": [100.0] * finished,
        "peak_memory_bytes": 2**30,
        "bytes_kept": {"exemplars": 2048 * (options or {}).get("memory_size", 1)},
        "bytes_kept_per_rank": [{"exemplars": 2048}],
        "parameters": 1000,
        "trainable_parameters": 900,
        "flops_per_image": 2000,
        "memory_mb": float((options or {}).get("memory_size", 1)),
    }
    return {
        "schema": results.SCHEMA,
        "strategy": strategy,
        "config": {
            "seed_everything": seed,
            "trainer": {"max_epochs": 2, "logger": seed},
            "model": {"class_path": strategy, "init_args": options or {}},
            "data": {"class_path": "cl_lightning.datamodules.digits.Digits", "init_args": {"batch_size": 32}},
        },
        "seed": seed,
        "seeds": {"run": seed, "data": seed, "stream": [seed]},
        "tasks": [
            {"name": f"task {t}", "classes": names[size * t : size * (t + 1)], "train": 300, "val": 0, "test": 100}
            for t in range(tasks)
        ],
        "class_order": list(range(len(names))),
        "order_hash": "0123456789abcdef",
        "fingerprints": [f"{data}{seed}{t}" for t in range(tasks)],
        "finished": finished,
        "matrix": matrix.to_dict(),
        "measures": per_task[-1] if per_task else {},
        "measures_per_task": per_task,
        "per_class": [0.8] * (size * finished),
        "confusion": matrix.confusion.tolist(),
        "cost": cost,
        "protocol": {
            "scenario": {"class_path": "cl_lightning.stream.scenarios.ClassIncremental", "init_args": {"tasks": tasks}},
            "epochs": [{"train": 2}] * finished,
            "steps": [20] * finished,
            "batch_size": 32,
            "augmentation": [],
            "mean": [0.5],
            "std": [0.25],
            "backbone": "MLP",
            "optimizers": [{"name": "SGD", "lr": 0.05, "nesterov": False}],
            "test_data_use": ["evaluation after each task"],
        },
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "hardware": {"device": "cpu", "name": "a processor", "processes": 1, "threads": 1},
        "continual_evaluation": {
            "split": "test",
            "samples": [100] * finished,
            "steps": list(range(0, 20 * finished, 10)),
            "tasks": [index // 2 for index in range(2 * finished)],
            "accuracy": [[0.5 if i <= n // 2 else None for i in range(finished)] for n in range(2 * finished)],
            "measures": {"min_accuracy": 0.25, "windowed_forgetting_10": 0.5},
        },
    }


class Page(HTMLParser):
    """Names of elements, ids, references and texts of a page."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.data: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            assert not name.startswith("on"), "no code in a report"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def check_page(html: str) -> Page:
    """A page is well-formed, and needs nothing outside of it."""
    found = Page()
    found.feed(html)
    found.close()
    assert found.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        assert link.startswith(("#", "data:image/png;base64,"))
        assert not link.startswith("#") or link[1:] in found.ids
    assert set(re.findall(r"url\((?!#)", html)) == set()
    assert not re.search(r"https?://|@import", html)
    html.encode("utf-8")
    return found


def parsed(*args: Any, **kwargs: Any) -> Run:
    return runs.parse(content(*args, **kwargs), Path(f"runs/{args[0] if args else ER}/{kwargs.get('seed', 0)}"))


def put(folder: Path, data: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return folder


def two_methods(seeds: int = 3) -> list[Run]:
    return [
        parsed(method, seed, level=level) for method, level in ((FINETUNE, 0.4), (ER, 0.8)) for seed in range(seeds)
    ]
