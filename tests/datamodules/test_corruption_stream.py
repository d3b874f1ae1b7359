import json
import shutil
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from support.adaptation import adapt, stream, watching
from support.corrupted import TEST, begun, labels, raw
from torch import Tensor

from cl_lightning.cli import main
from cl_lightning.data import CORRUPTIONS, corrupt
from cl_lightning.data.corruptions import write_files
from cl_lightning.datamodules.corruptions import CorruptionStream
from cl_lightning.datamodules.digits import Digits
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.datamodules.orders import arranged
from cl_lightning.models import ResNet20
from cl_lightning.models.backbones import read_classifier
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.source import Source


def test_the_first_task_is_clean_and_shuffled_and_each_other_a_corruption_in_the_order_of_the_test_set():
    data = begun(1, corruptions=["fog", "contrast"])
    assert [task.name for task in data.stream.tasks] == ["source", "fog", "contrast"]
    assert [task.num_new for task in data.stream.tasks] == [10, 0, 0]
    assert torch.equal(raw(data), corrupt(TEST.images, "fog", 5)[:200])
    assert labels(data) == TEST.labels[:200].tolist()
    clean = begun(0, corruptions=["fog"])
    assert len(raw(clean)) == len(Digits().source(train=True).images)
    assert labels(clean) != sorted(labels(clean))
    ours = begun(0, corruptions=["fog"], source_part="test", samples=50)
    assert len(raw(ours)) == len(TEST.images)
    assert [len(part) for part in ours.stream.test] == [50, 0]


def test_a_gradual_stream_goes_up_and_down():
    data = begun(1, setting="gradual", severity=3, samples=20, corruptions=["contrast", "fog"])
    parts = [corrupt(TEST.images, "contrast", severity)[:20] for severity in (1, 2, 3, 2, 1)]
    assert torch.equal(raw(data), torch.cat(parts))
    assert len(data.stream.train[2]) == 100
    everything = begun(1, setting="gradual", severity=3, samples=20, corruptions=["contrast"], evaluated="all")
    assert [len(part) for part in everything.stream.test] == [20, 20]  # each image once, at the severity


def test_a_mixed_stream_has_all_corruptions_in_one_domain():
    data = begun(1, setting="mixed", samples=30, corruptions=["contrast", "fog"])
    assert [task.name for task in data.stream.tasks] == ["source", "mixed"]
    found = raw(data)
    both = torch.cat([corrupt(TEST.images, name, 5)[:30] for name in ("contrast", "fog")])
    rows = sorted(map(bytes, found.flatten(1).numpy()))
    assert rows == sorted(map(bytes, both.flatten(1).numpy()))
    first = {bytes(row) for row in both[:30].flatten(1).numpy()}
    kinds = [bytes(row) in first for row in found.flatten(1).numpy()]
    assert 20 < sum(a != b for a, b in pairwise(kinds)) < 45  # they alternate


def test_orders_of_a_domain():
    values = np.random.default_rng(1).integers(0, 6, 600)
    draws = {
        (order, delta): arranged(values, order, np.random.default_rng(0), delta=delta)
        for order, delta in (
            ("given", 1.0),
            ("shuffled", 1.0),
            ("sorted", 1.0),
            ("dirichlet", 0.01),
            ("dirichlet", 100.0),
        )
    }
    for found in draws.values():
        assert sorted(found.tolist()) == list(range(600))
    changes = {key: int((np.diff(values[found]) != 0).sum()) for key, found in draws.items()}
    assert changes["sorted", 1.0] == 5
    assert changes["dirichlet", 0.01] < 450 < changes["dirichlet", 100.0]
    assert labels(begun(1, order="sorted")) == sorted(TEST.labels[:200].tolist())
    assert labels(begun(1, order="shuffled")) == labels(begun(1, order="shuffled"))


def test_files_are_read_in_place_of_making_corruptions(tmp_path):
    write_files(tmp_path, TEST.images, TEST.labels, ["fog"], seed=77)
    data = begun(1, folder=str(tmp_path), corruptions=["fog", "contrast"], severity=4)
    assert torch.equal(raw(data), corrupt(TEST.images, "fog", 4, seed=77)[:200])
    data.begin(data.stream.tasks[2])
    assert torch.equal(raw(data), corrupt(TEST.images, "contrast", 4)[:200])  # has no file
    assert begun(1, folder=str(tmp_path), corruptions=["fog"]).fingerprint(1) != begun(
        1, corruptions=["fog"]
    ).fingerprint(1)
    np.save(tmp_path / "fog.npy", np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"fog.npy is uint8 \(4, 8, 8, 1\); it must be uint8 \(1775, 8, 8, 1\)"):
        raw(begun(1, folder=str(tmp_path), corruptions=["fog"]))
    np.save(tmp_path / "labels.npy", np.zeros(1775, np.int64))
    with pytest.raises(ValueError, match="does not have the labels of the test images"):
        begun(1, folder=str(tmp_path))
    (tmp_path / "labels.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not a readable \.npy file"):
        begun(1, folder=str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        begun(1, folder=str(tmp_path / "nowhere"))


def test_fingerprints_need_no_corruption_and_follow_what_is_done(monkeypatch):
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("corrupted too early")

    monkeypatch.setattr("cl_lightning.datamodules.corruptions.corrupt", never)
    one, other = begun(1), begun(1, severity=4)
    assert one.fingerprint(0) != one.fingerprint(1) != one.fingerprint(2)
    assert one.fingerprint(1) != other.fingerprint(1)
    assert one.fingerprint(1) == begun(1).fingerprint(1) != begun(1, seed=1).fingerprint(1)


def test_images_that_do_not_fit_into_memory_are_made_again(monkeypatch):
    data = begun(1, setting="gradual", samples=20, corruptions=["contrast"])
    expected = raw(data)
    monkeypatch.setattr("cl_lightning.datamodules.corruptions._MOST_BYTES", 1)
    again = begun(1, setting="gradual", samples=20, corruptions=["contrast"])
    assert torch.equal(raw(again), expected)
    assert len(again.samples(train=True)._blocks) == 1  # type: ignore[attr-defined]


def test_mean_and_std_are_taken_from_the_base_unless_given():
    assert stream().statistics() == Digits().statistics()
    assert stream(mean=[0.5], std=[0.5]).statistics() == ([0.5], [0.5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"setting": "odd"}, "setting is 'odd'"),
        ({"order": "odd"}, "order is 'odd'"),
        ({"corruptions": ["rain"]}, "corruption 'rain' is unknown"),
        ({"corruptions": ["fog", "fog"]}, "each once"),
        ({"severity": 6}, "severity is 6"),
        ({"samples": 0}, "samples is 0"),
        ({"delta": 0.0}, r"delta is 0\.0"),
        ({"val_fraction": 0.1}, r"val_fraction is 0\.1"),
        ({"source_part": "val"}, "source_part is 'val'"),
        ({"evaluated": "no"}, "evaluated is 'no'"),
    ],
)
def test_mistakes_are_reported(options, words):
    with pytest.raises(ValueError, match=f"CorruptionStream: .*{words}"):
        stream(**options)


def test_a_gradual_stream_is_adapted_to():
    options = {"setting": "gradual", "samples": 100, "batch_size": 50}
    errors = [adapt(watching(cls), stream(**options)).matrix.online_error[1:].mean() for cls in (Source, BNAdapt)]
    assert errors[1] < errors[0]


def test_the_command_line_shows_online_errors(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    command = "fit --config digits_c --config tent --run_dir run"
    short = "--trainer.max_epochs 1 --trainer.enable_progress_bar false --trainer.accelerator cpu --data.samples 71"
    assert main([*command.split(), *short.split()]) == 0
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    errors = content["matrix"]["online_error"]
    assert errors[0] is None
    assert content["measures"]["mean_online_error"] == pytest.approx(sum(errors[1:]) / 4)
    said = capsys.readouterr().out
    assert "online: error of predictions made before each step; mean over domains" in said
    assert "online error" in (tmp_path / "run" / "report.html").read_text()


def test_the_network_for_cifar10_loses_to_corruptions_what_it_should(shared_data, tmp_path):
    """On real images: about 7 % wrong on clean ones; noise is far worse, brightness hardly."""
    weights = shared_data / "models" / "cifar10_resnet20.pt"
    packed = shared_data / "cifar10_test_packed.npz"
    if not weights.is_file() or not packed.is_file():
        pytest.skip("needs cifar10_resnet20.pt and cifar10_test_packed.npz")
    with np.load(packed) as file:
        columns, first, second = int(file["tile_cols"]), *file["offs_test"][:2]
        sheet = np.asarray(Image.open(BytesIO(file["blob_test"].tobytes()[first:second])).convert("RGB"))
        truth = torch.from_numpy(file["y_test"].astype(np.int64))
    tiles = sheet.reshape(sheet.shape[0] // 32, 32, columns, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    images = torch.from_numpy(tiles[:300].copy()).permute(0, 3, 1, 2).contiguous()
    net = ResNet20((3, 32, 32), weights=str(weights)).eval()
    rows, bias = read_classifier(str(weights), net.num_features)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def error(raw: Tensor) -> float:
        found = net((raw.float() / 255 - mean) / std) @ rows.T + bias
        return float((found.argmax(1) != truth[: len(raw)]).double().mean())

    clean = error(images)
    errors = {name: error(corrupt(images, name, 5)) for name in CORRUPTIONS}
    assert clean < 0.13
    assert errors["brightness"] < 0.25
    assert min(errors[name] for name in ("gaussian_noise", "shot_noise", "impulse_noise")) > 0.45
    assert all(value > clean for value in errors.values())


def test_a_file_of_test_images_alone_serves_a_stream(tmp_path):
    source = Digits().source(train=False)
    images, labels = source.images[:40].numpy(), source.labels[:40]
    for keys in (("x_test", "y_test"), ("test_images", "test_labels")):
        path = tmp_path / f"{keys[0]}.npz"
        np.savez(path, **dict(zip(keys, (images, labels), strict=True)))
        base = NpzData(str(path), mean=[0.3], std=[0.4])
        data = CorruptionStream(base, source_part="test", corruptions=["contrast"], batch_size=10)
        assert sorted(set(data.samples(train=True).labels.tolist())) == sorted(set(labels.tolist()))
        assert data.samples(train=True).domain_names == ("source", "contrast")
        with pytest.raises(ValueError, match=r"x_train is missing|train_images is missing"):
            CorruptionStream(base, corruptions=["contrast"]).samples(train=True)
