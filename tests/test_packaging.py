import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support import ROOT

TOPS = ("callbacks", "datamodules")  # folders at the top that are installed inside cl_lightning


def own_modules(top: str) -> list[Path]:
    links = [ROOT / "cl_lightning" / name for name in TOPS]
    return [path for path in (ROOT / top).rglob("*.py") if not any(link in path.parents for link in links)]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that is built from the sdist of what git has."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=folder / "source")
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_package_and_nothing_outside_cl_lightning(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if name.endswith(".py")}
    assert all(name.startswith("cl_lightning/") for name in modules)
    wanted = {f"cl_lightning/{p.relative_to(ROOT / 'cl_lightning').as_posix()}" for p in own_modules("cl_lightning")}
    wanted |= {f"cl_lightning/{top}/{p.relative_to(ROOT / top).as_posix()}" for top in TOPS for p in own_modules(top)}
    assert wanted <= modules
    assert {"cl_lightning/py.typed", "cl_lightning/catalogue.json"} <= set(names)
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").rglob("*.yaml")}
    configs -= {name for name in configs if "/sweeps/" in name}
    assert {f"cl_lightning/{name}" for name in configs} <= set(names)


def test_the_wheel_runs_the_quickstart_in_an_empty_folder(wheel, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, system_site_packages=False, with_pip=False)
    # The installed dependencies are lent to the new environment by a path file; the wheel is what is tried.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    installed = [path for path in sys.path if path.endswith("site-packages")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "lent.pth").write_text("\n".join(installed))
    empty = tmp_path / "empty"
    empty.mkdir()
    python = str(environment / "bin" / "python")
    where = run(python, "-c", "import cl_lightning.callbacks as c; print(c.__file__)", cwd=empty)
    assert str(site) in where.stdout, where.stderr[-2000:]
    done = run(python, "-m", "cl_lightning", "fit", "--trainer.max_epochs", "1", cwd=empty, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (empty / "runs" / "ER" / "0000" / "results.json").is_file()


def test_no_top_level_package_of_a_common_name_can_be_installed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.split("/")[0] in TOPS]
