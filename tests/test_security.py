"""Files of others are data: nothing in them is run, leads outside or acts on a page. No key of an account is kept."""

import ast
import csv
import io
import json
import re
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import ROOT
from support.reports import check_page, content

from cl_lightning.cli import main
from cl_lightning.loop import results
from cl_lightning.report import command, page, runs, tables
from cl_lightning.report.comparison import compare
from cl_lightning.stream import ClassIncremental, DatasetInfo, FromManifest

SOURCES = sorted(
    path for part in ("cl_lightning", "callbacks", "datamodules") for path in (ROOT / part).rglob("*.py")
)  # the two links inside cl_lightning are not followed
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# The conformance suite hands strategies to the processes that it starts itself, through a folder that it makes itself.
OWN_PICKLES = {"cl_lightning/testing/pair.py"}


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of such an expression; else what it ends with."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(*wanted: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls of functions by the end of their dotted names."""
    for place, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.search(
                rf"(^|\.)({'|'.join(map(re.escape, wanted))})$", name_of(node.func)
            ):
                yield f"{place}:{node.lineno}", node


def given(call: ast.Call, keyword: str) -> Any:
    """Value of a keyword, where it is written out."""
    found = [entry.value for entry in call.keywords if entry.arg == keyword]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


# ---------------------------------------------------------------------- the sources


def test_the_sources_are_found() -> None:
    assert {"cl_lightning/loop/checkpoint.py", "callbacks/distillation.py", "datamodules/npz.py"} <= set(TREES)
    assert len(list(calls("np.load"))) >= 1
    assert len(list(calls("torch.load"))) >= 2


def test_no_text_is_run_as_code() -> None:
    for place, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), f"{place}:{node.lineno}"
    assert list(calls("os.system", "os.popen", "getoutput", "getstatusoutput", "literal_eval")) == []
    for place, call in calls("Popen", "subprocess.run", "check_call", "check_output", "subprocess.call"):
        assert given(call, "shell") is None, place  # arguments one by one


def test_nothing_is_unpickled() -> None:
    found = calls("pickle.load", "pickle.loads", "Unpickler", "joblib.load", "dill.load", "shelve.open", "read_pickle")
    assert {place.partition(":")[0] for place, _ in found} <= OWN_PICKLES
    for place, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert {alias.name for alias in node.names} <= {"UnpicklingError"}, place


def test_arrays_checkpoints_and_configurations_are_loaded_as_data() -> None:
    for place, call in calls("np.load", "numpy.load"):
        assert given(call, "allow_pickle") is False, place
    for place, call in calls("torch.load", "load_from_checkpoint", "trainer.fit"):
        assert given(call, "weights_only") is True, place
    unsafe = calls("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "OmegaConf.load", "fromregex")
    assert list(unsafe) == []


def test_no_archive_is_unpacked() -> None:
    # torchvision unpacks what it has downloaded itself, after a look at the checksum.
    assert list(calls("extractall", "extract", "unpack_archive", "tarfile.open", "gzip.open")) == []


def test_pages_escape_what_they_show() -> None:
    environments = list(calls("Environment"))
    assert environments
    for place, call in environments:
        assert given(call, "autoescape") is True, place
    for template in (ROOT / "cl_lightning" / "report" / "templates").glob("*.html"):
        text = template.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape", text)
        assert not re.search(r"(href|src)=\"?\{\{|<script", text)
    for place, call in calls("Markup"):
        # A text of the source, or what an XML writer has escaped.
        source = ast.unparse(call.args[0])
        assert isinstance(call.args[0], ast.Constant) or source.startswith("ElementTree.tostring("), place


# ---------------------------------------------------------------------- paths


def test_a_manifest_holds_no_path_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = DatasetInfo(np.arange(6) % 3, np.arange(3), ("../../etc", "/etc/passwd", "c"))
    stream = ClassIncremental(increment=1)(catalogue, seed=0)
    data = stream.to_dict()
    data["scenario"] = {
        "class_path": "os.system",
        "init_args": {"path": "../../etc/passwd", "index_lists": "/etc/passwd", "command": "touch hacked"},
    }
    path = tmp_path / "stream.json"
    path.write_text(json.dumps(data))
    opened: list[str] = []
    original = io.open
    monkeypatch.setattr(
        io, "open", lambda file, *rest, **named: (opened.append(str(file)), original(file, *rest, **named))[1]
    )
    found = FromManifest(str(path))(catalogue, seed=0)
    assert opened == [str(path)]
    assert found.hashes == stream.hashes


# ---------------------------------------------------------------------- keys of accounts, and hostile names

KEY = "sk-0123456789abcdefghij"
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b & c",
    '=HYPERLINK("x")',
    "[/b]\\textbf{}_$x$%",
    "\x1b[31m\ud800\n",
    "'\"--><!--",
]


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line on classes with hostile names, with keys in the environment and in an option."""
    folder = tmp_path_factory.mktemp("hostile")
    labels = np.repeat(np.arange(len(HOSTILE)), 4)
    images = (labels * 40).astype(np.uint8)[:, None, None] + np.zeros((1, 4, 4), np.uint8)
    names = np.array(HOSTILE)
    np.savez(folder / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, class_names=names)
    (folder / "notifying.py").write_text(
        "from lightning.pytorch import Callback\n\n"
        "class Notify(Callback):\n"
        "    def __init__(self, api_key: str, url: str, hub_token: int, texts: list[str]):\n"
        "        self.api_key, self.url, self.hub_token, self.texts = api_key, url, hub_token, texts\n"
    )
    options = {"api_key": f"{KEY}1", "url": f"host:80/?k={KEY}2", "hub_token": 87654321, "texts": [f"x {KEY}3"]}
    config = {
        "trainer": {"max_epochs": 1, "callbacks": [{"class_path": "notifying.Notify", "init_args": options}]},
        "model": {"class_path": "ER", "init_args": {"memory_size": 4}},
        "data": {
            "class_path": "NpzData",
            "init_args": {
                "path": str(folder / "data.npz"),
                "scenario": {"class_path": "ClassIncremental", "init_args": {"tasks": 2}},
            },
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        for index, name in ((2, "OTHER_API_KEY"), (3, "HF_TOKEN"), (4, "WANDB_API_KEY")):
            patch.setenv(name, f"{KEY}{index}")
        patch.setenv("SHORT_API_KEY", "1")  # would be found in every number
        code = main(["fit", "--config", "config.yaml", "--run_dir", "run", "--trainer.default_root_dir", f"/x/{KEY}4"])
    assert code == 0
    return folder / "run"


def test_keys_of_accounts_are_in_no_file_of_a_run(hostile_run: Path) -> None:
    files = [path for path in hostile_run.rglob("*") if path.is_file()]
    assert {"config.yaml", "results.json", "report.html", "last.ckpt", "metrics.csv"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert KEY.encode() not in content, path
        assert b"87654321" not in content, path
    config = yaml.safe_load((hostile_run / "config.yaml").read_text())
    saved = torch.load(hostile_run / "checkpoints" / "last.ckpt", weights_only=True)["cl_lightning"]["config"]
    assert yaml.safe_load(saved) == config == json.loads((hostile_run / "results.json").read_text())["config"]
    given = config["trainer"]["callbacks"][0]["init_args"]
    assert given == {
        "api_key": "(removed)",
        "url": "host:80/?k=(removed)",
        "hub_token": "(removed)",
        "texts": ["x (removed)"],
    }
    assert config["model"]["init_args"]["memory_size"] == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"wandb_api_key": "abc"}, {"wandb_api_key": "(removed)"}),
        ({"a": [{"password": "p", "secret": 12345}]}, {"a": [{"password": "(removed)", "secret": "(removed)"}]}),
        ({"use_auth_token": True, "api_key": None}, {"use_auth_token": True, "api_key": None}),
        ({"private_key": ""}, {"private_key": ""}),
        ({"class_token": "cls", "keys": ["a"], "tokens": 3}, {"class_token": "cls", "keys": ["a"], "tokens": 3}),
        ({"x": 'it\'s "quoted" and ' + "long " * 40}, {"x": "(removed)"}),
        ({"x": [1.5, float("inf"), "1"]}, {"x": [1.5, float("inf"), "1"]}),
        *(
            ({"a": {name: "v"}}, {"a": {name: "(removed)"}})
            for name in (
                *("token", "TOKEN", "github_token", "bot-token", "hf_token", "accessToken", "wandb.token", "passwd"),
                *("PASSWORD", "db_password", "dbpassword", "passphrase", "pwd", "credentials", "aws_credential", "PAT"),
                *("github_pat", "DATABASE_URL", "redis_url", "postgres_uri", "dsn", "connection_string", "api_key"),
                *("apikey", "apiKey", "ssh_key", "client_secret", "authorization", "private_key", "secret_access_key"),
            )
        ),
        ({"credentials": {"a": "b"}, "passwords": ["x", "y"]}, {"credentials": "(removed)", "passwords": "(removed)"}),
        *(
            ({name: "v"}, {name: "v"})
            for name in ("path", "pattern", "patience", "passes", "one_pass", "num_tokens", "cls_token", "mask_token")
        ),
        *(
            ({name: "v"}, {name: "v"})
            for name in (
                "key",
                "keys",
                "prompt_tokens",
                "url",
                "tracking_uri",
                "author",
                "repeat",
                "tokenizer",
                "max_tokens",
            )
        ),
        ({"u": "postgres://me:p%40ss:w@host:5432/db"}, {"u": "postgres://me:(removed)@host:5432/db"}),
        ({"u": ["a http://:pw@host b redis://u:p@h"]}, {"u": ["a http://:(removed)@host b redis://u:(removed)@h"]}),
        ({"u": "https://ghp_0123456789abcdefghij@github.com/x"}, {"u": "https://(removed)@github.com/x"}),
        ({"u": "https://x.org/?a=1&token=t&b=2"}, {"u": "https://x.org/?a=1&token=(removed)&b=2"}),
        *(
            ({"u": text}, {"u": text})
            for text in (
                "https://host:8080/a@b",
                "git@github.com:x/y",
                "http://me@host/x",
                "a: b@c",
                "s3://bucket/k?v=1",
            )
        ),
        ({'it\'s "quoted" and ' + "long " * 40: 1}, {"(removed)": 1}),
    ],
)
def test_values_that_give_access_are_removed_and_no_others(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    monkeypatch.setenv("MY_SECRET", 'it\'s "quoted" and ' + "long " * 40)  # YAML writes it over several lines
    monkeypatch.setenv("SHORT_TOKEN", "1")
    monkeypatch.setenv("PWD", "v" * 8)
    text = yaml.safe_dump(config)
    clean = results.without_secrets(text)
    assert yaml.safe_load(clean) == expected
    assert clean == text or expected != config


@pytest.mark.parametrize(
    "name",
    ["GITHUB_PAT", "DATABASE_URL", "PGPASSWORD", "DB_PASS", "MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "ORG_CREDENTIALS"],
)
def test_values_of_secret_variables_are_removed_wherever_they_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "abcdefgh-and-more")
    monkeypatch.setenv("A_TOKEN", "abcdefgh")  # a part of the other
    text = yaml.safe_dump({"x": ["- abcdefgh-and-more -"]})
    assert yaml.safe_load(results.without_secrets(text)) == {"x": ["- (removed) -"]}


def test_hostile_names_do_nothing_on_the_page(hostile_run: Path) -> None:
    html = (hostile_run / "report.html").read_text(encoding="utf-8")
    found = check_page(html)
    assert any("<script>alert(1)</script>" in text for text in found.data)
    assert "<script" not in html
    assert "\x1b" not in html


def names_run(name: str) -> runs.Run:
    """A run in which everything that has a name has this one."""
    data = content(f"a.{name}", classes=[f"{name}{index}" for index in range(6)], options={name: name})
    for task in data["tasks"]:
        task["name"] = name
    data["versions"] = {name: name}
    data["hardware"] = {"device": name, "name": name, "system": name}
    data["protocol"] |= {"backbone": name, "augmentation": [name], "test_data_use": [name], "scenario": {name: name}}
    data["cost"]["bytes_kept"] = {name: 2048}
    data["continual_evaluation"]["measures"] = {name: 0.5}
    data["measures_per_task"] = [{**values, name: 0.5} for values in data["measures_per_task"]]
    return runs.parse(data, Path(name.replace("/", "")))


class Attributes(HTMLParser):
    """Collects attributes, and all that is no text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []
        self.declared: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += attrs

    def handle_comment(self, data: str) -> None:
        self.declared.append(data)

    def unknown_decl(self, data: str) -> None:
        self.declared.append(data)


@pytest.mark.parametrize(
    "name", [*HOSTILE, '" onload=alert(1) x="', "javascript:alert(1)", "</style></svg><b>", "{{ 7*7 }}"]
)
def test_no_name_gets_out_of_its_place_in_any_form_of_the_report(name: str) -> None:
    one, other = names_run(name), names_run(f"{name}2")
    for compared in (compare([one]), compare([one, other])):
        html = page.render(compared)
        check_page(html)
        assert "49" not in html or "{{" not in name or "{{ 7*7 }}" in html
        attributes = Attributes()
        attributes.feed(html)
        assert attributes.declared == []
        assert not any(key.startswith("on") for key, _ in attributes.found)
        assert not any(
            (value or "").startswith("javascript") for key, value in attributes.found if key in ("href", "src")
        )
        sheets = [tables.outcome(compared), *([tables.matrix(one)] if len(compared.runs) == 1 else [])]
        for sheet in sheets:
            lines = tables.markdown(sheet).splitlines()
            table = [line for line in lines if line.startswith("|")]
            assert len(table) == len(sheet.rows) + 2
            assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(sheet.columns) + 1}
            assert not re.search(r"<[a-z/!]", "\n".join(lines))
            latex = tables.latex(sheet)
            body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")].splitlines()[1:]
            assert len(body) == len(sheet.rows)
            for line in body:
                assert len(re.findall(r"(?<!\\)&", line)) == len(sheet.columns) - 1
                plain = re.sub(
                    r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|dots)\{\}", "", line
                )
                plain = plain.replace(r"\textquotedbl{}", "").replace("$-$", "").replace(r"$\pm$", "")
                assert not re.search(r"(?<!\\)[$%#_{}]", plain)
        rows = list(csv.reader(io.StringIO(tables.comma_separated(compared))))
        assert {len(row) for row in rows} == {len(rows[0])}
        for row in rows[1:]:
            for text in (row[0], row[1], row[6]):
                assert not text.startswith(("=", "+", "-", "@"))


def test_a_cell_that_would_be_a_formula_begins_with_an_apostrophe_and_numbers_stay_numbers() -> None:
    one, other = (runs.replace(names_run("x"), strategy=name) for name in ("=1+1", "@x"))
    rows = list(csv.reader(io.StringIO(tables.comma_separated(compare([one, other], baseline="@x")))))
    assert [row[1] for row in rows[1:]] == ["'=1+1", "'@x"]
    transfer = rows[0].index("backward_transfer")
    assert float(rows[1][transfer]) < 0


def test_a_report_on_files_of_others_writes_nothing_but_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    data = content(f"../../{HOSTILE[0]}")
    (tmp_path / "given" / "results.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    assert command.main(["given", "--output", "page.html"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["given", "page.html", "results.json"]
