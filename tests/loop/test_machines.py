"""Several machines: torchrun on each, with the command line of one."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.forks import free_port
from support.kills import DATA, TRAINER, left

FIT = f"-m cl_lightning fit --model ER --model.backbone MLP {DATA} {TRAINER} --trainer.num_sanity_val_steps 0"


def test_two_machines_learn_what_one_process_learns(tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_"))},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    meeting = f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {free_port()}"
    nodes = "--trainer.num_nodes 2 --trainer.devices 1 --trainer.strategy ddp --run_dir both"
    commands = [
        *(f"-m torch.distributed.run {meeting} --node_rank {rank} {FIT} {nodes}" for rank in range(2)),
        f"{FIT} --run_dir alone",
    ]
    started = []
    for place, command in enumerate(commands):
        line = [sys.executable, *command.split()]
        with (tmp_path / f"{place}.txt").open("w") as log:
            started.append(subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0, 0], [(tmp_path / f"{place}.txt").read_text()[-2000:] for place in range(3)]
    both, alone = (left(tmp_path / name) for name in ("both", "alone"))
    assert both["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(
            both["weights"][name], value, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert both["results"]["measures"] == pytest.approx(alone["results"]["measures"], abs=0.01)
