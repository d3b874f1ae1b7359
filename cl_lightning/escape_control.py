"""Names of classes and files from foreign data, made safe to print."""

import re

# Control characters of terminals (colours, cursor), line breaks, marks of writing direction, and lone surrogates, which
# cannot be encoded in a file.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Replace each control character by U+FFFD, so that a terminal shows the text and executes nothing.

    Names of classes and files come from data that other people have made.

    Args:
        text: Any text, such as ``"cat\\x1b[2J"``, which would clear the screen.
    """
    return _CONTROL.sub("\ufffd", text)


def spreadsheet_cell(text: str) -> str:
    """A text for a cell of a CSV file: without control characters, and an apostrophe before what would be a formula."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def spreadsheet_path(path: str) -> str:
    """A path for a cell of a CSV file: without control characters, and ``./`` before what would be a formula."""
    text = printable(path)
    return f"./{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
