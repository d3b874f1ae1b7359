import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import costs, rotation, selection, shared

from cl_lightning.loop import warning_filters

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=stress, or --hypothesis-profile stress: twenty times as many examples of tests/fuzzing.py.
settings.register_profile("stress", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
if profile := os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile(profile)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights beside the checkout; tests that use it skip where it is absent."""
    folder = Path(os.environ.get("CL_LIGHTNING_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data and weights are not at {folder}; set CL_LIGHTNING_DATA to their folder")
    return folder


# ------------------------------------------------------------------ which tests run, and where


def pytest_configure(config: pytest.Config) -> None:
    shared.begin()
    for message in warning_filters.MESSAGES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    if getattr(config.option, "numprocesses", None) and not _is_chosen(config):
        try:
            selection.now()  # for all workers
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def _is_chosen(config: pytest.Config) -> bool:
    """Whether single tests or files were asked for."""
    return bool(config.option.keyword) or any("::" in arg or arg.endswith(".py") for arg in config.args)


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not this run's turn; keep together what shares a reference run, or a file."""
    if not _is_chosen(config) and (left_out := rotation.left_out(items)):
        config.hook.pytest_deselected(items=left_out)
        skipped = set(left_out)
        items[:] = [item for item in items if item not in skipped]
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        group = costs.method_of(item) or str(item.path.relative_to(config.rootpath))
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault(group, []).append(item)
    items[:] = [item for members in groups.values() for item in members]


# ------------------------------------------------------------------ what it costs, and how to repeat it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    report.cost = costs.lap()
    report.method = costs.method_of(item)
    report.piece = costs.piece_now_and_then() if report.when == "teardown" else None
    if report.failed and (command := rotation.how_to_repeat(item)) is not None:
        report.sections.append(("rotation", f"to repeat this: {command}"))
    return report


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    costs.lap()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    costs.TOTALS.add(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and not hasattr(session.config, "workerinput") and costs.TOTALS.fails():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in [*costs.TOTALS.summary(), *rotation.summary()]:
        terminalreporter.write_line(line)
