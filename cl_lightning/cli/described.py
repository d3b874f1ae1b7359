"""Description of a run from its arguments, without starting it: a study checks its cells with it."""

import contextlib
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import set_parsing_settings

from cl_lightning.cli import discovery
from cl_lightning.cli.arguments import complete, resolve_configs, with_source_run
from cl_lightning.cli.commands import ContinualCLI, one_line
from cl_lightning.cli.processes import process_arguments, quiet
from cl_lightning.cli.shorthand import expanded, with_default_classes
from cl_lightning.study import Description


def describe(arguments: Sequence[str]) -> Description:
    """Build the objects of a run, and make its stream; nothing is written.

    Args:
        arguments: ``fit`` with its options.

    Raises:
        ValueError: With one line, if the run could not start.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _describe(list(arguments))
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        raise ValueError(re.sub(r"^error: ", "", lines[-1]) if lines else "the run could not start") from None
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(one_line(error)) from error


def _describe(arguments: list[str]) -> Description:
    quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    for find in (discovery.strategies, discovery.callbacks, discovery.datamodules):
        find()
    completed, _ = complete(resolve_configs(expanded(arguments)))
    completed = with_default_classes(completed)
    completed, _ = with_source_run(completed)
    with tempfile.TemporaryDirectory() as folder, process_arguments([*completed, f"--run_dir={Path(folder) / 'run'}"]):
        cli = ContinualCLI()
    config = yaml.safe_load(cli.text)
    seed = config.pop("seed_everything")
    config["trainer"].pop("default_root_dir", None)
    config["trainer"].pop("logger", None)  # names the folder of the run
    cli.datamodule.prepare_data()
    stream = cli.datamodule.make_stream(int(seed))
    return Description(
        config=yaml.safe_dump(config, sort_keys=True),
        classes=tuple(stream.class_names),
        tasks=len(stream.tasks),
        validation=tuple(len(part) for part in stream.val),
    )
