"""What the commands do: ``fit``, ``test``, ``validate`` and ``predict`` on LightningCLI."""

import json
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cl_lightning import checkpoint as checkpoints
from cl_lightning import discovery, distributed, prediction, report, results
from cl_lightning.callbacks.stream_progress import StreamProgress
from cl_lightning.cli import COMMANDS, PROGRAM, fail, value_of
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.finite import NotFiniteError
from cl_lightning.loop import TaskLoop
from cl_lightning.loop_setup import LoopOptions
from cl_lightning.parsing import Parser, explain, shorten
from cl_lightning.stopping import Interrupted, is_lost_peer, requeue, slurm_job
from cl_lightning.strategy import ContinualStrategy

DEFAULTS = {"model": "ER", "data": "Digits"}
"""Classes where neither an option nor a config names one: the quickstart."""

_RUN_DIR = "CL_LIGHTNING_RUN_DIR"
_FIRST = "CL_LIGHTNING_FIRST_PROCESS"

_NOISE = (
    r".*does not have many workers.*",  # data in memory need none
    r".*smaller than the logging interval.*",
    r".*in eval mode at the start of training.*",  # teachers are
    r".*You defined a `validation_step` but have no `val_dataloader`.*",
    r".*Total length of `list` across ranks is zero.*",  # no validation samples were asked for
    r".*your dataloader is not resumable.*",  # it is told the step at which to go on
    r".*Checkpoint directory .* exists and is not empty.*",  # a task is one of many fits
    r".*`broadcast_buffers` is deprecated.*",  # what replaces it would still send them once per fit
    r".*isinstance\(treespec, LeafSpec\).*",
)


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` goes through a whole stream.

    Constructing it parses the arguments of the process and builds the objects; ``act`` then does what was asked for.
    """

    def __init__(self) -> None:
        self.loop: TaskLoop | None = None
        self.run_dir = Path()
        self.text = ""
        self._reserved = False
        self._action: Callable[[], None] = lambda: None
        with self._cleaning():
            super().__init__(
                ContinualStrategy,
                ContinualDataModule,
                save_config_callback=None,
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=Parser,
                parser_kwargs={
                    "parser_mode": "omegaconf+",
                    "prog": PROGRAM,
                    **{name: _texts(name) for name in ("fit", "validate", "test", "predict")},
                },
                trainer_defaults={
                    "max_epochs": 5,
                    "enable_checkpointing": False,
                    "use_distributed_sampler": False,
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                },
            )

    def act(self) -> None:
        """Do what was asked for."""
        with self._cleaning():
            try:
                self._action()
            except Interrupted:  # on all processes
                distributed.leave()
                raise
        distributed.leave()

    # ------------------------------------------------------------------ parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # A misspelt key would pass as an abbreviation.
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(LoopOptions, "loop")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: configuration, manifest, results, checkpoints, logs. By default that of the "
            "checkpoint, or the next runs/METHOD/NUMBER.",
        )
        parser.add_argument("--images", type=str | None, default=None, help="predict: image file, or folder of images.")
        parser.add_argument("--output", type=str, default="predictions.csv", help="predict: CSV file that is written.")
        parser.add_argument(
            "--skip_unreadable", action="store_true", help="predict: leave out files that are not readable images."
        )

    def configuration(self) -> str:
        """The resolved configuration as YAML, without what belongs to this call alone."""
        config = self.config[self.subcommand].clone()
        for key in ("ckpt_path", "config", "images", "output", "skip_unreadable", "run_dir"):
            config.pop(key, None)
        text: str = self._parser(self.subcommand).dump(config, skip_unset=False, skip_validation=True)
        return text

    # ------------------------------------------------------------------ building

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        check_devices(str(trainer.accelerator), trainer.devices)
        self.text = self.configuration()
        self.run_dir = self._choose_run_dir(config)
        trainer.default_root_dir = str(self.run_dir)
        if self.subcommand != "fit":
            trainer.logger = False
        elif trainer.logger in (None, True):
            place = {"save_dir": str(self.run_dir), "name": "", "version": "", "sub_dir": "tensorboard"}
            trainer.logger = [{"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}]
        elif trainer.logger:
            for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
                if logger.get("init_args", {}).get("save_dir", "") in (None, "."):
                    logger.init_args.save_dir = str(self.run_dir)
        if self.subcommand == "predict":  # one pass, written in order
            trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        callbacks = given.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        hidden = given.get("enable_progress_bar") is False or given.get("barebones")
        if not hidden and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(StreamProgress())
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except TypeError as error:
            raise ValueError(f"trainer: {error}") from error

    def _choose_run_dir(self, config: Any) -> Path:
        """The given folder, that of the checkpoint, or the next free number under ``runs``.

        A number is taken by making the folder, so that runs that start together do not share one.
        """
        ckpt_path = config.get("ckpt_path")
        if config.run_dir is not None:
            return Path(config.run_dir)
        if ckpt_path is not None and (found := folder_of(ckpt_path)) is not None:
            return found
        follows = is_follower()
        if follows and _RUN_DIR in os.environ:  # chosen by the process that started this one
            return Path(os.environ[_RUN_DIR])
        base = Path("runs") / str(config.model.class_path).rpartition(".")[2]
        number = max((int(entry.name) for entry in base.glob("[0-9]*") if entry.name.isdigit()), default=-1) + 1
        while self.subcommand == "fit" and not follows and not self._reserved:
            try:
                (base / f"{number:04d}").mkdir(parents=True)
                self._reserved = True
            except FileExistsError:
                number += 1
        chosen = base / f"{number:04d}"
        os.environ[_RUN_DIR] = str(chosen)
        return chosen

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Leave no folder behind of a run that failed before its first step."""
        try:
            yield
        except BaseException:
            stepped = self.loop is not None and self.loop.started and self.loop.trainer.global_step > 0
            if self._reserved and not stepped and not (self.run_dir / "checkpoints").exists():
                shutil.rmtree(self.run_dir, ignore_errors=True)
                for parent in (self.run_dir.parent, self.run_dir.parents[1]):
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
            raise

    def _make_loop(self) -> TaskLoop:
        self.loop = TaskLoop(
            self.trainer,
            self.model,
            self.datamodule,
            options=self._get(self.config_init, "loop"),
            run_dir=self.run_dir,
            seed=self.config[self.subcommand].seed_everything,
            config=self.text,
        )
        return self.loop

    # ------------------------------------------------------------------ commands
    # LightningCLI calls these, in place of the Trainer's methods of their names, at the end of its constructor.

    def fit(self, ckpt_path: str | None = None, **_: Any) -> None:
        def action() -> None:
            loop = self._make_loop()
            loop.fit(ckpt_path)
            if self.trainer.is_global_zero:
                results.show(loop.results())
                try:
                    print(f"report: {shown(report.write([self.run_dir], self.run_dir / 'report.html'))}")
                except ValueError as error:  # the run is whole without its page
                    print(f"no report: {error}", file=sys.stderr)
                print(f"results, checkpoints and logs are in {shown(self.run_dir)}")

        self._action = action

    def test(self, ckpt_path: str | None = None, **_: Any) -> None:
        def action() -> None:
            loop = self._make_loop()
            matrix = loop.test(needed(ckpt_path, "--ckpt_path"))
            if self.trainer.is_global_zero:
                prediction.show_row(matrix, loop.stream)

        self._action = action

    def validate(self, ckpt_path: str | None = None, **_: Any) -> None:
        def action() -> None:
            values = self._make_loop().validate(needed(ckpt_path, "--ckpt_path"))
            if self.trainer.is_global_zero:
                for name, value in values.items():
                    print(f"{name}: {value:.4f}")

        self._action = action

    def predict(self, ckpt_path: str | None = None, **_: Any) -> None:
        config = self.config[self.subcommand]

        def action() -> None:
            count, skipped = prediction.predict_folder(
                self.trainer,
                self.model,
                self.datamodule,
                checkpoints.load(needed(ckpt_path, "--ckpt_path")),
                Path(needed(config.images, "--images")),
                Path(config.output),
                skip_unreadable=config.skip_unreadable,
            )
            for reason in skipped:
                print(f"skipped {reason}", file=sys.stderr)
            print(f"{count} images: {config.output}")

        self._action = action


def _texts(command: str) -> dict[str, str]:
    """What the help of a command says first."""
    return {"usage": f"{PROGRAM} {command} [options]", "description": f"{command}: {COMMANDS[command]}."}


def run(arguments: list[str]) -> int:
    """Run ``fit``, ``test``, ``validate`` or ``predict``; returns the exit code.

    Args:
        arguments: The command and its options; a checkpoint is given by its path.
    """
    quiet()
    # ${data.init_args.batch_size} in a config is looked up from the root of the config, whatever the command.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    for find in (discovery.strategies, discovery.callbacks, discovery.datamodules):
        find()  # short names are found among the classes that were imported
    cli: ContinualCLI | None = None
    try:
        with process_arguments(complete(arguments)):
            cli = ContinualCLI()
            _TellsOfLostProcesses(cli)
            with _ends_with_parent(cli):
                cli.act()
    except Interrupted as stop:
        if not is_follower():
            path = shlex.quote(str(shown(stop.path)))
            print(f"stopped; go on with: {PROGRAM} fit --ckpt_path {path}", file=sys.stderr)
            if (outcome := requeue(stop.signum)) is not None:
                print(outcome, file=sys.stderr)
        # Lightning kills the first process where one that it has started ends with another code.
        return 0 if _was_started_by_another() else 128 + stop.signum
    except (NotFiniteError, checkpoints.WriteError) as error:
        if not is_follower():  # the others say the same
            print(f"error: {told(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost_peer(error) or os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        print(_lost(cli), file=sys.stderr)
        return 1
    except (ValueError, OSError, MisconfigurationException) as error:
        started = cli is not None and cli.loop is not None and cli.loop.started
        if (started and not isinstance(error, MisconfigurationException)) or os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        fail(told(error))
    return 0


def _lost(cli: ContinualCLI | None) -> str:
    where = f" --run_dir {shlex.quote(str(shown(cli.run_dir)))}" if cli is not None else ""
    return f"error: another process of this run has ended; go on with: {PROGRAM} fit{where} --ckpt_path last"


def _was_started_by_another() -> bool:
    """Whether the first process of this run has started this one, and not torchrun or SLURM."""
    return is_follower() and not TorchElasticEnvironment.detect() and slurm_job() is None


@contextmanager
def _ends_with_parent(cli: ContinualCLI) -> Iterator[None]:
    """End this process within a second of the one that has started it: it would wait for that one for half an hour."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if str(os.getppid()) != os.environ.get(_FIRST):
                print(_lost(cli), file=sys.stderr, flush=True)
                os._exit(1)

    if not is_follower():
        os.environ[_FIRST] = str(os.getpid())  # for those that this one starts
    elif _was_started_by_another() and _FIRST in os.environ:
        threading.Thread(target=watch, daemon=True, name="parent-observer").start()
    try:
        yield
    finally:
        done.set()


class _TellsOfLostProcesses(logging.Handler):
    """Says in one line what Lightning says of a process that it started, before it kills all others."""

    def __init__(self, cli: ContinualCLI) -> None:
        super().__init__(logging.INFO)
        self._cli = cli
        logger = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "terminated with code" in record.getMessage():
            print(_lost(self._cli), file=sys.stderr, flush=True)


def complete(arguments: list[str]) -> list[str]:
    """The arguments with what they leave out: the configuration of the checkpoint, then the default classes.

    A default class is given only where no other is named: as a default of the parser, its arguments would stay with the
    class that takes its place, wherever that has arguments of the same names.
    """
    command, rest = arguments[0], arguments[1:]
    path = value_of(arguments, "--ckpt_path")
    saved = checkpoints.load(path)["cl_lightning"]["config"] if path is not None else ""
    if saved and not configs_of(rest):
        content = yaml.safe_load(saved)
        if command != "fit":  # what a fit ran on says nothing about where it is looked at
            for key in ("accelerator", "devices", "num_nodes", "strategy", "plugins", "logger", "profiler"):
                content["trainer"].pop(key, None)
        rest = [f"--config={json.dumps(content)}", *rest]
    for key, default in DEFAULTS.items():
        if not names_class(rest, key):
            rest = [f"--{key}", default, *rest]
    return [command, *rest]


def configs_of(arguments: Sequence[str]) -> list[str]:
    """Values of all ``--config`` options."""
    found = [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-c="))]
    return found + [value for option, value in pairwise(arguments) if option in ("--config", "-c")]


def names_class(arguments: Sequence[str], key: str) -> bool:
    """Whether an option or a config says which class ``key`` is."""
    options = (f"--{key}", f"--{key}.class_path")
    if any(argument in options or argument.startswith(tuple(f"{o}=" for o in options)) for argument in arguments):
        return True
    for config in configs_of(arguments):
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8") if Path(config).is_file() else config)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser will say what is wrong with it
        chosen = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(chosen, str) or (isinstance(chosen, Mapping) and "class_path" in chosen):
            return True
    return False


@contextmanager
def process_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Make these the arguments of the process, with which Lightning starts the processes of a distributed run."""
    before = sys.argv
    sys.argv = [before[0] if before else PROGRAM, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def told(error: Exception) -> str:
    """An error in one line."""
    text = str(error)
    if text.startswith("Caught ") and (worker := re.search(r"^\w*Error: (.*)\Z", text, re.MULTILINE | re.DOTALL)):
        text = worker.group(1)  # a worker process of a DataLoader sends its traceback along
    return explain(text) if "\n" in text else shorten(text)


def needed(value: str | None, option: str) -> str:
    """The value of an option that a command cannot do without."""
    if value is None:
        raise ValueError(f"give {option}")
    return value


def is_follower() -> bool:
    """Whether another process, the first one of this run, chooses its folder and writes."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def shown(path: Path) -> Path:
    """A path as it is told: relative to the working directory where it lies inside."""
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved


def folder_of(ckpt_path: str) -> Path | None:
    """Run folder that a checkpoint lies in, if it lies in one."""
    folder = Path(ckpt_path).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def check_devices(accelerator: str, devices: Any) -> None:
    """Tell that there are fewer GPUs than asked for, before anything is started."""
    available = torch.cuda.device_count()
    if (accelerator == "auto" and available == 0) or accelerator not in ("auto", "gpu", "cuda"):
        return
    if available == 0:
        if accelerator == "cuda" or not torch.backends.mps.is_available():
            raise ValueError(
                f"trainer.accelerator is {accelerator!r}, but there is no GPU that torch can use here; give "
                "--trainer.accelerator cpu"
            )
        return
    text = str(devices).strip("[] ")
    listed = [int(part) for part in text.split(",") if part.strip().isdigit()]
    needed = max(listed) + 1 if isinstance(devices, list) or "," in text else sum(listed)
    if needed > available:
        raise ValueError(
            f"trainer.devices is {devices}, but there are {available} GPUs here; ask for those, or give "
            "--trainer.accelerator cpu"
        )


def quiet() -> None:
    """Silence what Lightning says at each of the many fits and tests of a stream, and what does not apply to it."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
