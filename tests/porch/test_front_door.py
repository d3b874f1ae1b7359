"""The Python front door: names, runs, models that predict, and what a first mistake says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

import cl_lightning as cl
from cl_lightning import catalogue
from cl_lightning.cli import discovery


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    data = cl.Digits(scenario=cl.ClassIncremental(tasks=2), batch_size=64)
    return cl.fit(cl.ER(memory_size=50), data, epochs=1, seed=3, run_dir=folder, enable_progress_bar=False)


def loaded(run):
    return cl.load(run.folder, strategy=cl.ER(memory_size=50), data=cl.Digits(scenario=cl.ClassIncremental(tasks=2)))


def test_the_package_imports_nothing_until_a_name_is_used():
    code = (
        "import cl_lightning, sys; assert 'torch' not in sys.modules; from cl_lightning import ER; print(ER.__name__)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ER\n"


def test_all_classes_have_their_names_in_the_package():
    for member in (*discovery.strategies(), *discovery.callbacks(), *discovery.datamodules()):
        assert getattr(cl, member.__name__) is member
        assert member.__name__ in dir(cl)
    assert cl.ResNet32.__name__ == "ResNet32"
    with pytest.raises(AttributeError, match="no attribute 'Finetun'; did you mean 'Finetune'"):
        _ = cl.Finetun
    with pytest.raises(AttributeError, match=r"no attribute 'qqqq'$"):
        _ = cl.qqqq
    assert len(catalogue.names()) == len(set(catalogue.names()))


def test_configs_keep_the_full_paths_of_classes():
    from jsonargparse._util import get_import_path

    assert get_import_path(cl.LwF) == "cl_lightning.strategies.exemplar_free.lwf.LwF"
    assert get_import_path(cl.ClassIncremental) == "cl_lightning.stream.ClassIncremental"


def test_a_run_has_its_matrix_measures_and_results(run):
    assert run.matrix.learned == 2
    assert run.measures["average_accuracy"] == run.matrix.measures()["average_accuracy"]
    assert run.results["seed"] == 3
    assert f"{run!r}".startswith("Run(ER, 2 tasks, last accuracy ")
    lines = f"{run.matrix!r}".splitlines()
    assert lines[0].startswith("AccuracyMatrix, among all classes seen so far, in %")
    assert lines[2].split() == ["0", f"{100 * float(run.matrix.R_ci[0, 0]):.1f}"]
    assert len(lines) == 4
    assert run.report().is_file()
    assert run.report(run.folder / "other.html").name == "other.html"


def test_the_matrix_is_drawn_with_its_values(run, tmp_path):
    figure = run.matrix.plot(title="ER")
    shown = [text.get_text() for text in figure.axes[0].texts]
    values = [run.matrix.R_ci[0, 0], run.matrix.R_ci[1, 0], run.matrix.R_ci[1, 1]]
    assert shown == [f"{100 * float(value):.1f}" for value in values]
    assert figure.axes[0].get_title() == "ER"
    figure.savefig(tmp_path / "matrix.png")


def test_a_matrix_without_tasks_says_so():
    from cl_lightning.measures import AccuracyMatrix

    assert f"{AccuracyMatrix()!r}" == "AccuracyMatrix: no task is finished"
    with pytest.raises(ValueError, match="no task is finished"):
        AccuracyMatrix().plot()


def test_a_loaded_model_predicts_what_the_run_evaluated(run):
    model = loaded(run)
    data = cl.Digits(scenario=cl.ClassIncremental(tasks=2))
    data.make_stream(3)
    source = data.samples(train=False)
    names = model.predict(source.images)
    hits = np.array([int(name) for name in names]) == source.labels
    totals = run.matrix.totals.double()
    assert hits.mean() == pytest.approx(float((run.matrix.R_ci[1] * totals).sum() / totals.sum()), abs=1e-6)
    assert model.class_names == tuple("0123456789")
    assert model.probabilities(source.images[:3]).sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert len(model.predict(source.images[:0])) == 0
    assert f"{model!r}" == "Model(ER, 10 classes, images (1, 8, 8))"


def test_images_come_as_files_arrays_and_lists_of_any_size(run, tmp_path):
    model = loaded(run)
    images = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8).numpy()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    assert len(model.predict(images)) == 3
    assert model.predict(list(images)) == model.predict(images)
    assert len(model.predict(tmp_path)) == 3
    assert model.predict([tmp_path / "1.png"]) == model.predict(tmp_path / "1.png")
    with pytest.raises(ValueError, match="3 channels, the model takes 1"):
        model.predict(np.zeros((2, 16, 16, 3), np.uint8))


def test_a_run_of_the_command_line_is_loaded_by_its_folder(tmp_path, monkeypatch):
    from cl_lightning.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--model", "Finetune", "--tasks", "2", "--epochs", "1", "--run_dir", "run"]) == 0
    model = cl.load("run")
    assert len(model.predict(np.zeros((2, 8, 8), np.uint8))) == 2
    assert cl.load("run/checkpoints/last.ckpt").class_names == model.class_names


def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(**options):
        data = cl.Digits(scenario=cl.ClassIncremental(tasks=2), batch_size=64)
        return cl.fit(cl.Finetune(), data, epochs=1, enable_progress_bar=False, **options)

    whole = go()
    assert str(whole.folder) == "runs/Finetune/0000"
    part = go(options=cl.LoopOptions(stop_after_task=0))
    assert str(part.folder) == "runs/Finetune/0001"
    assert part.matrix.learned == 1
    rest = go(ckpt_path=part.folder / "checkpoints" / "last.ckpt")
    assert rest.folder.name == "0001"
    assert torch.equal(rest.matrix.R_ci.nan_to_num(-1), whole.matrix.R_ci.nan_to_num(-1))


def test_what_is_missing_is_said(run, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        cl.load(tmp_path)
    with pytest.raises(ValueError, match="was made in Python"):
        cl.load(run.folder)


@pytest.mark.parametrize(("call", "error"), [("fit", ValueError), ("test", AttributeError)])
def test_the_call_that_lightning_users_type_first_says_what_to_do(call, error):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    with pytest.raises(error, match=r"cl_lightning\.fit\(strategy, data\)"):
        getattr(trainer, call)(cl.ER(), datamodule=cl.Digits())
