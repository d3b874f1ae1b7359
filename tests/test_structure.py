"""The rooms of the package: every import goes down, and what breaks a rule is found."""

import itertools
import sys

import pytest
from support import ROOT


@pytest.fixture
def rooms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield __import__("rooms")
    sys.modules.pop("rooms")


def test_every_import_goes_down(rooms):
    assert rooms.problems() == []


def test_each_room_lists_its_files(rooms):
    assert list(rooms.wrong_lists()) == []


def test_a_file_without_a_place_in_the_list_is_found(rooms, tmp_path):
    there = {
        f"cl_lightning/losses/{name}.py": "" for name in ("__init__", "classification", "contrastive", "targets", "new")
    }
    write(tmp_path, there)
    assert list(rooms.wrong_lists(tmp_path)) == [
        "docs/rooms.py: distillation of losses is listed, but is not there",
        "docs/rooms.py: new of losses is not listed",
    ]


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"cl_lightning/losses/a.py": "from cl_lightning.loop.b import x", "cl_lightning/loop/b.py": ""}, "above"),
        ({"cl_lightning/losses/a.py": "def f():\n    import cl_lightning.loop.b"}, "loop is above losses"),
        (
            {"callbacks/a.py": "from cl_lightning.strategies.rehearsal.er import ER"},
            "callbacks must not know strategies",
        ),
        ({"datamodules/a.py": "from cl_lightning.strategies.base import Phase"}, ""),
        ({"cl_lightning/report/a.py": "from cl_lightning.models import MLP"}, "report must not know models"),
        (
            {
                "cl_lightning/data/a.py": "from cl_lightning.memory.replay import Memory",
                "cl_lightning/memory/__init__.py": '__all__ = ["Memory"]',
            },
            "import it from the room, cl_lightning.memory",
        ),
        ({"cl_lightning/attic/a.py": ""}, "'attic' is not a room"),
        (
            {
                "cl_lightning/data/a.py": "from cl_lightning.data.b import x",
                "cl_lightning/data/b.py": "from cl_lightning.data import a",
            },
            "circle of imports: data.a -> data.b -> data.a",
        ),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(rooms, tmp_path, files, said):
    write(tmp_path, files)
    rooms.exported.cache_clear()
    found = rooms.problems(tmp_path)
    assert bool(found) == bool(said), found
    assert said in "\n".join(found)


def test_each_name_that_a_room_exports_is_there_and_the_door_has_what_every_method_needs():
    import importlib

    for name in ("data", "losses", "loop", "measures", "memory", "models", "stream", "testing", "cli", "strategy"):
        room = importlib.import_module(f"cl_lightning.{name}")
        missing = [entry for entry in room.__all__ if not hasattr(room, entry)]
        assert not missing, f"{name}: {missing}"
    from cl_lightning import strategy

    assert {"ContinualStrategy", "Batch", "Output", "Phase", "Task"} <= set(strategy.__all__)


def members(cls: type, base: type, instance: object) -> list[str]:
    """Public names of a class, annotated ones and attributes of an instance included, that its base has not itself."""
    classes = [each for each in cls.__mro__ if each not in base.__mro__]
    names = {name for each in classes for name in [*vars(each), *vars(each).get("__annotations__", {})]}
    plain = vars(base())
    held = (vars(instance), vars(instance).get("_buffers", {}), vars(instance).get("_modules", {}))
    names |= {name for attributes in held for name in attributes if name not in plain}
    return sorted(name for name in names if not name.startswith("_"))


def test_the_base_classes_do_not_grow():
    """A new need of a method is a field of ``Traits``, ``Phase`` or ``Batch``, or a collaborator, never a member."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from cl_lightning.datamodules.base import ContinualDataModule
    from cl_lightning.strategies.test_time.base import TestTimeAdaptation
    from cl_lightning.strategy import ContinualStrategy

    counts = {
        "ContinualStrategy": len(members(ContinualStrategy, LightningModule, ContinualStrategy())),
        "TestTimeAdaptation": len(members(TestTimeAdaptation, LightningModule, TestTimeAdaptation())),
        "ContinualDataModule": len(members(ContinualDataModule, LightningDataModule, ContinualDataModule())),
    }
    assert counts == {"ContinualStrategy": 53, "TestTimeAdaptation": 72, "ContinualDataModule": 52}


def test_a_new_member_is_counted():
    from lightning.pytorch import LightningModule

    from cl_lightning.strategy import ContinualStrategy

    class Grown(ContinualStrategy):
        fact: bool

        def __init__(self) -> None:
            super().__init__()
            self.held = 1

        def hook(self) -> None: ...

    before = members(ContinualStrategy, LightningModule, ContinualStrategy())
    after = members(Grown, LightningModule, Grown())
    assert set(after) - set(before) == {"fact", "held", "hook"}


def test_private_names_of_lightning_stand_in_one_file():
    """Attributes of Lightning's objects that begin with an underscore are touched in ``lightning_private`` alone."""
    import re

    private = (
        r"_accelerator_connector|_signal_connector|_broadcast_sigterm_tensor|_clip_gradients|_start_method|_ddp_kwargs"
        r"|_current_fx_name|_AutomaticOptimization|_wandb_init|\b_experiment\b"
    )
    folders = ("cl_lightning", "callbacks", "datamodules")
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(private, path.read_text(encoding="utf-8"))
    ]
    assert found == ["cl_lightning/lightning_private.py"]


def test_private_names_of_the_parser_stand_in_one_file_and_exist():
    import argparse
    import re

    import jsonargparse

    from cl_lightning import parser_private as private

    names = r"jsonargparse\._|\b_actions\b|_SubParsersAction|_name_parser_map|_typehint\b"
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cl_lightning").rglob("*.py")
        if re.search(names, path.read_text(encoding="utf-8"))
    ]
    assert found == ["cl_lightning/parser_private.py"]
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--number", type=int | None)
    assert [private.type_hint(a) for a in private.actions(parser) if a.dest == "number"] == [int | None]
    inner = argparse.ArgumentParser()
    made = inner.add_subparsers()
    command = made.add_parser("go")
    assert [private.commands(action) for action in private.actions(inner)] == [[], [command]]
    with private.settings_restored():
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        assert private.parsing_settings["omegaconf_absolute_to_relative_paths"]
        private.parsing_settings["unknown"] = 1
    assert "unknown" not in private.parsing_settings


def test_private_names_of_lightning_exist(tmp_path):
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.strategies import DDPStrategy

    from cl_lightning import lightning_private as private

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert hasattr(LightningModule(), private.HOOK_NAME)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    private.ignore_signals(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None
    assert trainer._accelerator_connector.use_distributed_sampler
    private.use_own_sampler(trainer)
    assert not trainer._accelerator_connector.use_distributed_sampler
    strategies = {method: DDPStrategy(start_method=method) for method in ("popen", "spawn")}
    assert [private.is_spawned(strategy) for strategy in strategies.values()] == [False, True]
    private.keep_buffers_local(strategies["popen"])
    assert strategies["popen"]._ddp_kwargs == {"broadcast_buffers": False}
    module, parameter = LightningModule(), torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 10.0)
    trainer.gradient_clip_val, trainer.gradient_clip_algorithm = 1.0, None
    trainer.strategy.connect(module)
    module.trainer = trainer
    private.clip_gradients(trainer, module, torch.optim.SGD([parameter], lr=1.0))
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5))
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p")
    assert not private.has_wandb_run(logger)
    assert private.wandb_options(logger)["project"] == "p"


def test_files_of_tests_have_different_names():
    """Pytest imports them by their names alone, so that ``pytest tests`` fails with two of one name."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, following in itertools.pairwise(names) if name == following] == []


def test_no_file_is_longer_than_500_lines():
    """A longer file holds two topics: it is split."""
    folders = ("cl_lightning", "callbacks", "datamodules", "benchmarks", "docs", "tests")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert [path.name for path in sorted(files) if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []
