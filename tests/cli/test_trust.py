"""A configuration in a checkpoint: it is built without consent only if it names nothing that could run other code."""

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from support import ROOT

from cl_lightning import checksums
from cl_lightning.cli import discovery, main, trust
from cl_lightning.cli.commands import ContinualCLI
from cl_lightning.cli.processes import process_arguments
from cl_lightning.models import Backbone
from cl_lightning.stream import Scenario

METHODS = sorted((ROOT / "experiments" / "methods").rglob("*.yaml"))
FOREIGN = (
    "os.system",
    "posix.system",
    "builtins.eval",
    "subprocess.Popen",
    "attack.Evil",
    "attack.run",
    "torch.hub.load",
    "torch._os.system",
    "torch.serialization.os.system",
    "torch.load",
    "torch.nn.Module.load_state_dict",
    "torch.utils.cpp_extension.load",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.SubprocessHandler",
    "torchvision.models.get_model",
    "timm.create_model",
    "lightning.pytorch.cli.LightningCLI",
    "cl_lightning.cli.main.main",
    "cl_lightning.cli.main.os.system",
    "cl_lightning.cli.main.sys.modules",
    "cl_lightning.testing.checks.check",
    "cl_lightning.__main__.main",
    "cl_lightning.stream.Stream.from_dict",
)
"""Import paths that no option may take from a checkpoint."""


class FoundError(Exception):
    """Carries the parsers out of the constructor of the command line."""


@pytest.fixture(scope="module")
def types() -> dict[str, Any]:
    """Types of the options of ``fit``."""
    for find in (discovery.strategies, discovery.callbacks, discovery.datamodules):
        find()

    def stop(self: Any, *_: Any) -> None:
        raise FoundError(self._subcommand_parsers["fit"])

    with pytest.MonkeyPatch.context() as patch, process_arguments(["fit"]):
        patch.setattr(LightningCLI, "parse_arguments", stop)
        with pytest.raises(FoundError) as found:
            ContinualCLI()
    return trust.option_types(found.value.args[0])


def takes_a_name(hint: Any) -> bool:
    return bool(re.search(r"Callable|(?<![\w.])(cl_lightning|lightning|torch)\.|\btype\[", str(hint)))


def classes() -> Iterator[tuple[str, type]]:
    """Every class that a configuration commonly names, with the option that takes it."""
    for member in discovery.strategies():
        yield "model", member
    for member in discovery.datamodules():
        yield "data", member
    for member in discovery.callbacks():
        yield "trainer.callbacks", member
    for base, place in ((Scenario, "data.scenario"), (Backbone, "model.backbone")):
        stack = [base]
        while stack:
            stack += (inner := stack.pop()).__subclasses__()
            if inner is not base and inner.__module__.startswith("cl_lightning.") and inner.__name__[0] != "_":
                yield place, inner


def nested(place: str, value: Any) -> dict[str, Any]:
    """The configuration with a value at an option, inside the arguments of the quickstart's classes."""
    outer, _, inner = place.partition(".")
    if outer == "trainer":
        return {"trainer": {inner: value}}
    if not inner:
        return {outer: value}
    owner = {"model": "cl_lightning.strategies.rehearsal.er.ER", "data": "cl_lightning.datamodules.digits.Digits"}[
        outer
    ]
    return {outer: {"class_path": owner, "init_args": {inner: value}}}


def forms(path: str) -> Iterator[Any]:
    """Ways to write a class or function."""
    yield {"class_path": path, "init_args": {"command": "x"}}
    yield {"class_path": path, "dict_kwargs": {"command": "x"}}
    yield [{"class_path": path}]
    yield f"{{class_path: {path}}}"
    yield f"class_path: {path}\ninit_args: {{command: x}}"
    yield path


def test_no_option_takes_foreign_classes_and_functions(types: dict[str, Any]) -> None:
    places = [name for name, hint in types.items() if takes_a_name(hint)]
    assert {"trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.strategy", "trainer.profiler"} <= {
        *places
    }
    assert {"model", "data", "trainer.accelerator"} <= {*places}
    for place in places:
        for path in FOREIGN:
            for value in forms(path):
                assert trust.problem(nested(place, value), types) is not None, (place, value)


def test_no_argument_of_a_class_takes_foreign_classes_and_functions(types: dict[str, Any]) -> None:
    tried = set()
    for place, member in classes():
        for argument, hint in trust.types_of(member).items():
            if not takes_a_name(hint) or "." in argument:
                continue
            tried.add((member.__name__, argument))
            for path in FOREIGN:
                for value in forms(path):
                    spec = {"class_path": f"{member.__module__}.{member.__qualname__}", "init_args": {argument: value}}
                    content = nested(place, [spec] if place == "trainer.callbacks" else spec)
                    assert trust.problem(content, types) is not None, content
    assert {
        ("ER", "optimizer"),
        ("ER", "scheduler"),
        ("ER", "head"),
        ("ER", "backbone"),
        ("Digits", "scenario"),
    } <= tried
    assert len(tried) > 100


@pytest.mark.parametrize(
    "content",
    [
        {"trainer": "https://example.org/x.yaml"},
        {"model": "https://example.org/x.yaml"},
        {"model": "./other.yaml"},
        {"model": {"class_path": "file_here"}},
        nested("model.backbone", "file_here"),
        {"trainer.callbacks": {"class_path": "os.system"}},
        {"trainer": {"callbacks+": "os.system"}},
        nested("model.optimizer.class_path", "os.system"),
        nested("model.optimizer", {"init_args": {"command": "x"}}),
        nested("model.unknown", [{"a": {"class_path": "os.system"}}]),
        {"unknown": {"deep": [{"class_path": "os.system"}]}},
        {"seed_everything": "${oc.env:HOME}"},
        {"loop": {"compile": "x ${oc.decode:'1'}"}},
        nested("data.root", "${oc.env:WANDB_API_KEY}"),
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback",
                                    "init_args": {"on_fit_start": "os.system"}}]}},
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback",
                                    "init_args": {"on_fit_start": "torch.hub.load"}}]}},
        {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger",
                                "init_args": {"save_dir": {"class_path": "os.system"}}}}},
        nested("model.optimizer", {"class_path": "torch.optim.SGD", "dict_kwargs": {"x": {"class_path": "os.system"}}}),
        {"data": {"class_path": "Digits", "init_args": {"scenario": "os.system"}}},
        nested("model.optimizer", {"class_path": "Nothing"}),
        nested("model.optimizer", "torch.nn.Linear"),
        nested("model.scheduler", "torch.optim.SGD"),
        nested("model.head", "cl_lightning.models.MLP.forward"),
        nested("model.scheduler", {"class_path": "torch.optim.lr_scheduler.LambdaLR",
                                   "init_args": {"lr_lambda": {"class_path": "cl_lightning.checksums.seal",
                                                               "init_args": {"path": "x"}}}}),
        nested("model.optimizer", {"class_path": "cl_lightning.checksums.seal", "init_args": {"path": "x"}}),
    ],
)  # fmt: skip
def test_other_ways_to_a_class_a_file_or_a_variable_are_refused(
    types: dict[str, Any], content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file_here").write_text("class_path: os.system")
    assert trust.problem(content, types) is not None


def test_functions_of_the_package_and_classes_of_known_packages_are_allowed(types: dict[str, Any]) -> None:
    function = "cl_lightning.strategies.base.optimizers.fuse"
    schedule = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": function}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "a.b"}}
    for content in (
        nested("model.scheduler", schedule),
        nested("model.optimizer", {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}}),
        nested("model.optimizer", "torch.optim.SGD"),
        nested("model.optimizer", "SGD"),
        {"trainer": {"strategy": "ddp", "accelerator": "cpu", "profiler": "simple", "precision": "16-mixed"}},
        {"trainer": {"plugins": ["lightning.pytorch.plugins.io.AsyncCheckpointIO"]}},
        {"trainer": {"logger": logger}},
        {"trainer": {"callbacks": {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                                   "init_args": {"filename": "{epoch}-{loss:.2f}"}}}},
        {"trainer": {"callbacks": [{"class_path": "cl_lightning.callbacks.ema_ensemble.EMAEnsemble"}]}},
    ):  # fmt: skip
        assert trust.problem(content, types) is None, content


def test_what_the_user_names_for_an_option_is_allowed_there_alone(
    types: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "named_net.py").write_text("class Net:\n    def __init__(self, head: type = int): ...\n")
    content = nested("model.backbone", {"class_path": "named_net.Net"})
    assert trust.problem(content, types) is not None
    assert trust.problem(content, types, ["--model.head", "named_net.Net"]) is not None
    for given in (["--model.backbone", "named_net.Net"], ["--model.init_args.backbone.class_path=named_net.Net"]):
        assert trust.problem(content, types, given) is None
    content["model"]["init_args"]["backbone"]["init_args"] = {"head": "os.system"}
    assert trust.problem(content, types, ["--model.backbone", "named_net.Net"]) is not None


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_configurations_of_the_project_need_no_consent(types: dict[str, Any], path: Path) -> None:
    text = re.sub(r"\$\{.*?\}", "x", path.read_text(encoding="utf-8"))  # references are replaced before they are saved
    content = {"data": {}, **yaml.safe_load(text)}
    content["data"] = {"class_path": "Digits", **content["data"]}  # the default of the command line
    assert trust.problem(content, types) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("saved")
    options = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --loop.stop_after_task 1"
    assert main(["fit", *options.split(), "--run_dir", str(folder)]) == 0
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
@pytest.mark.parametrize("place", ["model.optimizer", "model.backbone", "trainer.callbacks", "data.scenario"])
def test_no_command_builds_what_a_checkpoint_of_others_names(
    saved: dict[str, Any], command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "attack", raising=False)
    Path("attack.py").write_text("open('proof', 'w').close()\ndef run(command): open('proof', 'w').close()\n")
    content = copy.deepcopy(saved)
    config = yaml.safe_load(content["cl_lightning"]["config"])
    outer, _, inner = place.partition(".")
    arguments = config[outer] if outer == "trainer" else config[outer]["init_args"]
    for path in ("os.system", "attack.run"):
        arguments[inner] = {"class_path": path, "init_args": {"command": "touch proof"}}
        content["cl_lightning"]["config"] = yaml.safe_dump({**config, "output": "elsewhere.csv"})
        torch.save(content, "bad.ckpt")
        checksums.seal(Path("bad.ckpt"))
        assert main([command, "--ckpt_path", "bad.ckpt", "--images", "attack.py", "--run_dir", "r"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for part in ("checkpoint bad.ckpt", trust.FLAG, "--config", place, repr(path)):
            assert part in said
        assert sorted(path.name for path in Path().iterdir()) == ["attack.py", "bad.ckpt"]
    if (command, place) == ("fit", "model.optimizer"):
        main([command, "--ckpt_path", "bad.ckpt", "--run_dir", "r", trust.FLAG])
        assert Path("proof").exists()


def test_the_parser_itself_imports_nothing_else(types: dict[str, Any]) -> None:
    from jsonargparse import ArgumentParser
    from jsonargparse._common import parsing_settings

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=types["model"])
    before = copy.deepcopy(parsing_settings)
    with trust.only_allowed_imports([]):
        for path in ("os.system", "this.s", "torch.hub.load", "torch.serialization.os.system"):
            with pytest.raises(Exception, match="not allowed"):
                parser.parse_args(["--optimizer", path])
    assert parsing_settings == before
    assert "this" not in sys.modules


def test_a_run_with_a_class_of_the_user_is_resumed_with_consent_or_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_method.py").write_text(
        "from cl_lightning.strategies.baselines.finetune import Finetune\n\nclass Mine(Finetune):\n    pass\n"
    )
    options = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --run_dir r"
    assert main(["fit", "--model", "own_method.Mine", *options.split(), "--loop.stop_after_task", "1"]) == 0
    capsys.readouterr()
    assert main(["test", "--ckpt_path", "r/checkpoints/last.ckpt"]) == 2
    assert "model names 'own_method.Mine'" in capsys.readouterr().err
    for model, option in (("own_method.Mine", f" {trust.FLAG}"), ("Finetune", "")):
        with process_arguments(["fit", "--model", model, "--data", "Digits", "--run_dir", "other"]):
            assert ContinualCLI().trust_option() == option  # in the command that resumes the run
    assert main(["test", "--ckpt_path", "r/checkpoints/last.ckpt", "--model", "own_method.Mine"]) == 0
    assert main(["test", "--ckpt_path", "r/checkpoints/last.ckpt", trust.FLAG]) == 0
    assert main(["test", "--ckpt_path", "r/checkpoints/last.ckpt", "--config", "r/config.yaml"]) == 0
