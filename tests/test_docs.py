import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ROOT


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


def test_the_program_that_writes_text_embeddings_runs_as_it_is_printed(tmp_path, monkeypatch):
    import torch
    import torchvision

    from cl_lightning.models import TextHead, template_mean

    class Model:
        def eval(self):
            return self

        def encode_text(self, texts):  # in the directions of the letters
            return torch.stack([torch.tensor([text.count(c) + 0.1 for c in "abcg"]) for text in texts])

    made = SimpleNamespace(create_model=lambda *_, **__: Model(), get_tokenizer=lambda name: lambda texts: texts)
    monkeypatch.setitem(sys.modules, "open_clip", made)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda *_, **__: SimpleNamespace(classes=["cab", "b_g"]))
    monkeypatch.chdir(tmp_path)
    exec(blocks("docs/text_embeddings.md", "python")[0], {})
    head = TextHead(4, embeddings="class_embeddings.npz")
    head.grow(2)
    head.fill_names(["b g", "cab"])
    texts = ["a photo of a b g.", "a good photo of a b g.", "a photo of the b g."]
    torch.testing.assert_close(head.weight()[:1], template_mean(Model().encode_text(texts)[None]))


@pytest.mark.parametrize("document", ["README.md", "docs/design.md", "docs/new_method.md", "docs/text_embeddings.md"])
def test_files_that_the_documents_name_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = "cl_lightning|callbacks|datamodules|experiments|docs|tests|benchmarks"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    return generate


def test_the_generated_parts_of_the_documentation_are_up_to_date(generate):
    assert generate.outdated() == [], "run make docs"


def test_a_page_that_differs_from_the_code_is_reported(generate, monkeypatch, capsys):
    monkeypatch.setitem(generate.FAMILIES, "online", ("Online methods", "another purpose"))
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{file}: generated part is out of date; run make docs" for file in ("README.md", "docs/methods/online.md")
    ]


def test_every_method_is_in_the_readme_and_every_config_on_a_page(generate):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [method.name for method in generate.methods() if f"`{method.name}`" not in readme] == []
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/methods").glob("*.md"))
    configs = [str(path.relative_to(ROOT)) for path in (ROOT / "experiments/methods").rglob("*.yaml")]
    assert [config for config in configs if config not in pages] == []


def test_the_command_of_a_config_keeps_its_further_lines(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    config = tmp_path / "mine.yaml"
    config.write_text("# Mine.\n#   python -m cl_lightning fit --config a \\\n#     --config mine\n# End.\nmodel: ER\n")
    assert generate.command_of(config) == "python -m cl_lightning fit --config a \\\n    --config mine"
    config.write_text("# Mine.\nmodel: ER\n")
    with pytest.raises(ValueError, match=r"mine.yaml: the head has no command; add `#   python -m"):
        generate.command_of(config)


def test_the_page_of_results_has_the_texts_and_options_of_its_protocols(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import comparison

    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert text == comparison.page(Path("no runs"), text), "run python -m benchmarks.comparison table"


def test_a_row_is_replaced_by_new_runs_kept_with_its_options_and_dropped_with_others(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import comparison
    from benchmarks.protocols import Protocol
    from benchmarks.rows import Method

    last, time = comparison.measures.LAST, comparison.measures.SECONDS
    columns = (replace(last, of=lambda run: run[0]), replace(time, of=lambda run: run[1]))
    monkeypatch.setattr(comparison.measures, "SECONDS", columns[1])
    methods = {name: Method(name.lower(), "--x 1") for name in "ABC"}

    def table(measured, methods, old=""):
        protocol = Protocol("P", "it says", "--s", methods=methods, columns=columns)
        monkeypatch.setattr(comparison, "PROTOCOLS", {"p": protocol})
        monkeypatch.setattr(comparison, "rows_of", lambda name: methods)
        monkeypatch.setattr(comparison, "finished", lambda path: path.parts[-2] in measured and int(path.name) < 2)
        monkeypatch.setattr(
            comparison.records, "read", lambda path: (0.5 + 0.1 * int(path.name), measured[path.parts[-2]])
        )
        page = comparison.page(Path("runs"), old)
        return page, [line for line in page.splitlines() if line.startswith("| ")]

    first, lines = table({"a": 600.0, "b": 90.0}, methods)
    head, of_a, of_b = lines
    assert head.endswith("time (min) |")
    assert of_a == "| A | 2 | 55.0 ± 63.5 | 10.0 |"
    assert of_b == "| B | 2 | 55.0 ± 63.5 | 1.50 |"
    second, lines = table({"c": 3.0}, methods, first)
    assert lines == [head, of_a, of_b, "| C | 2 | 55.0 ± 63.5 | 0.05 |"]  # in the unit of the page
    assert table({}, methods, second)[0] == second
    assert table({"b": 30.0}, methods, second)[1][2] == "| B | 2 | 55.0 ± 63.5 | 0.50 |"
    _, lines = table({}, methods | {"A": Method("a", "--x 2")}, second)
    assert [line[2] for line in lines[1:]] == ["B", "C"]


def test_the_page_of_benchmarks_is_what_their_numbers_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import page

    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == page.text(), "run python -m benchmarks.page"
