"""Against real W&B runs in offline mode, read back from the files that W&B writes."""

import contextlib
import json
import struct
import time

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from support import ROOT
from support.runs import NormNet, StopAt, loop, plain_net, sgd

from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.cli import main
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import TaskLoop
from cl_lightning.memory import PrototypeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER

wandb = pytest.importorskip("wandb")
SECRET = "0123456789abcdef" * 2 + "01234567"
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODE": "offline", "SILENT": "true", "API_KEY": SECRET, "CONSOLE": "off"}.items():
            patch.setenv(f"WANDB_{name}", value)
        yield
    wandb.teardown()


def records(path):
    """Records of a ``.wandb`` file: a log in the format of LevelDB, with blocks of 32 KiB, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes() if path is not None else b"", 7, []
    assert data[:4] in (b":W&B", b"")
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7]) if left >= 7 else (0, 0)
        if kind == 0:  # padding up to the next block
            place += left
            continue
        if place + 7 + size > len(data):
            break
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def key_of(item):
    return "/".join(item.nested_key) if item.nested_key else item.key


class Read:
    """What a W&B run has in its file: identity, configuration, history in order, last summary, exit code."""

    def __init__(self, folder):
        self.folder, self.config, self.history, self.summary, self.exit = folder, {}, [], {}, None
        for record in records(next(folder.glob("*.wandb"), None)):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, updates = record.run.run_id, record.run.config.update
            else:
                updates = record.config.update if kind == "config" else ()
            self.config |= {key_of(item): json.loads(item.value_json) for item in updates}
            if kind == "history":
                self.history.append({key_of(item): json.loads(item.value_json) for item in record.history.item})
            if kind == "summary":
                self.summary |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
            if kind == "exit":
                self.exit = record.exit.exit_code

    def curve(self, name):
        return [(row["trainer/global_step"], row[name]) for row in self.history if name in row]


def runs_in(folder):
    """The runs in order of time; the process of W&B may take a moment to write the end of a run that is finished."""
    found = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        runs = [Read(folder) for folder in found]
        if all(run.exit is not None for run in runs):
            return runs
        time.sleep(0.05)
    raise AssertionError(f"no end of the run in {found}")


def strategy():
    return ER(memory_size=40, backbone=NormNet, head=PrototypeHead, optimizer=sgd)


def made(folder, *callbacks, **options):
    logger = WandbLogger(save_dir=folder, project="tests")
    return loop(strategy(), *callbacks, folder=folder, logger=logger, log_every_n_steps=2, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = made(folder, ContinualEvaluation(every_n_steps=3))
    run.fit()
    (read,) = runs_in(folder)
    return run, read


def test_all_that_is_logged_has_one_axis_that_never_goes_back(whole):
    run, read = whole
    steps = [row["trainer/global_step"] for row in read.history]
    assert steps == sorted(steps)
    assert steps[-1] == run.trainer.global_step
    assert [row["_step"] for row in read.history] == list(range(len(read.history)))
    assert read.exit == 0


def test_the_run_holds_what_a_stream_is_watched_by(whole):
    run, read = whole
    names = {name for row in read.history for name in row}
    tasks = [f"task_{index:02d}" for index in range(3)]
    assert {"train/ce", "train/loss", "train/lr", "stream/average_accuracy", "stream/forgetting"} <= names
    assert {f"accuracy/{task}" for task in tasks} <= names
    assert {f"continual/{task}" for task in tasks} <= names
    assert {"bias/new_predicted", "bias/new_true", "bias/old_as_new", "continual/min_accuracy"} <= names
    assert {f"head/norm_{task}" for task in tasks} <= names
    assert {f"prototypes/gap_{task}" for task in tasks} <= names
    assert {"cost/training_seconds", "cost/images_per_second", "cost/memory_mb", "cost/kept_exemplars_mb"} <= names
    assert len(read.curve("train/ce")) == run.trainer.global_step // 2
    ends = [sum(cost.steps for cost in run.meter.tasks[: t + 1]) for t in range(3)]
    expected = [run.matrix.measures(t)["average_accuracy"] for t in range(3)]
    assert [step for step, _ in read.curve("stream/average_accuracy")] == ends
    assert [value for _, value in read.curve("stream/average_accuracy")] == pytest.approx(expected)


def test_the_matrix_is_a_table_that_is_shown_as_a_heat_map(whole):
    run, read = whole
    tables = [row for row in read.history if "accuracy_matrix_table/path" in row]
    assert len(tables) == 3
    last = json.loads((read.folder / "files" / tables[-1]["accuracy_matrix_table/path"]).read_text())
    assert last["columns"] == ["after task", "on task", "accuracy"]
    known = [(t, i) for t in range(3) for i in range(t + 1)]
    assert [(int(t), int(i)) for t, i, _ in last["data"]] == known
    assert [value for *_, value in last["data"]] == pytest.approx([float(run.matrix.R_ci[t, i]) for t, i in known])
    shown = read.config["_wandb/visualize/accuracy_matrix"]
    assert shown["panel_config"]["panelDefId"] == "wandb/confusion_matrix/v1"


def test_the_summary_has_what_a_sweep_sorts_by(whole):
    run, read = whole
    measures = run.matrix.measures()
    assert read.summary["last_accuracy"] == pytest.approx(measures["average_accuracy"])
    for name in ("average_incremental_accuracy", "forgetting", "backward_transfer", "learning_accuracy"):
        assert read.summary[name] == pytest.approx(measures[name])
    assert read.summary["task_aware/last_accuracy"] == pytest.approx(measures["task_aware/average_accuracy"])
    assert read.summary["tasks_finished"] == 3
    assert read.summary["seconds"] > 0


def test_a_resumed_run_continues_the_same_run_of_wandb(tmp_path):
    saving = {"save_every_n_steps": 2, "save_every_seconds": 0.0}
    broken = made(tmp_path, StopAt(1, 4), options=saving)
    with pytest.raises(StopAt.CrashError):
        broken.fit()
    assert wandb.run is None
    again = made(tmp_path, options=saving)
    again.fit("last")
    first, second = runs_in(tmp_path)
    assert first.id == second.id == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first.exit, second.exit) == (1, 0)
    began = second.history[0]["trainer/global_step"]
    assert 0 < began <= first.history[-1]["trainer/global_step"] + 2
    tasks = [value for read in (first, second) for _, value in read.curve("accuracy/task_00")]
    assert tasks == pytest.approx(again.matrix.R_ci[:, 0].tolist())
    # A fresh run in another folder is another run of W&B, also when it goes on from that checkpoint.
    other = loop(
        strategy(),
        folder=tmp_path / "other",
        logger=WandbLogger(save_dir=tmp_path / "other", project="tests"),
        options={"stop_after_task": 2},
    )
    other.fit(tmp_path / "checkpoints" / "last.ckpt")
    assert [read.id for read in runs_in(tmp_path / "other")] != [first.id]


def test_a_run_that_the_caller_has_started_is_not_ended(tmp_path):
    started = wandb.init(project="tests", dir=tmp_path)
    try:
        logger = WandbLogger(experiment=started)
        loop(Finetune(backbone=plain_net), folder=tmp_path, logger=logger, max_epochs=1).fit()
        assert wandb.run is started
        started.log({"mine": 1})
    finally:
        started.finish()
    (read,) = runs_in(tmp_path)
    assert read.summary["mine"] == 1
    assert read.summary["tasks_finished"] == 3


def test_a_run_that_cannot_be_started_is_reported_in_one_line_before_training(tmp_path, monkeypatch):
    def refuse(**_):
        raise wandb.errors.AuthenticationError("no key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"WandbLogger: .*no key.*WANDB_MODE=offline"):
        made(tmp_path).fit()


def files_with_the_key(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"results.json", "config.yaml", "last.ckpt"} <= {path.name for path in files}
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def test_no_key_is_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--run_dir=run", "--trainer.logger=WandbLogger", "--trainer.max_epochs=1"]
    assert main([*arguments, "--loop.stop_after_task=0", "--trainer.enable_progress_bar=false"]) == 0
    (read,) = runs_in(tmp_path / "run")
    assert files_with_the_key(tmp_path) == []
    assert read.config["seed"] == 0
    assert read.config["trainer"]["logger"]["class_path"].endswith("WandbLogger")


def test_a_key_in_the_configuration_stays_there(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, project="tests")
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=logger, enable_checkpointing=False)
    config = f"trainer: {{logger: {{init_args: {{settings: {{api_key: {SECRET}}}, tags: [{SECRET}]}}}}}}"
    TaskLoop(trainer, strategy(), Digits(), run_dir=tmp_path, config=config).fit()
    (read,) = runs_in(tmp_path)
    assert files_with_the_key(tmp_path) == []
    assert read.config["trainer"]["logger"]["init_args"]["tags"] == ["(removed)"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_gives_commands_that_run_and_report_its_metric(path, tmp_path, monkeypatch, capsys):
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load(path.read_text())
    assert {"method", "metric", "parameters", "command"} <= sweep.keys()

    def command(choose):
        chosen = {name: {"value": choose(spec)} for name, spec in sweep["parameters"].items()}
        flags = utils.create_sweep_command_args({"args": chosen})
        parts = utils.create_sweep_command(sweep["command"])
        whole = []
        for part in parts:  # as the agent does it
            whole += flags.get(part.strip("${}"), [part])
        return whole

    lowest, highest = (
        command(lambda spec, place=place: spec["values"][place] if "values" in spec else spec[("min", "max")[place]])
        for place in (0, -1)
    )
    assert lowest[:5] == ["${env}", "${interpreter}", "-m", "cl_lightning", "fit"]
    monkeypatch.chdir(path.parents[2])
    for arguments in (lowest, highest):
        with contextlib.suppress(SystemExit):
            assert main([*arguments[4:], "--print_config"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["model"]["init_args"]["optimizer"]["init_args"]["lr"] in (0.003, 0.3)
    limits = ["--trainer.enable_progress_bar=false", f"--run_dir={tmp_path}"]
    assert main([*lowest[4:], *limits]) == 0
    (read,) = runs_in(tmp_path)
    assert sweep["metric"]["name"] in read.summary
