"""The command line: ``python -m cl_lightning fit | validate | test | predict | methods``."""

import difflib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from cl_lightning import checkpoint as checkpoints
from cl_lightning import discovery, prediction, results
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import Interrupted, LoopOptions, TaskLoop
from cl_lightning.strategy import ContinualStrategy

QUICKSTART: dict[str, Any] = {
    "model": {"class_path": "ER", "init_args": {"memory_size": 200}},
    "data": {"class_path": "Digits", "init_args": {"batch_size": 32}},
}
"""What ``fit`` runs without any option: experience replay on the digits of scikit-learn, 5 tasks of 2 classes."""

_COMMANDS = ("fit", "validate", "test", "predict")


class Parser(LightningArgumentParser):
    """Names the nearest known key when a key is unknown, and puts an error in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries several readings of a value, and catches what does not fit
            super().error(message, ex)
        text = " ".join(message.split())
        unknown = re.search(r"(?:Key|Group|option|argument)s?:? '?([\w.\-]+)'? (?:is not|does not)", text) or re.search(
            r"(?:Unrecognized arguments|does not accept nested key|not expected):? '?-{0,2}([\w.\-]+)", text
        )
        if unknown is not None:
            key = unknown.group(1)
            nearest = difflib.get_close_matches(key.rpartition(".")[2], self._leaves(text), n=1)
            text += f"; did you mean {nearest[0]!r}?" if nearest else ""
        fail(text)

    def _leaves(self, message: str) -> list[str]:
        """Last parts of all keys that some class of the package takes."""
        import inspect

        owners = [*discovery.strategies(), *discovery.callbacks(), *discovery.datamodules(), Trainer, LoopOptions]
        names = {
            name for owner in owners for cls in owner.__mro__ for name in inspect.signature(cls.__init__).parameters
        }
        return sorted(names | {"model", "data", "trainer", "loop", "config", "seed_everything", "run_dir", "ckpt_path"})


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` goes through a whole stream."""

    loop: TaskLoop | None = None
    run_dir: Path

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
            "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(LoopOptions, "loop")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: config, manifest, results, checkpoints, logs. By default the next runs/METHOD/NUMBER.",
        )
        parser.add_argument("--images", type=str | None, default=None, help="predict: image file, or folder of images.")
        parser.add_argument("--output", type=str, default="predictions.csv", help="predict: CSV file that is written.")
        parser.set_defaults(QUICKSTART)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        method = str(config.model.class_path).rpartition(".")[2]
        ckpt_path = config.get("ckpt_path")
        self.run_dir = choose_run_dir(config.run_dir, method, ckpt_path)
        trainer = config.trainer
        trainer.default_root_dir = str(self.run_dir)
        if trainer.logger in (None, True) and self.subcommand == "fit":
            place = {"save_dir": str(self.run_dir), "name": "", "version": ""}
            names = ("CSVLogger", "TensorBoardLogger")
            trainer.logger = [{"class_path": f"lightning.pytorch.loggers.{n}", "init_args": dict(place)} for n in names]
            trainer.logger[1]["init_args"]["sub_dir"] = "tensorboard"
        elif self.subcommand != "fit":
            trainer.logger = False
        elif trainer.logger:
            for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
                if "save_dir" in logger.init_args and logger.init_args.save_dir in (None, ".", ""):
                    logger.init_args.save_dir = str(self.run_dir)
        check_devices(trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(**kwargs)

    def configuration(self) -> str:
        """The resolved configuration as YAML, without what belongs to this call alone."""
        config = self.config[self.subcommand].clone()
        for key in ("ckpt_path", "config", "images", "output", "run_dir"):
            config.pop(key, None)
        config.trainer.default_root_dir = None
        if self.subcommand == "fit" and isinstance(config.trainer.logger, list):
            paths = [str(logger.get("class_path")) for logger in config.trainer.logger]
            if paths == [f"lightning.pytorch.loggers.{n}" for n in ("CSVLogger", "TensorBoardLogger")]:
                config.trainer.logger = True
        text: str = self._parser(self.subcommand).dump(config, skip_validation=True)
        return text

    def make_loop(self) -> TaskLoop:
        config = self.config[self.subcommand]
        self.loop = TaskLoop(
            self.trainer,
            self.model,
            self.datamodule,
            options=self._get(self.config_init, "loop"),
            run_dir=self.run_dir,
            seed=config.seed_everything,
            config=self.configuration(),
        )
        return self.loop

    # Called by LightningCLI in place of the Trainer's methods of these names.

    def fit(self, ckpt_path: str | None = None, **_: Any) -> None:
        loop = self.make_loop()
        if self.trainer.is_global_zero and ckpt_path is None and not (self.run_dir / "config.yaml").exists():
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(loop.config, encoding="utf-8")
        loop.fit(ckpt_path)
        if self.trainer.is_global_zero:
            results.show(loop.results())
            print(f"results: {self.run_dir / 'results.json'}")

    def test(self, ckpt_path: str | None = None, **_: Any) -> None:
        loop = self.make_loop()
        matrix = loop.test(required(ckpt_path, "test"))
        if self.trainer.is_global_zero:
            prediction.show_row(matrix, loop.stream)

    def validate(self, ckpt_path: str | None = None, **_: Any) -> None:
        values = self.make_loop().validate(required(ckpt_path, "validate"))
        if self.trainer.is_global_zero:
            for name, value in values.items():
                print(f"{name}: {value:.4f}")

    def predict(self, ckpt_path: str | None = None, **_: Any) -> None:
        config = self.config[self.subcommand]
        if config.images is None:
            raise ValueError("predict: give --images, a file or a folder of images")
        path = Path(required(ckpt_path, "predict"))
        count = prediction.predict_folder(
            self.trainer, self.model, self.datamodule, checkpoints.load(path), Path(config.images), Path(config.output)
        )
        print(f"{count} images: {config.output}")


def required(ckpt_path: str | None, command: str) -> str:
    if ckpt_path is None:
        raise ValueError(f"{command}: give --ckpt_path, a checkpoint file or 'last'")
    return ckpt_path


def check_devices(trainer: Any) -> None:
    """Tell that there are fewer devices than asked for before anything is started."""
    wanted = trainer.devices
    if not str(wanted).isdigit() or str(trainer.accelerator) not in ("gpu", "cuda", "auto"):
        return
    available = torch.cuda.device_count()
    if int(wanted) > available and (available > 0 or str(trainer.accelerator) != "auto"):
        raise ValueError(
            f"trainer.devices is {wanted}, but this machine has {available} GPUs; ask for at most that many, or give "
            "--trainer.accelerator cpu"
        )


def choose_run_dir(given: str | None, method: str, ckpt_path: str | None) -> Path:
    """Folder of a run: the given one, that of the checkpoint, or the next free number under ``runs``."""
    if given is not None:
        return Path(given)
    if ckpt_path is not None and (found := folder_of(ckpt_path)) is not None:
        return found
    inherited = os.environ.get("CL_LIGHTNING_RUN_DIR")  # the process that started this one has chosen
    if inherited is not None and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    base = Path("runs") / method
    numbers = [int(entry.name) for entry in base.glob("[0-9]*") if entry.name.isdigit()] if base.is_dir() else []
    chosen = base / f"{max(numbers, default=-1) + 1:04d}"
    if "LOCAL_RANK" not in os.environ:
        os.environ["CL_LIGHTNING_RUN_DIR"] = str(chosen)
    return chosen


def folder_of(ckpt_path: str) -> Path | None:
    """Run folder that a checkpoint lies in, if it lies in one."""
    folder = Path(ckpt_path).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def newest_checkpoint() -> Path | None:
    """The last checkpoint of the newest run under ``runs``."""
    found = list(Path("runs").glob("*/*/checkpoints/last.ckpt"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        args: Command line arguments; None for those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    sys.path.insert(0, os.getcwd())  # a user's classes in the working directory
    quiet()
    cli: ContinualCLI | None = None
    try:
        if arguments[:1] == ["methods"]:
            return show_methods(arguments[1:])
        for module in (discovery.strategies, discovery.callbacks, discovery.datamodules):
            module()  # short names are found among the classes that were imported
        arguments = with_saved_config(arguments)
        cli = ContinualCLI.__new__(ContinualCLI)
        cli.__init__(  # type: ignore[misc]  # so that an error inside, too, finds the loop
            ContinualStrategy,
            ContinualDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "description": __doc__},
            trainer_defaults={
                "max_epochs": 5,
                "enable_checkpointing": False,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 50,
            },
            args=arguments,
        )
    except Interrupted as stop:
        print(f"stopped. Go on with: python -m cl_lightning fit --ckpt_path {stop.path}", file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, OSError, MisconfigurationException) as error:
        if (cli is not None and cli.loop is not None and cli.loop.started) or os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()))
    return 0


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def with_saved_config(arguments: list[str]) -> list[str]:
    """Resolve ``--ckpt_path last``, and without ``--config`` take the configuration that the checkpoint holds."""
    if not arguments or arguments[0] not in _COMMANDS:
        return arguments
    options = dict(enumerate(arguments))
    place = next((i for i, a in options.items() if a == "--ckpt_path" or a.startswith("--ckpt_path=")), None)
    if place is None:
        return arguments
    joined = arguments[place].startswith("--ckpt_path=")
    path = arguments[place].partition("=")[2] if joined else options.get(place + 1, "")
    if path == "last":
        given = value_of(arguments, "--run_dir")
        found = Path(given) / "checkpoints" / "last.ckpt" if given is not None else newest_checkpoint()
        if found is None or not found.is_file():
            where = given or "runs"
            raise ValueError(f"--ckpt_path last: there is no checkpoint under {where}; give the path of a .ckpt file")
        path = str(found)
    saved = checkpoints.load(path)["cl_lightning"]["config"]
    rest = [a for i, a in options.items() if i != place and (joined or i != place + 1)]
    extra = ["--ckpt_path", path]
    if saved and not any(a in ("--config", "-c") or a.startswith("--config=") for a in rest):
        content = yaml.safe_load(saved)
        if rest[0] != "fit":  # what a fit ran on says nothing about where it is looked at
            for key in ("devices", "strategy", "num_nodes", "accelerator", "callbacks", "logger"):
                content["trainer"].pop(key, None)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="config_", delete=False, encoding="utf-8") as file:
            yaml.safe_dump(content, file)
        extra = ["--config", file.name, *extra]
    return [rest[0], *extra, *rest[1:]]


def value_of(arguments: Sequence[str], option: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def show_methods(arguments: Sequence[str]) -> int:
    """Print every strategy and callback; ``--format markdown`` for the documentation."""
    if arguments and list(arguments) != ["--format", "markdown"]:
        raise ValueError(f"methods: unknown option {' '.join(arguments)!r}; allowed: --format markdown")
    if arguments:
        print(discovery.markdown())
        return 0
    table = Table(title="strategies and callbacks")
    for name in ("name", "family", "paper", "exemplars", "task ids", "pretrained", ""):
        table.add_column(name)
    for method in discovery.methods():
        marks = ("yes" if mark else "no" for mark in (method.exemplars, method.task_ids, method.pretrained))
        table.add_row(method.name, method.family, method.paper, *marks, method.summary)
    Console(width=max(Console().width, 160) if not sys.stdout.isatty() else None).print(table)
    return 0


def quiet() -> None:
    """Silence what Lightning says at each of the many fits and tests of a stream."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*returned 0 length.*",
        ".*is not allowed, it will be.*",
        ".*Experiment logs directory .* exists.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message)


assert issubclass(ContinualDataModule, LightningDataModule)
