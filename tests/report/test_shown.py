"""What a report shows: page, drawings, Markdown, LaTeX and terminal."""

import csv
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from support.reports import ER, FINETUNE, check_page, content, parsed, put, two_methods

from cl_lightning.report import command, comparison, page, runs, tables
from cl_lightning.report.comparison import compare

# ---------------------------------------------------------------------- shown

EVIL = '<script>alert("x")</script>'


def test_a_page_needs_nothing_outside_of_it_and_names_each_element_once():
    for compared in (compare(two_methods()), compare([parsed()]), compare([parsed(ER, s) for s in range(2)])):
        check_page(page.render(compared))


def test_names_are_escaped_everywhere():
    names = [f"{EVIL}{index}" for index in range(6)]
    one, other = parsed(ER, classes=names, options={"mix": EVIL}), parsed(FINETUNE, classes=names)
    one = runs.replace(one, strategy=f"a.{EVIL}", name=EVIL)
    for compared in (compare([one]), compare([one, other])):
        found = check_page(page.render(compared))
        assert any(EVIL in text for text in found.data)


def test_large_streams_become_images_with_the_same_page_around_them():
    data = content(tasks=30, size=3, finished=0)
    accuracy = [[0.5 if i <= t else None for i in range(30)] for t in range(30)]
    data |= {
        "finished": 30,
        "matrix": {"R_ci": accuracy, "R_ti": accuracy},
        "measures_per_task": [{"average_accuracy": 0.5} for _ in range(30)],
        "per_class": [0.5] * 90,
        "confusion": [[1] * 90 for _ in range(90)],
    }
    found = check_page(page.render(compare([runs.parse(data, Path("big"))])))
    assert found.tags.count("image") >= 3


def test_drawings_have_titles_text_and_the_colours_of_the_page():
    html = page.render(compare(two_methods()))
    drawings = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.S)]
    plots = [drawing for drawing in drawings if drawing.get("role") == "img"]
    assert len(plots) >= 5
    for plot in plots:
        title = plot.find("title")
        assert title is not None
        assert title.text
        assert plot.get("aria-labelledby") == title.get("id")
        assert plot.findall(".//text")
        assert plot.get("viewBox")
    assert not re.search(r"(?:fill|stroke): #", html)  # all colours are variables, or that of the text
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_the_same_runs_make_the_same_page():
    assert page.render(compare(two_methods())) == page.render(compare(two_methods()))


def test_markdown_is_a_table_and_names_cannot_break_it():
    run = runs.replace(parsed(), strategy="a.b|c<i>")
    lines = tables.markdown(tables.outcome(compare([run]))).splitlines()
    assert lines[2].startswith("| method | runs | last accuracy (%) |")
    assert lines[4].startswith(r"| b\|c&lt;i&gt; | 1 |")


def test_latex_has_the_rules_of_booktabs_and_escapes():
    run = runs.replace(parsed(), strategy="a.b_c&d%")
    text = tables.latex(tables.outcome(compare([run])))
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"b\_c\&d\% & 1 &", r"last accuracy (\%)", "$-$"):
        assert part in text
    assert "±" not in text


def test_terminal_table_shows_names_as_they_are_at_any_width():
    compared = compare([runs.replace(parsed(), strategy="a.[red]x"), *two_methods(2)[:2]])
    for width in (60, 80, 200):
        buffer = io.StringIO()
        tables.print_rich([tables.outcome(compared)], Console(file=buffer, width=width, force_terminal=True))
        assert "[red]x" in buffer.getvalue()
        assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", buffer.getvalue()).splitlines())) <= width


def test_a_pipe_gets_whole_lines(capsys, tmp_path):
    for index, run in enumerate((content(FINETUNE), content(ER))):
        put(tmp_path / str(index), run)
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.html"), "--format", "latex"]) == 0
    out, err = capsys.readouterr()
    assert err == f"report: {tmp_path / 'page.html'}\n"
    assert out.startswith(r"\begin{table}")
    compared = command.read([str(tmp_path)])
    for form in command.FORMATS:
        command.show(compared, form)
        out, err = capsys.readouterr()
        assert out.splitlines()[0]
        assert err == ""
        assert "…" not in out
    rows = list(csv.reader(io.StringIO(out)))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 3


def test_numbers_have_the_unit_of_their_column():
    assert tables.scale_of([3.0, 7200.0], "seconds") == (3600.0, "h")
    assert tables.scale_of([3.0], "seconds") == (1.0, "s")
    assert tables.scale_of([0.0], "bytes") == (1.0, "B")
    assert tables.scale_of([5.0, 3 * 2**20], "bytes") == (2.0**20, "MiB")
    assert tables.digits(-0.0004, 0.01, "percent", signed=True) == "0.0"
    assert tables.digits(-0.25, 0.01, "percent") == "\N{MINUS SIGN}25.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RUN"),
        (["x", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["x", "--colour"], "unrecognized arguments: --colour"),
        (["no such folder"], "no such folder: there is no such folder"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, message):
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_page_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path, capsys):
    put(tmp_path / "run", content())
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        assert command.main([str(tmp_path / "run"), "--output", str(place)]) == 2
        assert "--output" in (err := capsys.readouterr().err) or "cannot be written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_write_makes_the_page_from_python(tmp_path):
    put(tmp_path / "run", content())
    path = command.write([tmp_path / "run"], tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_fields_are_shown_as_on_the_command_line():
    assert comparison.shown("model.init_args.optimizer.class_path") == "model.optimizer"
    assert comparison.shown("data.init_args.batch_size") == "data.batch_size"
