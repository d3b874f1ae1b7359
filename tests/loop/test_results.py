import csv
import json
import os
import random
import re
import time

import pytest
import torch
from lightning.pytorch import Callback
from support import ROOT, forks
from support.runs import NormNet, StopAt, loop, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.compatibility_matrix import CompatibilityMatrix
from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.data import RandomHorizontalFlip
from cl_lightning.loop import results
from cl_lightning.loop.logging import MetricsFile, bias
from cl_lightning.measures import AccuracyMatrix, EvaluationResult
from cl_lightning.memory import PrototypeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import Task

SECONDS = ("training", "statistics", "evaluation", "saving")


def er(**options):
    return ER(**{"memory_size": 40, "backbone": plain_net, "optimizer": sgd, **options})


def read(folder):
    return json.loads((folder / "results.json").read_text())


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def watching():
    return ContinualEvaluation(every_n_steps=5), CompatibilityMatrix(samples=50)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three tasks that was not interrupted: its folder, its loop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(er(), *watching(), folder=folder, log_every_n_steps=2)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, which crashed in the middle of task 1 and went on in the same folder."""
    folder, saving = tmp_path_factory.mktemp("resumed"), {"save_every_n_steps": 3, "save_every_seconds": 0.0}
    options = {"folder": folder, "options": saving, "log_every_n_steps": 2}
    broken = loop(er(), *watching(), StopAt(1, 4), **options)
    with pytest.raises(StopAt.CrashError):
        broken.fit()
    left = read(folder)
    rows = table(folder)
    again = loop(er(), *watching(), **options)
    again.fit("last")
    return folder, left, rows, broken, again


# ---------------------------------------------------------------------- what is in the file


def test_the_documentation_names_every_key_and_no_other(whole):
    content = read(whole[0])
    text = (ROOT / "docs" / "results_schema.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    documented = {match.group(1) for line in lines if (match := re.match(r"\| `([\w.]+)`", line))}
    found = set(content)
    for part in ("cost", "protocol", "hardware", "seeds", "continual_evaluation", "compatibility_matrix"):
        found |= {f"{part}.{key}" for key in content[part]}
    found |= {f"matrix.{key}" for key in content["matrix"]}
    found |= {f"tasks.{key}" for key in content["tasks"][0]}
    found |= {f"cost.seconds.{key}" for key in content["cost"]["seconds"][0]}
    found |= {f"measures.{key}" for key in content["measures"] if "/" not in key}
    only_elsewhere = {"hardware.cuda", "hardware.device_memory_bytes", "measures.forward_transfer"}
    only_elsewhere |= {"measures.mean_online_error", "measures.mean_unknown_auroc"}  # of test-time streams
    only_elsewhere |= {"protocol.wrong_labels", "protocol.requests"}  # of streams with noisy labels, with requests
    only_elsewhere |= {
        key for key in documented if key.startswith("plasticity")
    }  # of a callback with a test of its own
    assert documented - found == only_elsewhere
    assert found - documented == set()
    assert f"schema is {results.SCHEMA}" in text


def test_per_class_accuracy_confusion_and_calibration_belong_to_the_last_evaluation(whole):
    content, made = read(whole[0]), whole[1]
    confusion = torch.tensor(content["confusion"])
    assert confusion.sum() == sum(content["matrix"]["totals"])
    row = made.strategy.evaluation.result
    assert torch.equal(confusion, row.confusion)
    assert content["per_class"] == pytest.approx((confusion.diagonal() / confusion.sum(1)).tolist())
    assert content["matrix"]["R_ece"][2] == pytest.approx(row.ece.tolist())
    correct = sum(confusion.diagonal()).item() / confusion.sum().item()
    assert content["measures"]["average_accuracy"] == pytest.approx(correct)
    weights = row.totals / row.totals.sum()
    assert content["measures"]["calibration_error"] == pytest.approx(float((weights * row.ece).sum()))


def test_few_shot_measures_split_by_the_classes_of_the_first_task(whole):
    content = read(whole[0])
    classes = content["per_class"]
    base, novel = sum(classes[:4]) / 4, sum(classes[4:]) / 6
    found = content["measures"]
    assert found["base_accuracy"] == pytest.approx(base)
    assert found["novel_accuracy"] == pytest.approx(novel)
    assert found["harmonic_accuracy"] == pytest.approx(2 * base * novel / (base + novel))
    first = content["measures_per_task"][0]
    assert found["performance_drop"] == pytest.approx(first["average_accuracy"] - found["average_accuracy"])
    assert "novel_accuracy" not in first


def test_the_hash_of_the_order_is_that_of_the_classes_in_their_tasks(whole, tmp_path):
    other = run(er(), folder=tmp_path, max_epochs=1, data={"seed": 3}).results()
    mine = read(whole[0])
    assert other["order_hash"] == mine["order_hash"]  # the natural order does not depend on the seed
    assert other["seeds"]["data"] == 3
    assert mine["seeds"]["data"] == mine["seed"] == 0
    assert mine["class_order"] == [label for task in mine["tasks"] for label in task["labels"]]


def test_epochs_and_steps_are_those_that_were_run(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping

    stopping = EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=2.0)  # never satisfied
    content = run(er(), stopping, folder=tmp_path, max_epochs=4, data={"val_fraction": 0.2}).results()
    epochs, steps = content["protocol"]["epochs"], content["protocol"]["steps"]
    assert all(task["train"] < 4 for task in epochs)
    for task, numbers, count in zip(content["tasks"], epochs, steps, strict=True):
        assert count == numbers["train"] * -(-task["train"] // 64)


def test_a_callback_offers_results_under_its_name_in_snake_case():
    class MeasuresURLs2Times(ContinualCallback):
        def __init__(self, value):
            self.value = value

        def results(self):
            return {"value": self.value}

    class Cost(MeasuresURLs2Times):
        pass

    callbacks = [MeasuresURLs2Times(1), MeasuresURLs2Times(2), Cost(3)]
    made = run(Finetune(), *callbacks, max_epochs=1).results()
    assert made["measures_ur_ls2_times"] == {"value": 1}
    assert made["measures_ur_ls2_times_2"] == {"value": 2}
    assert made["cost_2"] == {"value": 3}  # what is there already is not overwritten


def test_what_gives_access_to_an_account_is_removed_from_the_configuration(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    text = "model: {num_tokens: 4, class_token: true}\ntrainer:\n  logger: {api_key: abc, note: " + "k" * 40 + "}\n"
    clean = results.without_secrets(text)
    assert "abc" not in clean
    assert "k" * 40 not in clean
    assert "num_tokens: 4" in clean
    plain = "# a comment\nmodel: {token_size: 3}\n"
    assert results.without_secrets(plain) == plain


def test_writing_leaves_the_old_file_whole_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write(path, {"a": [[1, 2], [3, None]], "b": ["[\n 1, \n 2 ]"]})
    assert json.loads(path.read_text()) == {"a": [[1, 2], [3, None]], "b": ["[\n 1, \n 2 ]"]}
    assert "[1, 2]" in path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.write(path, {"a": float("nan")})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == [[1, 2], [3, None]]


def test_a_matrix_of_an_older_version_is_read_without_what_it_lacks():
    matrix = AccuracyMatrix()
    matrix.fill(
        0, EvaluationResult(*(torch.tensor([4]) for _ in range(3)), confusion=torch.eye(2, dtype=torch.int64) * 2)
    )
    old = {
        name: value for name, value in matrix.state_dict().items() if name not in ("R_ece", "per_class", "confusion")
    }
    again = AccuracyMatrix()
    again.load_state_dict(old)
    assert again.R_ece.isnan().all()
    assert AccuracyMatrix.from_dict({n: v for n, v in matrix.to_dict().items() if n in old}).R_ci.tolist() == [[1.0]]
    assert AccuracyMatrix.from_dict(matrix.to_dict()).per_class.tolist() == [[1.0, 1.0]]


# ---------------------------------------------------------------------- cost


def test_images_samples_and_steps_are_counted_one_by_one(whole):
    content = read(whole[0])
    cost, train = content["cost"], [task["train"] for task in content["tasks"]]
    assert cost["images"] == [2 * count for count in train]
    assert content["protocol"]["steps"] == [2 * -(-count // 64) for count in train]
    # In the first step there is nothing to replay; then as much as the batch has, or the memory holds (40).
    sizes = [[64] * (count // 64) + [count % 64] for count in train]
    replayed = [2 * sum(min(size, 40) for size in task) for task in sizes]
    replayed[0] -= 40
    assert cost["samples"] == [images + more for images, more in zip(cost["images"], replayed, strict=True)]
    for task, seconds in enumerate(cost["seconds"]):
        assert cost["images_per_second"][task] == pytest.approx(cost["images"][task] / seconds["training"], rel=0.01)


def test_samples_that_a_loader_mixes_in_are_no_images_of_the_stream(tmp_path):
    content = run(er(replay_by="loader"), folder=tmp_path).results()
    train = [task["train"] for task in content["tasks"]]
    assert content["cost"]["images"] == [2 * count for count in train]
    assert content["cost"]["samples"] == [2 * (count + (40 if task else 0)) for task, count in enumerate(train)]


class Paying(Callback):
    """Notes where the seconds of training steps and of validation batches go."""

    def __init__(self):
        self.loop, self.noted = None, []

    def on_train_batch_start(self, *_):
        self.noted.append(("step", self.loop.meter._kind))

    def on_validation_batch_start(self, *_):
        self.noted.append(("validation", self.loop.meter._kind))


def test_validation_is_evaluation():
    paying = Paying()
    made = paying.loop = loop(er(), paying, data={"val_fraction": 0.2}, max_epochs=2)
    made.fit()
    assert set(paying.noted) == {("step", "training"), ("validation", "evaluation")}
    assert paying.noted[-1][0] == "validation"
    assert made.meter.tasks[0].evaluation > 0


# ---------------------------------------------------------------------- resume and crash


def without_time(content):
    """What two runs must agree in."""
    kept = {key: value for key, value in content.items() if key not in ("cost", "config", "option_changes")}
    cost = ("images", "samples", "bytes_kept", "parameters", "flops_per_image", "memory_mb_per_task")
    return kept | {name: content["cost"][name] for name in cost}


def test_a_resumed_run_writes_the_results_of_an_uninterrupted_one(whole, resumed):
    left = resumed[1]
    assert left["finished"] == 1
    assert left["measures_per_task"] == read(whole[0])["measures_per_task"][:1]
    assert without_time(read(resumed[0])) == without_time(read(whole[0]))


def test_seconds_of_a_task_are_continued_when_a_run_is_resumed(resumed):
    folder, _, _, broken, again = resumed
    before, after = broken.meter.tasks, again.meter.tasks
    assert after[0].training == pytest.approx(before[0].training)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["cl_lightning"]["costs"]
    assert len(saved) == 3
    assert after[1].training > before[1].training / 2 > 0
    assert all(getattr(task, kind) >= 0 for task in after for kind in SECONDS)


def test_the_table_of_metrics_has_one_axis_over_the_stream(whole):
    rows = table(whole[0])
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == whole[1].trainer.global_step
    matrix = read(whole[0])["matrix"]["R_ci"]
    ends = [row for row in rows if row["accuracy/task_00"]]
    for t, row in enumerate(ends):
        assert [float(row[f"accuracy/task_{i:02d}"]) for i in range(t + 1)] == matrix[t][: t + 1]
        assert not any(row[f"accuracy/task_{i:02d}"] for i in range(t + 1, 3))
    assert {"train/ce", "train/loss", "train/lr", "cost/training_seconds", "head/norm_task_02"} <= rows[0].keys()
    assert sum(bool(row["train/loss"]) for row in rows) == whole[1].trainer.global_step // 2  # tasks of even length


def test_validation_is_logged_at_the_step_that_it_comes_after(tmp_path):
    run(er(), folder=tmp_path, data={"val_fraction": 0.2}, log_every_n_steps=4)  # the epochs of task 0 have 8 steps
    rows = table(tmp_path)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert [step for step, row in zip(steps, rows, strict=True) if row["val/loss"]][:2] == [8, 16]


def test_losses_of_a_short_phase_are_logged_at_its_end(tmp_path):
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 50}
    made = run(er(), ContinualEvaluation(every_n_steps=3), folder=tmp_path, **options)
    rows = table(tmp_path)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert made.trainer.global_step < made.trainer.log_every_n_steps
    logged = [(step, float(row["task"])) for step, row in zip(steps, rows, strict=True) if row["train/loss"]]
    ends = torch.tensor([cost.steps for cost in made.meter.tasks]).cumsum(0).tolist()
    assert logged == [(end, task) for task, end in enumerate(ends)]


def test_the_table_of_a_resumed_run_is_that_of_an_uninterrupted_one(whole, resumed):
    torn, rows, expected = resumed[2], table(resumed[0]), table(whole[0])
    assert max(int(row["step"]) for row in torn) < int(rows[-1]["step"])
    assert rows[0].keys() == expected[0].keys()
    passing = "cost/"
    for mine, other in zip(rows, expected, strict=True):
        keys = [key for key in mine if not key.startswith(passing)]
        assert [mine[key] for key in keys] == [other[key] for key in keys]


def _learn(folder):
    """Until it is killed."""
    options = {"save_every_seconds": 0.0, "save_every_n_steps": 3}
    made = loop(er(), ContinualEvaluation(every_n_steps=2), folder=folder, options=options, max_epochs=3)
    made.fit("last" if (folder / "checkpoints" / "last.ckpt").exists() else None)


def test_a_crash_at_any_moment_leaves_the_results_of_the_finished_tasks(tmp_path):
    chance, seen = random.Random(0), [0]
    saved = tmp_path / "checkpoints" / "last.ckpt"
    for life in range(5):
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process = forks.start(_learn, tmp_path)
        while process.is_alive() and (not saved.exists() or saved.stat().st_mtime_ns == before):
            time.sleep(0.002)
        process.join(chance.uniform(0.0, 0.3) if life < 4 else 60)
        process.kill()
        process.join()
        content = read(tmp_path)
        finished = content["finished"]
        assert len(content["measures_per_task"]) == finished
        assert all(value is not None for t in range(finished) for value in content["matrix"]["R_ci"][t][: t + 1])
        assert len(content["cost"]["seconds"]) >= finished
        assert table(tmp_path)
        seen.append(finished)
    assert seen == sorted(seen)
    assert seen[-1] == 3
    expected = loop(er(), ContinualEvaluation(every_n_steps=2), max_epochs=3)
    expected.fit()
    assert content["matrix"] == expected.results()["matrix"]
    assert not list(tmp_path.glob(".results*"))


# ---------------------------------------------------------------------- live views


def test_new_names_make_new_columns_and_rows_of_one_step_are_one(tmp_path):
    made = MetricsFile(tmp_path / "metrics.csv")
    made.log_metrics({"a": 1.0}, step=1)
    made.log_metrics({"b": torch.tensor(2.0)}, step=1)
    made.save()
    made.log_metrics({"b": 3.0}, step=2)
    made.save()
    made.log_metrics({"c": 4.5}, step=2)
    made.log_metrics({"c": 5.5}, step=2)  # the same name twice is two rows
    made.save()
    made.save()
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "step,a,b,c",
        "1,1.0,2.0,",
        "2,,3.0,",
        "2,,,4.5",
        "2,,,5.5",
    ]


def test_a_table_is_cut_at_the_row_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n1,1.0\n2,2.0\n3,3.0\n4,4")
    made = MetricsFile(path, keep=2)
    made.log_metrics({"a": 9.0, "b": 1.0}, step=3)
    made.save()
    assert path.read_text().split() == ["step,a,b", "1,1.0,", "2,2.0,", "3,9.0,1.0"]
    assert made.written == 3
    assert MetricsFile(path, up_to=2).written == 2
    MetricsFile(path)
    assert not path.exists()


def test_many_rows_are_written_before_the_end(tmp_path):
    made = MetricsFile(tmp_path / "metrics.csv")
    for step in range(600):
        made.log_metrics({"a": 1.0}, step=step)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) > 500


def test_bias_is_read_off_the_confusion_matrix():
    confusion = torch.tensor([[2, 0, 2], [0, 1, 3], [1, 0, 1]])
    task = Task(1, "t", (2,), (2,), (2,), 1, 3)
    found = bias(confusion, task)
    assert found["bias/new_predicted"] == pytest.approx(6 / 10)
    assert found["bias/new_true"] == pytest.approx(2 / 10)
    assert found["bias/old_as_new"] == pytest.approx(5 / 8)
    assert found["bias/new_as_old"] == pytest.approx(1 / 2)
    assert bias(confusion, Task(0, "t", (0, 1, 2), (0, 1, 2), (0, 1, 2), 3, 3)) == {}


def test_the_norms_of_the_head_match_its_rows(whole):
    made = whole[1]
    rows = made.strategy.network.head.weight().norm(dim=1)
    last = [row for row in table(whole[0]) if row["head/norm_task_02"]][-1]
    for task, columns in enumerate(([0, 1, 2, 3], [4, 5, 6], [7, 8, 9])):
        assert float(last[f"head/norm_task_{task:02d}"]) == pytest.approx(float(rows[columns].mean()))


def test_features_move_away_from_prototypes_that_stay(tmp_path):
    """Nothing moves with a frozen backbone; with one that learns on, the gap of the first task grows."""
    for frozen in (True, False):
        folder = tmp_path / str(frozen)
        run(Finetune(head=PrototypeHead, backbone=NormNet, freeze_backbone=frozen), folder=folder, max_epochs=4)
        gaps = [float(row["prototypes/gap_task_00"]) for row in table(folder) if row["prototypes/gap_task_00"]]
        assert len(gaps) == 3
        if frozen:
            assert gaps[0] > 0
            # fewer images per task, as tasks become more
            assert gaps == pytest.approx([gaps[0]] * 3, rel=0.05)
        else:
            assert gaps[2] > 1.5 * gaps[0]


def test_measuring_changes_nothing_in_a_run(tmp_path):
    logged, silent = run(er(), folder=tmp_path), run(er())
    for mine, other in zip(logged.strategy.state_dict().items(), silent.strategy.state_dict().items(), strict=True):
        assert mine[0] == other[0]
        assert torch.equal(mine[1], other[1])


def test_tensorboard_gets_the_same_points_as_the_table(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="", sub_dir="tensorboard")
    run(er(), folder=tmp_path, logger=logger, log_every_n_steps=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = table(tmp_path)
    for name in ("train/ce", "stream/average_accuracy", "accuracy/task_00"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [step for step, _ in points] == [step for step, _ in expected]
        assert [value for _, value in points] == pytest.approx([value for _, value in expected])


def _account_in_a_pair(path):
    made = run(er(), devices=2, strategy="ddp", max_epochs=1)
    if made.trainer.is_global_zero:
        path.write_text(json.dumps(made.results()))


def test_two_processes_account_for_what_one_does(tmp_path):
    forks.pair(_account_in_a_pair, tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    one = run(er(), max_epochs=1).results()
    for name in ("images", "samples", "bytes_kept", "parameters", "memory_mb", "flops_per_image"):
        assert two["cost"][name] == one["cost"][name], name
    assert two["protocol"]["steps"] == one["protocol"]["steps"]
    assert len(two["cost"]["bytes_kept_per_rank"]) == 2
    assert two["hardware"]["processes"] == 2
    assert torch.tensor(two["confusion"]).sum() == torch.tensor(one["confusion"]).sum()


def test_augmentation_is_named_in_the_protocol():
    made = run(er(), data={"transforms": [RandomHorizontalFlip()]}, max_epochs=1).results()
    assert made["protocol"]["augmentation"] == ["RandomHorizontalFlip"]


def test_rows_of_finished_tasks_are_turned_into_text_once():
    """With each task a row gets a null more; the text of its entries stays, and the file is the same as without it."""

    def matrix(tasks):
        return [[t + i / 7 if i <= t else None for i in range(tasks)] for t in range(tasks)]

    content = {"R": matrix(30), "empty": [], "gaps": [[None, 1.5, None], [None, None, None], [0.1]], "counts": [[1, 2]]}
    assert json.loads(results._indented(content)) == content
    before = results._text_of_row.cache_info().misses
    text = results._indented({"R": matrix(31)})
    assert results._text_of_row.cache_info().misses - before == 1
    assert json.loads(text) == {"R": matrix(31)}
    mixed = [[1, 1.0, True, None], [1.0, 1, None, 2.0], [0.25, None], [1.0, "a"], [None, {"b": None}], [None]]
    assert "".join(results._indented(mixed).split()) == "".join(json.dumps(mixed).split())
    with pytest.raises(ValueError, match="Out of range"):
        results._indented([[float("nan")]])
