"""The commands ``fit``, ``test``, ``validate`` and ``predict``, on LightningCLI."""

import errno
import logging
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cl_lightning import distributed, report
from cl_lightning.callbacks.stream_progress import StreamProgress
from cl_lightning.checks import origin
from cl_lightning.cli import discovery, prediction, trust
from cl_lightning.cli.arguments import (
    COMMANDS,
    OF_A_CALL,
    PROGRAM,
    SOURCE,
    complete,
    fail,
    value_of,
    with_source_run,
)
from cl_lightning.cli.parsing import Parser, explain, single_line
from cl_lightning.cli.processes import _was_started_by_another, is_follower, process_arguments, quiet, shown
from cl_lightning.cli.shorthand import expanded, with_default_classes
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.escape_control import printable
from cl_lightning.loop import (
    Interrupted,
    LoopOptions,
    NotFiniteError,
    TaskLoop,
    is_lost_peer,
    next_number,
    requeue,
    reserved_folder,
    results,
)
from cl_lightning.loop import checkpoint as checkpoints
from cl_lightning.loop.lightning_support import BAREBONES
from cl_lightning.strategy import ContinualStrategy

_RUN_DIR = "CL_LIGHTNING_RUN_DIR"
_FIRST = "CL_LIGHTNING_FIRST_PROCESS"


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` trains on a whole stream.

    The constructor parses the arguments of the process and builds the objects; ``act`` runs the command.

    Args:
        saved: Configuration of a checkpoint among the arguments, to be checked; None if it is trusted or not used.
        path: The checkpoint.
        source: Configuration of the strategy of a run that is adapted, to be checked; None as above.
        source_path: The checkpoint of that run.
    """

    def __init__(
        self,
        saved: Mapping[str, Any] | None = None,
        path: str = "",
        source: Mapping[str, Any] | None = None,
        source_path: str = "",
    ) -> None:
        self.saved, self.path = saved, path
        self.source, self.source_path = source, source_path
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
        """Run the command."""
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
        # Otherwise a misspelt key could pass as an abbreviation.
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(LoopOptions, "loop")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: configuration, manifest, results, checkpoints, logs. By default the folder "
            "of the checkpoint, or the next runs/METHOD/NUMBER.",
        )
        parser.add_argument(
            trust.FLAG,
            action="store_true",
            help="Build whatever the configuration in the checkpoint names. This can run any code: only for files of "
            "people you trust.",
        )
        parser.add_argument("--images", type=str | None, default=None, help="predict: image file, or folder of images.")
        parser.add_argument("--output", type=str, default="predictions.csv", help="predict: CSV file to write.")
        parser.add_argument(
            "--skip_unreadable", action="store_true", help="predict: leave out files that are not readable images."
        )
        parser.add_argument(
            "--task",
            type=int | None,
            default=None,
            help="predict: index of the task that the images belong to, for a method that makes use of it.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, *given = sys.argv[1:]
        if self.source is not None:
            trust.check(self.source, trust.option_types(self._subcommand_parsers[command]), self.source_path)
        if self.saved is not None:
            trust.check(self.saved, trust.option_types(self._subcommand_parsers[command]), self.path, given)
        super().parse_arguments(parser, args)

    def trust_option(self) -> str:
        """The option, after a space, without which the checkpoints of this run are refused; empty if none is needed."""
        types = trust.option_types(self._subcommand_parsers[str(self.subcommand)])
        return "" if trust.problem(yaml.safe_load(self.text), types) is None else f" {trust.FLAG}"

    def configuration(self) -> str:
        """The resolved configuration as YAML, without the options of this call alone."""
        config = self.config[self.subcommand].clone()
        for key in OF_A_CALL:
            config.pop(key, None)
        text: str = self._parser(self.subcommand).dump(config, skip_unset=False, skip_validation=True)
        return text

    # ------------------------------------------------------------------ building

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        if trainer.barebones:  # the Trainer would refuse the options that it is given here
            raise ValueError(f"trainer.barebones{BAREBONES}")
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
        hidden = given.get("enable_progress_bar") is False
        if not hidden and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(StreamProgress())
        if any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = True  # off by default, since the run writes its checkpoints itself
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except TypeError as error:
            raise ValueError(f"trainer: {error}") from error

    def _choose_run_dir(self, config: Any) -> Path:
        """The given folder, the folder of the checkpoint, or the next free number under ``runs``.

        Creating the folder reserves its number, so that runs that start at the same time have different folders.
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
        if self.subcommand == "fit" and not follows and not self._reserved:
            chosen, self._reserved = reserved_folder(base), True
        else:
            chosen = base / f"{next_number(base):04d}"
        os.environ[_RUN_DIR] = str(chosen)
        return chosen

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Remove the folder of a run that fails before its first step."""
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
    # LightningCLI calls these methods, in place of the Trainer's methods of the same names, at the end of its
    # constructor.

    def fit(self, ckpt_path: str | None = None, **_: Any) -> None:
        def action() -> None:
            loop = self._make_loop()
            loop.fit(ckpt_path)
            if self.trainer.is_global_zero and not self._show(loop):
                raise SystemExit(130)

        self._action = action

    def _show(self, loop: TaskLoop) -> bool:
        """Print the results and write the report of a complete run; whether this was not interrupted."""
        try:
            results.show(loop.results())
            try:
                print(f"report: {shown(report.write([self.run_dir], self.run_dir / 'report.html'))}")
            except ValueError as error:  # the run is complete without its page
                print(f"no report: {error}", file=sys.stderr)
            print(f"results, checkpoints and logs are in {shown(self.run_dir)}")
        except KeyboardInterrupt:
            folder = shlex.quote(str(shown(self.run_dir)))
            print(
                f"stopped; the run is complete and saved, without its report; write it with: {PROGRAM} report {folder}",
                file=sys.stderr,
            )
            return False
        return True

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
                task=config.task,
                path=ckpt_path,
            )
            for reason in skipped:
                print(f"skipped {printable(str(reason))}", file=sys.stderr)
            print(f"{count} images: {config.output}")

        self._action = action


def _texts(command: str) -> dict[str, str]:
    """Usage and description in the help of a command."""
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
        find()  # imports the classes, so that their short names are known
    cli: ContinualCLI | None = None
    try:
        completed, saved = complete(expanded(arguments))
        completed = with_default_classes(completed)
        trusted = saved is None or trust.FLAG in arguments
        source_path = value_of(completed, SOURCE) or ""
        completed, source = with_source_run(completed)
        with process_arguments(completed):
            with nullcontext() if trusted else trust.only_allowed_imports(arguments):
                cli = ContinualCLI(
                    None if trusted else saved,
                    value_of(arguments, "--ckpt_path") or "",
                    None if trust.FLAG in arguments else source,
                    source_path,
                )
            _LostProcessReporter(cli)
            with _ends_with_parent(cli):
                cli.act()
    except Interrupted as stop:
        if not is_follower():
            path = shlex.quote(str(shown(stop.path)))
            trusting = cli.trust_option() if cli is not None else ""
            print(f"stopped; resume with: {PROGRAM} fit --ckpt_path {path}{trusting}", file=sys.stderr)
            if (outcome := requeue(stop.signum)) is not None:
                print(outcome, file=sys.stderr)
        # Lightning kills the first process if a process that it started exits with another code.
        return 0 if _was_started_by_another() else 128 + stop.signum
    except (NotFiniteError, checkpoints.WriteError) as error:
        if not is_follower():  # the others raise the same error
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost_peer(error) or os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        print(_lost(cli), file=sys.stderr)
        return 1
    except (ValueError, OSError, MisconfigurationException) as error:
        started = cli is not None and cli.loop is not None and cli.loop.started
        if os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: free the disk, then run the command again; {one_line(error)}", file=sys.stderr)
            return 1
        if started and not isinstance(error, MisconfigurationException):
            if not is_own_message(error):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 1
        fail(one_line(error))
    return 0


def _lost(cli: ContinualCLI | None) -> str:
    where = f" --run_dir {shlex.quote(str(shown(cli.run_dir)))}" if cli is not None else ""
    where += " --ckpt_path last" + (cli.trust_option() if cli is not None else "")
    return f"error: another process of this run has ended; resume with: {PROGRAM} fit{where}"


@contextmanager
def _ends_with_parent(cli: ContinualCLI) -> Iterator[None]:
    """End this process within a second of the process that started it; else it would wait for half an hour."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if str(os.getppid()) != os.environ.get(_FIRST):
                print(_lost(cli), file=sys.stderr, flush=True)
                os._exit(1)

    if not is_follower():
        os.environ[_FIRST] = str(os.getpid())  # for the processes that this process starts
    elif _was_started_by_another() and _FIRST in os.environ:
        threading.Thread(target=watch, daemon=True, name="parent-observer").start()
    try:
        yield
    finally:
        done.set()


class _LostProcessReporter(logging.Handler):
    """Reports in one line that a process of the run has ended, before Lightning kills the others."""

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


def is_own_message(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package raised a ValueError, whose message therefore is for the user.

    An error that a function of Python or torch raises inside of this package is a defect, and needs its traceback.
    """
    return isinstance(error, ValueError) and origin(error) == ("cl_lightning", True)


def one_line(error: Exception) -> str:
    """The message of an error in one line."""
    text = str(error)
    if text.startswith("Caught ") and (worker := re.search(r"^\w*Error: (.*)\Z", text, re.MULTILINE | re.DOTALL)):
        text = worker.group(1)  # a worker process of a DataLoader adds its traceback
    return explain(text) if "\n" in text else single_line(text)


def needed(value: str | None, option: str) -> str:
    """The value of a required option."""
    if value is None:
        raise ValueError(f"give {option}")
    return value


def folder_of(ckpt_path: str) -> Path | None:
    """Run folder of a checkpoint; None if it is not in one."""
    folder = Path(ckpt_path).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def check_devices(accelerator: str, devices: Any) -> None:
    """Raise if there are fewer GPUs than requested, before anything is started."""
    available = torch.cuda.device_count()
    if (accelerator == "auto" and available == 0) or accelerator not in ("auto", "gpu", "cuda"):
        return
    if available == 0:
        if accelerator == "cuda" or not torch.backends.mps.is_available():
            raise ValueError(
                f"trainer.accelerator is {accelerator!r}, but torch finds no usable GPU here; give "
                "--trainer.accelerator cpu"
            )
        return
    text = str(devices).strip("[] ")
    listed = [int(part) for part in text.split(",") if part.strip().isdigit()]
    needed = max(listed) + 1 if isinstance(devices, list) or "," in text else sum(listed)
    if needed > available:
        raise ValueError(
            f"trainer.devices is {devices}, but there are {available} GPUs here; use at most {available}, or give "
            "--trainer.accelerator cpu"
        )
