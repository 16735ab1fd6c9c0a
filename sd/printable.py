"""Texts of files and servers on their way to a terminal, which shows them and obeys nothing in them."""

import logging


def printable(text: str) -> str:
    """Without what a terminal would obey; line breaks stay."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


class Printable(logging.Formatter):
    """Of such texts."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
