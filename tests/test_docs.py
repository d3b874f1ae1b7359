import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_method_of_the_documentation_runs_as_it_is_printed(tmp_path, monkeypatch):
    from cl_lightning.cli import main

    (tmp_path / "anchored_replay.py").write_text(blocks("docs/new_method.md", "python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    command = blocks("docs/new_method.md", "bash")[0].split()
    assert command[:3] == ["python", "-m", "cl_lightning"]
    try:
        quick = ["--trainer.enable_progress_bar", "false", "--run_dir", "run", "--loop.stop_after_task", "1"]
        assert main([*command[3:], *quick]) == 0
    finally:
        sys.modules.pop("anchored_replay", None)
    assert (tmp_path / "run" / "results.json").is_file()


def test_the_method_of_the_documentation_has_about_forty_lines():
    code = blocks("docs/new_method.md", "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 45


@pytest.mark.parametrize("document", ["README.md", "docs/design.md", "docs/new_method.md"])
def test_files_that_the_documents_name_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = "cl_lightning|callbacks|datamodules|experiments|docs|tests|benchmarks"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_the_table_of_methods_in_the_readme_names_only_what_there_is():
    from cl_lightning.discovery import methods

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert named
    assert named <= {method.name for method in methods()}


def test_the_page_of_benchmarks_is_what_their_numbers_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import page

    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == page.text(), "run python -m benchmarks.page"
