"""The task loop: one Trainer learns a stream, task after task; a run can be stopped and resumed at any step."""

from cl_lightning.loop.checkpoint import CheckpointFiles, WriteError
from cl_lightning.loop.logging import RunLogging
from cl_lightning.loop.nan_guard import NanGuard, NotFiniteError
from cl_lightning.loop.options import LoopOptions
from cl_lightning.loop.run import Position, restore
from cl_lightning.loop.run_files import RunFiles, next_number, reserved_folder
from cl_lightning.loop.stopping import Interrupted, StopRequest, is_lost_peer, requeue, slurm_job
from cl_lightning.loop.task_loop import TaskLoop

__all__ = [
    "CheckpointFiles",
    "Interrupted",
    "LoopOptions",
    "NanGuard",
    "NotFiniteError",
    "Position",
    "RunFiles",
    "RunLogging",
    "StopRequest",
    "TaskLoop",
    "WriteError",
    "is_lost_peer",
    "next_number",
    "requeue",
    "reserved_folder",
    "restore",
    "slurm_job",
]
