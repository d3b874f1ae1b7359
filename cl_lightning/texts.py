"""Names as a terminal shows them."""

import re

# Of terminals (colours, cursor), lines and the direction of writing, and halves of characters, which no file can hold.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with a mark in place of each character that would do something else than show itself.

    Names of classes and files come from data that others have made.
    """
    return _CONTROL.sub("\ufffd", text)
