"""Checkpoints with a valid checksum whose parts are not what they should be: one line that names the file."""

import contextlib
import copy
import re

import pytest
import torch
from support.runs import StopAt, loop, plain_net, sgd

from cl_lightning.checksums import seal
from cl_lightning.cli import main
from cl_lightning.strategies.rehearsal.er import ER

MISSING = object()
NUMBERS = (None, "x", -1, 2**70, 1.5, [], True)
FORMS = {
    **{f"schema {value!r}": ("cl_lightning.schema", value) for value in (None, "x", [], -1)},
    **{f"manifest {str(value)[:9]!r}": ("cl_lightning.manifest", value) for value in (None, "[" * 10**5, "{}", "", 5)},
    **{f"fingerprints {v!r}": ("cl_lightning.fingerprints", v) for v in (None, "x", [1], {})},
    **{f"class_names {v!r}": ("cl_lightning.class_names", v) for v in (None, 3, [1])},
    **{f"matrix {v!r}": ("cl_lightning.matrix", v) for v in (None, {}, {"totals": 3}, {"R_ci": torch.zeros(2)}, [])},
    "matrix of another size": ("cl_lightning.matrix.R_ti", torch.zeros(5, 1, dtype=torch.float64)),
    "matrix of integers": ("cl_lightning.matrix.R_ti", torch.zeros(1, 1, dtype=torch.int64)),
    **{f"place {v!r}": ("cl_lightning.place", v) for v in (None, {}, {"task": 99}, {"nowhere": 1}, [0])},
    **{f"task {v!r}": ("cl_lightning.place.task", v) for v in (*NUMBERS, 99)},
    **{f"running {v!r}": ("cl_lightning.place.running", v) for v in (None, 1, "yes")},
    **{f"origin {v!r}": ("cl_lightning.place.origin", v) for v in NUMBERS},
    **{f"costs {v!r}": ("cl_lightning.costs", v) for v in (None, {}, [1], [{"epochs": 1}], [{"training": "x"}])},
    **{f"rows {v!r}": ("cl_lightning.rows", v) for v in (-1, "x", [])},
    **{f"image_shape {v!r}": ("cl_lightning.image_shape", v) for v in (None, "x", [-1, 2, 2])},
    **{f"terms {v!r}": ("cl_lightning.terms", v) for v in (3, {}, {"sums": []}, [])},
    **{f"strategy {v!r}": ("cl_lightning.strategy", v) for v in (None, 7, "os.system")},
    **{f"state_dict {v!r}": ("state_dict", v) for v in (None, {}, [], {"x": 1}, {3: torch.zeros(1)})},
    "a weight of another shape": ("state_dict.network.backbone.layers.1.weight", torch.zeros(3, 3)),
    "a weight too many": ("state_dict.network.head.blocks.7.weight", torch.zeros(3, 3)),
    "columns of one dimension": ("state_dict.task_columns", torch.zeros(3, dtype=torch.bool)),
    **{f"loops {v!r}": ("loops", v) for v in (None, {}, [], {"fit_loop": {}}, {"fit_loop": 1})},
    **{f"progress {v!r}": ("loops.fit_loop.epoch_progress", v) for v in (None, {}, [], {"total": 1})},
    **{
        f"completed {v!r}": ("loops.fit_loop.epoch_loop.batch_progress", {"current": {"completed": v}}) for v in NUMBERS
    },
    **{f"callbacks {v!r}": ("callbacks", v) for v in (None, [], {"FiniteLoss": 3}, {"FiniteLoss": {}}, {1: {}})},
    **{f"optimizers {v!r}": ("optimizer_states", v) for v in (None, {}, [1], [{}], [{"state": 1}], [])},
    "optimizer groups": ("optimizer_states", [{"state": {}, "param_groups": [{"params": ["x"]}]}]),
    "optimizer of another network": ("optimizer_states", [{"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]}]),
    **{f"schedulers {v!r}": ("lr_schedulers", v) for v in (None, {}, [1], [{}])},
    **{f"version {v!r}": ("pytorch-lightning_version", v) for v in (None, 2, "x", "")},
    **{f"global_step {v!r}": ("global_step", v) for v in NUMBERS},
    **{
        f"no {key}": (key, MISSING) for key in ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")
    },
    **{
        f"no cl_lightning.{key}": (f"cl_lightning.{key}", MISSING)
        for key in ("place", "strategy", "manifest", "fingerprints", "matrix", "costs", "class_names")
    },
}
HARMLESS = {"no cl_lightning.class_names", "schedulers [{}]"}


def er():
    return ER(backbone=plain_net, optimizer=sgd, memory_size=30)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in the middle of the second task."""
    folder = tmp_path_factory.mktemp("run")
    made = loop(er(), StopAt(1, 4), folder=folder, options={"save_every_n_steps": 2, "save_every_seconds": 0.0})
    with pytest.raises(StopAt.CrashError):
        made.fit()
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def changed(saved, way, value):
    """A copy in which one part is replaced; keys of tensors and of loops contain dots."""
    result = copy.deepcopy(saved)
    target, rest = result, way
    while (key := next((k for k in target if isinstance(k, str) and rest.startswith(f"{k}.")), None)) is not None:
        target, rest = target[key], rest[len(key) + 1 :]
    if value is MISSING:
        del target[rest]
    else:
        target[rest] = value
    return result


@pytest.mark.parametrize("form", FORMS)
def test_a_malformed_part_is_one_line_with_the_file(saved, tmp_path, form):
    path = tmp_path / "x.ckpt"
    torch.save(changed(saved, *FORMS[form]), path)
    seal(path)
    made = loop(er(), folder=tmp_path / "run", options={"stop_after_task": 1})
    with (
        contextlib.nullcontext() if form in HARMLESS else pytest.raises(ValueError, match=re.escape(str(path))) as info
    ):
        made.fit(path)
    if form not in HARMLESS:
        assert "\n" not in str(info.value)
        assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[1]", "its configuration is not a mapping"),
        ("a: [", "correct the YAML: expected the node content"),
        ("a: !!python/object/apply:os.system ['id']", "correct the YAML: could not determine a constructor"),
        ("a: 1\na: 2", "remove one of the two values"),
        (5, "its part cl_lightning.config must be str, got 5"),
        (None, "its part cl_lightning.config must be str, got None"),
    ],
)
def test_a_malformed_configuration_is_one_line_with_the_file(saved, tmp_path, capsys, config, reason):
    path = tmp_path / "x.ckpt"
    torch.save(changed(saved, "cl_lightning.config", config), path)
    seal(path)
    assert main(["test", "--ckpt_path", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert reason in line
