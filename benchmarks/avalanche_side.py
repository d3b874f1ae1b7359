"""The other side of ``benchmarks.avalanche``: runs in the environment that has Avalanche, with ``python -P``.

(Without ``-P`` the name ``avalanche`` would mean the file beside this one.) It reads one run per line from its input,
as JSON, and answers each with a line of JSON.
"""

import contextlib
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

warnings.filterwarnings("ignore")
import avalanche  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from avalanche.benchmarks import class_incremental_benchmark  # noqa: E402
from avalanche.benchmarks.scenarios.online import split_online_stream  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.models import IncrementalClassifier  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin  # noqa: E402
from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.supervised import AGEM, EWC, LwF, Naive, SynapticIntelligence  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.transforms import Compose, Normalize, ToTensor  # noqa: E402

METHODS = {"finetune": Naive, "er": Naive, "lwf": LwF, "ewc": EWC, "si": SynapticIntelligence, "agem": AGEM}


def now() -> np.ndarray:
    """Seconds on the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock(SupervisedPlugin):
    """Seconds from the beginning of the first step of each task to the end of its last one, and number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.steps = np.zeros(2), 0
        self.first: Any = None
        self.last = np.zeros(2)

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        if self.first is None:
            self.first = now()

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.last = now()
        self.steps += 1

    def end_task(self) -> None:
        self.seconds += self.last - self.first
        self.first = None


class Tensors(torch.utils.data.Dataset):
    """Images that were scaled and normalised ahead, all at once."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: float, std: float) -> None:
        self.images = torch.from_numpy(images)[:, None].float().div_(255).sub_(mean).div_(std)
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


class Pictures(torch.utils.data.Dataset):
    """Images of PIL with a transform, as the data sets of torchvision are: those of Avalanche's own SplitFMNIST."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: float, std: float) -> None:
        self.images, self.targets = torch.from_numpy(images), labels.tolist()
        self.transform = Compose([ToTensor(), Normalize((mean,), (std,))])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].numpy(), mode="L")), self.targets[index]


DATA: dict[str, Callable[..., Any]] = {"tensors": Tensors, "pictures": Pictures}


def run(row: dict[str, Any]) -> dict[str, float]:
    """Learn the stream of a row once."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(row["seed"])
    begun = now()
    with np.load(row["data"]) as file:
        parts: Any = {
            part: DATA[row["images"]](file[f"x_{part}"], file[f"y_{part}"], row["mean"], row["std"])
            for part in ("train", "test")
        }
    benchmark = class_incremental_benchmark(parts, class_order=list(range(10)), num_experiences=row["tasks"])
    layers = [nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU()]
    head = IncrementalClassifier(400, initial_out_features=10 // row["tasks"])  # grows, as on the other side
    network, clock, options = nn.Sequential(*layers, head), Clock(), dict(row["options"])
    plugins: list[Any] = [clock]
    if (size := options.pop("memory_size", 0)) > 0:
        plugins.append(ReplayPlugin(mem_size=size, storage_policy=ReservoirSamplingBuffer(max_size=size)))
    strategy = METHODS[row["method"]](
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=row["lr"], momentum=row["momentum"]),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=row["batch_size"],
        eval_mb_size=row["eval_batch_size"],
        train_epochs=row["epochs"],
        plugins=plugins,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[]),
        **options,
    )
    measured: dict[str, float] = {}
    for experience in benchmark.train_stream:
        stream: Any = experience
        if row["online"]:
            stream = split_online_stream([experience], experience_size=row["batch_size"], access_task_boundaries=True)
        strategy.train(stream, eval_streams=[])
        clock.end_task()
        measured = strategy.eval(benchmark.test_stream[: experience.current_experience + 1])
    total = now() - begun
    accuracies = [value for name, value in measured.items() if name.startswith("Top1_Acc_Exp/eval_phase")]
    if len(accuracies) != row["tasks"]:
        raise RuntimeError(f"{len(accuracies)} accuracies for {row['tasks']} tasks: {sorted(measured)}")
    accuracy = sum(accuracies) / len(accuracies)
    return {
        **dict(zip(("training_s", "training_cpu_s"), clock.seconds.tolist(), strict=True)),
        **dict(zip(("total_s", "total_cpu_s"), total.tolist(), strict=True)),
        "steps": clock.steps,
        "accuracy": accuracy,
    }


def main() -> None:
    answers = sys.stdout
    torch.set_num_threads(1)
    # Avalanche tells in each step of an online stream what is deprecated in it, past all filters: not counted.
    warnings.showwarning = lambda *_, **__: None
    print(json.dumps({"avalanche-lib": avalanche.__version__, "torch": torch.__version__}), file=answers, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
