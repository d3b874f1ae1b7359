"""Writes the table of methods into the README, from the classes themselves: ``make docs``."""

from pathlib import Path

from cl_lightning.discovery import markdown

START, END = "<!-- methods -->", "<!-- /methods -->"


def main() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{markdown()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
