"""The network of a trained run, or a model of timm, as the source of test-time adaptation."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.adaptation import adapt, stream, watching
from support.command import command, is_one_line
from support.runs import assert_same_run
from support.runs import loop as digits_loop
from torch import nn

from cl_lightning import checksums
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import CifarResNet, CosineHead, LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.der_expand import DERExpand
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.source_run import RunHead, SourceRun
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.stream import ClassIncremental

ORDER = [3, 9, 4, 0, 5, 1, 2, 6, 8, 7]
small = partial(CifarResNet, depth=8, width=4)


def learnt(strategy: Any, folder: Any, **options: Any) -> str:
    made = digits_loop(
        strategy,
        folder=folder,
        max_epochs=1,
        data={"scenario": ClassIncremental(tasks=2, class_order=ORDER)},
        options=options,
    )
    made.fit()
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    "make",
    [
        partial(Finetune, backbone=small, head=CosineHead),
        partial(Finetune, backbone=small, head=PrototypeHead),
        partial(DERExpand, backbone=small, memory_size=50),  # its backbone has grown by a network
    ],
)
def test_predictions_are_those_of_the_run_whatever_its_head_backbone_and_order_of_classes(make, tmp_path):
    run = make()
    path = learnt(run, tmp_path)
    made = adapt(watching(Source, source=SourceRun(make(), path), backbone=None, source_head=None), stream(samples=60))
    assert (made.strategy.num_source, made.strategy.network.head.num_columns) == (10, 10)
    images = torch.rand(20, 1, 8, 8)
    run.eval(), made.strategy.eval()
    with torch.no_grad():
        theirs = run.network.classify(images)
        ours = made.strategy.network.classify(images)
    assert torch.equal(ours[:, ORDER], theirs)
    assert not any(module is run for module in made.strategy.modules())  # the rest of the run is not kept


def test_adaptation_of_a_run_is_resumed_and_equals_that_of_its_weights(tmp_path):
    path = learnt(Finetune(backbone=small), tmp_path / "run")

    def adapted(folder: Any, source: Any, stop: int | None = None, resume: Any = None, **weights: Any) -> Any:
        loop = digits_loop(
            watching(Tent, source=source, **{"backbone": None, "source_head": None, **weights}),
            folder=folder,
            options={"stop_after_task": stop},
        )
        loop.datamodule = stream()
        loop.fit(resume)
        return loop

    def source() -> SourceRun:
        return SourceRun(Finetune(backbone=small), path)

    whole = adapted(None, source())
    adapted(tmp_path / "half", source(), stop=1)
    resumed = adapted(tmp_path / "half", source(), resume=tmp_path / "half" / "checkpoints" / "last.ckpt")
    assert_same_run(whole, resumed)
    files = adapted(None, None, backbone=partial(small, weights=path), source_head=path)
    torch.testing.assert_close(whole.matrix.online_error, files.matrix.online_error, equal_nan=True)


def test_classes_that_the_run_does_not_know_are_reported_or_score_nothing(tmp_path):
    path = learnt(Finetune(backbone=small), tmp_path, stop_after_task=0)
    with pytest.raises(ValueError, match="the run has not learnt class 1 of the source domain"):
        adapt(watching(Source, source=SourceRun(Finetune(backbone=small), path), backbone=None, source_head=None))
    head = RunHead(LinearHead(3), [7, 5])
    head.inner.grow(2)
    head.grow(2), head.grow(1)
    head.choose([5, 7])
    features = torch.randn(4, 3)
    rows = head.inner(features)
    assert torch.equal(head(features), torch.stack([rows[:, 1], rows[:, 0], torch.zeros(4)], dim=1))
    assert torch.equal(head.weight(), head.inner.weight()[[1, 0]])
    assert head.block_sizes() == [2, 1]
    other = RunHead(LinearHead(3), [7, 5])
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), head(features))


def test_a_source_excludes_other_networks_and_has_to_be_of_a_known_form(tmp_path):
    with pytest.raises(ValueError, match="Tent: backbone is given with source"):
        Tent(source="timm/resnet18", backbone=small)
    with pytest.raises(ValueError, match="Tent: head is given with source"):
        Tent(source="timm/resnet18", head=CosineHead)
    with pytest.raises(ValueError, match="Tent: source_head is given with source"):
        Tent(source="timm/resnet18", source_head="w.pt")
    for wrong in ("resnet18", "timm/", "run.ckpt"):
        with pytest.raises(ValueError, match=f"Tent: source is '{wrong}'; give timm/NAME"):
            Tent(source=wrong)
    file = tmp_path / "w.pt"
    torch.save(small((1, 8, 8)).state_dict(), file)
    with pytest.raises(ValueError, match=r"SourceRun: .*w.pt is not a readable checkpoint of a run"):
        Tent(source=SourceRun(Finetune(), str(file))).build((1, 8, 8))
    path = learnt(Finetune(backbone=small), tmp_path / "run")
    with pytest.raises(ValueError, match="is of another network or other images"):
        Tent(source=SourceRun(Finetune(backbone=partial(small, depth=14)), path)).build((1, 8, 8))


class TimmLike(nn.Module):
    """A model of timm with weights, as far as a source needs it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = small((1, 8, 8))
        self.fc = nn.Linear(16, classes) if classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.net(images))


def test_a_model_of_timm_is_adapted_with_its_classifier(monkeypatch):
    torch.manual_seed(0)
    whole = TimmLike(12).eval()

    def create_model(name: str, pretrained: bool, in_chans: int = 3, num_classes: int = 12, **_: Any) -> nn.Module:
        assert (name, pretrained) == ("resnet_tiny", True)
        made = TimmLike(num_classes)
        made.load_state_dict({key: value for key, value in whole.state_dict().items() if num_classes or "net" in key})
        return made.eval()

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr("cl_lightning.models.backbones._present_name", lambda name, pretrained: name)
    made = adapt(watching(Source, source="timm/resnet_tiny", backbone=None, source_head=None), stream(samples=60))
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(made.strategy.eval().predict(images), whole(images)[:, :10])
    monkeypatch.setattr(TimmLike, "get_classifier", lambda self: nn.Identity())
    with pytest.raises(ValueError, match="source timm/resnet_tiny: the model has no linear classifier"):
        Source(source="timm/resnet_tiny").build((1, 8, 8))


def test_the_command_line_takes_the_path_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = "--trainer.accelerator cpu --trainer.max_epochs 1"
    net = "--model.backbone CifarResNet --model.backbone.depth 8 --model.backbone.width 4"
    said = command(
        capsys, f"fit --model Finetune {net} --data.scenario SingleTask --data.mean [0.25] {quick} --run_dir a"
    )
    assert said.code == 0, said.err
    path = "a/checkpoints/last.ckpt"
    Path("method.yaml").write_text("model: {class_path: Tent, init_args: {backbone: ResNet20, source_head: w.pt}}")
    use = f"fit --config method.yaml --model.source {path} --data CorruptionStream --data.base Digits"
    more = f"--data.corruptions [fog] --data.samples 60 {quick}"
    assert command(capsys, f"{use} {more} --run_dir b").code == 0
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["finished"] == 2
    saved = torch.load(tmp_path / "b" / "checkpoints" / "last.ckpt", weights_only=True)["cl_lightning"]
    assert saved["normalisation"]["mean"] == [0.25]  # of the run; its standard deviation was measured
    first = torch.load(path, weights_only=True)["cl_lightning"]["normalisation"]
    assert saved["normalisation"] == first
    assert command(capsys, f"{use} {more} --data.mean [0.5] --run_dir c").code == 0
    other = torch.load(tmp_path / "c" / "checkpoints" / "last.ckpt", weights_only=True)["cl_lightning"]
    assert other["normalisation"] == {**first, "mean": [0.5]}
    said = command(capsys, "test --ckpt_path b/checkpoints/last.ckpt")
    assert said.code == 0, said.err
    for wrong, words in (("none.ckpt", "there is no such file"), ("a/results.json", "give timm/NAME")):
        said = command(capsys, f"fit --model Tent --model.source {wrong} --data CorruptionStream --data.base Digits")
        assert is_one_line(said), said.err
        assert words in said.err


def test_a_run_made_in_python_has_no_configuration_for_the_command_line(tmp_path, capsys):
    path = learnt(Finetune(backbone=small), tmp_path)
    said = command(capsys, f"fit --model Tent --model.source {path} --data CorruptionStream --data.base Digits")
    assert is_one_line(said)
    assert "adapted in Python, with SourceRun" in said.err


def test_a_run_whose_configuration_could_run_code_needs_consent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("attack_by_source.py").write_text("open('proof', 'w').close()\nfrom cl_lightning.models import MLP\n")
    path = learnt(Finetune(backbone=small), tmp_path)
    content = torch.load(path, weights_only=True)
    model = {"class_path": "Finetune", "init_args": {"backbone": {"class_path": "attack_by_source.MLP"}}}
    content["cl_lightning"]["config"] = json.dumps({"model": model})
    torch.save(content, "bad.ckpt")
    checksums.seal(Path("bad.ckpt"))
    line = "fit --model Tent --model.source bad.ckpt --data CorruptionStream --data.base Digits"
    said = command(capsys, line)
    assert said.code == 2
    assert "checkpoint bad.ckpt: its configuration could run code; give --trust_checkpoint" in said.err
    assert not Path("proof").exists()
    said = command(capsys, f"{line} --trust_checkpoint")
    assert "bad.ckpt is of another network" in said.err
    assert Path("proof").exists()


def test_the_head_of_a_run_embeds_as_it_does():
    head = RunHead(LinearHead(3), [0])
    head.inner.embed = lambda features: 2 * features  # type: ignore[method-assign]
    assert torch.equal(head.embed(torch.ones(1, 3)), torch.full((1, 3), 2.0))
