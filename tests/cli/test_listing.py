"""The command ``methods``: filters, descriptions, and that it imports no torch."""

import json
import subprocess
import sys

import pytest

from cl_lightning import catalogue
from cl_lightning.cli import discovery, listing


def test_it_needs_no_torch():
    code = (
        "import sys; from cl_lightning.cli.main import main; main(['methods']); main(['methods', 'ER'])\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_the_table_is_what_the_code_says():
    code = discovery.catalogue()
    assert json.loads(json.dumps(code["entries"], default=list)) == catalogue.entries()


def test_a_line_for_each_method_under_its_family(run):
    lines = run("methods").out.splitlines()
    assert max(map(len, lines)) <= 80
    place = lines.index("baseline")
    assert lines[place + 1] == "--------"
    assert lines[place + 2].startswith("Finetune")
    assert any(line.startswith("ER  ") for line in lines)
    assert lines[-1].startswith(f"{len(discovery.strategies()) + len(discovery.callbacks())} methods")


def test_filters_choose_by_facts(run):
    def names(options):
        return {entry["name"] for entry in json.loads(run(f"methods {options} --format json").out)}

    assert {"ER", "ICaRL"} <= names("--family rehearsal --keeps exemplars")
    assert names("--family few_shot") == names("--family few-shot") >= {"TEEN"}
    assert "ER" not in names("--keeps no-exemplars")
    assert names("--targets pixels --family rehearsal") == {"ER"}
    assert "PASS" not in names("--inputs tokens")
    assert {"Digits", "NpzData"} <= names("--data")
    assert "ClassIncremental" in names("--scenarios")
    assert {"MLP", "ResNet32"} <= names("--backbones")
    assert "CosineHead" in names("--heads")
    assert "EMAEnsemble" in names("--callbacks")


def test_a_method_is_described_with_options_defaults_and_configs(run):
    out = run("methods LwF").out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("arXiv:1606.09282", "--model.distill_weight = 1.0", "lambda, at least 0.", "lwf_mc", "lr_factors"):
        assert text in out
    assert "--data.scenario.increment" in run("methods ClassIncremental").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lwf", "there is no class 'lwf'; did you mean LwF"),
        ("--family onlin", "--family 'onlin' is not known; use active, baseline"),
        ("--keeps memory", "--keeps 'memory' is not known; use exemplars"),
        ("--inputs video", "--inputs 'video' is not known"),
        ("--format html", "--format 'html' is not known; use table, markdown, json"),
        ("--fromat json", "'--fromat json' is not known; see"),
        ("--data --heads", "--heads lists parts; give it alone"),
    ],
)
def test_a_mistake_is_one_line(run, options, message):
    said = run(f"methods {options}")
    assert said.code == 2
    assert said.err.startswith(f"error: methods: {message}")


def test_none_is_said_where_nothing_fits():
    assert listing.table([]) == "none"
