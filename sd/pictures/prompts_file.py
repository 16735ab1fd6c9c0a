"""Files of prompts, as text, JSON or tables: told by what they hold. Needs no torch."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from sd.pictures.parameters import PARAMETERS, UserError, checked

LARGEST = 64 << 20
"""Bytes of a prompts file: a million long prompts."""


class Entry(NamedTuple):
    """Own parameters of some pictures, and where they come from, to say in errors ("" for the command line)."""

    where: str
    parameters: Mapping[str, object]


def read_prompts(path: str | os.PathLike) -> list[Entry]:
    """The prompts of a UTF-8 file, "-" for standard input: one a line, or JSON, which is told by how it begins.

    JSON is an object of parameters a line, or an array of them and of prompts. A .csv file has a picture a row, and its
    first row names the parameters. Empty lines are skipped. Files that parameters name are those beside the file.
    Raises UserError, naming the file and the line, for what cannot be read.
    """
    path = Path(path)
    text, name = _text_of(path), "standard input" if str(path) == "-" else str(path)
    if path.suffix.lower() == ".csv":
        return [_beside(path, entry) for entry in _rows(name, text)]
    lines = [(f"{name} line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(where, line) for where, line in lines if line]
    if not lines:
        raise UserError(f"--prompts-file: {name} holds no prompt")
    as_lines = path.suffix.lower() in (".jsonl", ".ndjson")
    if not as_lines and text.lstrip().startswith(("{", "[")):
        found = _json_document(name, text)
        if found is not None:
            return [_beside(path, entry) for entry in found]
        as_lines = _begins_as_json(lines[0][1])
    if not as_lines:
        return [Entry(where, {"prompt": line}) for where, line in lines]
    return [_beside(path, Entry(where, _json_line(where, line))) for where, line in lines]


def _text_of(path: Path) -> str:
    if path.is_fifo() and not str(path).startswith("/dev/"):
        raise UserError(f"--prompts-file: {path} is a named pipe, which may have no end: write <(...) or -")
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"--prompts-file: {path} is over {LARGEST >> 20} MB")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--prompts-file: {path} cannot be read ({error.strerror or error})") from None


def _begins_as_json(line: str) -> bool:
    """Whether a line is an object, or one that was cut off; `{a|b} cat` and `[a:b:0.5]` are prompts."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return re.match(r'[\[{]\s*(["{]|$)', line) is not None


def _json_document(name: str, text: str) -> list[Entry] | None:
    """The items of an array, or one object over several lines; None where the text is no such whole."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(whole, dict) and "\n" not in text.strip():
        return None
    items = whole if isinstance(whole, list) else [whole]
    named = [(f"{name} item {number}", item) for number, item in enumerate(items, start=1)]
    entries = [Entry(where, _parameters(where, {"prompt": i} if isinstance(i, str) else i)) for where, i in named]
    if not entries:
        raise UserError(f"--prompts-file: {name} holds no prompt")
    return entries


def _rows(name: str, text: str) -> list[Entry]:
    """Of a table, as spreadsheets write it: an empty cell says nothing."""
    rows, entries = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        for row in rows:
            where = f"{name} line {rows.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than the first row has names")
            cells = {key.strip(): (cell or "").strip() for key, cell in row.items()}
            if cells := {key: _typed(key, cell) for key, cell in cells.items() if cell}:
                entries.append(Entry(where, _parameters(where, cells)))
    except csv.Error as error:
        raise UserError(f"{name} line {rows.line_num}: no table ({error})") from None
    if not entries:
        raise UserError(f"--prompts-file: {name} holds no prompt")
    return entries


def _typed(name: str, cell: str) -> object:
    """A cell as its parameter's type, where it looks like one; the others' check says what is wrong."""
    kind = PARAMETERS[name].check.kind if name in PARAMETERS else str
    if kind is bool:
        return {"true": True, "false": False}.get(cell.lower(), cell)
    if kind is str or not re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", cell):
        return cell
    try:
        return int(cell) if kind is int and cell.lstrip("+-").isdecimal() and len(cell) < 30 else float(cell)
    except ValueError:
        return cell


def _json_line(where: str, line: str) -> dict[str, object]:
    try:
        return _parameters(where, json.loads(line))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _parameters(where: str, values: object) -> dict[str, object]:
    if not isinstance(values, dict):
        raise UserError(f'{where}: not an object such as {{"prompt": "a fox", "steps": 30}}')
    if not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: it lacks "prompt"')
    return checked(where, values)


def _beside(path: Path, entry: Entry) -> Entry:
    """Files that it names, from the folder of the prompts file."""
    given = entry.parameters
    files = {name: str(path.parent / value) for name, value in given.items() if PARAMETERS[name].file}
    if "control" in given and path.parent != Path():
        pairs = (text.partition(":") for text in given["control"])
        files["control"] = tuple(f"{path.parent / net}:{path.parent / shown}" for net, _, shown in pairs)
    return Entry(entry.where, {**entry.parameters, **files})
