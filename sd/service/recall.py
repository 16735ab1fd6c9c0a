"""What a picture says of how it was drawn, for the page: `POST /parameters`, a picture file in base64.

It is read as --from-png reads it, and only its head. What cannot be used on this server is told.
"""

import io
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from sd.pictures.formats import read_foreign, read_parameters
from sd.pictures.parameters import Parameter, check_parameter, recorded, shown
from sd.service.form import EXACT
from sd.service.orders import Limits, check_limit, json_object
from sd.service.uploads import decoded
from sd.service.worker import FailedError

OF_THE_MODEL = {"loras": "--lora", "embeddings": "--embedding", "vae": "--vae", "quantized": "--load-quantized"}
"""What a PNG says of files that the server was, or was not, started with."""


def recall(body: bytes, limits: Limits, facts: Mapping[str, object]) -> dict[str, object]:
    """{"parameters": those that can be asked for here, "notes": a line for each of the others}.

    facts: what pictures of this server say of its model. Raises FailedError for what is no picture, or says nothing.
    """
    try:
        data = decoded("file", json_object(body).get("file"))
    except ValueError as error:
        raise FailedError(422, str(error)) from None
    said, foreign = _said_by(data)
    found, notes = {}, [f"not taken over: {name} {value}"[:200] for name, value in foreign.items()]
    for one in (one for one in recorded() if said.get(one.name) is not None):
        try:
            found[one.name] = _usable(one, said[one.name], limits)
        except ValueError as error:
            notes.append(f"not taken over: {error}")
    return {"parameters": found, "notes": [*notes, *_other_model(said, facts)]}


def _said_by(data: bytes) -> tuple[dict[str, object], dict[str, str]]:
    try:
        return _read(io.BytesIO(data))
    except (OSError, SyntaxError):
        raise FailedError(422, "the file is no PNG, JPEG or WebP picture") from None
    except Exception:  # as a damaged head is
        raise FailedError(422, "the picture does not say how it was drawn") from None


def _read(file: BinaryIO) -> tuple[dict[str, object], dict[str, str]]:
    """Our parameters, and what is none by the names of AUTOMATIC1111's web UI."""
    try:
        return read_parameters(file), {}
    except ValueError:
        return read_foreign(file)


def _usable(one: Parameter, value: object, limits: Limits) -> object:
    """Raises ValueError."""
    if one.file or one.local:
        raise ValueError(f"{one.name}, a file that the picture does not hold")
    check_limit(one.name, value, limits)
    value = check_parameter(one.name, value)
    if isinstance(value, int) and value > EXACT:
        raise ValueError(f"{one.name} {value}, which has more digits than a web page can hold")
    return value


def _other_model(said: Mapping[str, object], facts: Mapping[str, object]) -> Iterator[str]:
    ours, theirs = facts.get("checkpoint_hash"), said.get("checkpoint_hash")
    if ours and theirs and ours != theirs:
        yield f"drawn with another model, {shown(said.get('checkpoint'))}: here it will look otherwise"
    for name, option in OF_THE_MODEL.items():
        if said.get(name) != facts.get(name):
            yield f"drawn with other {name} than this server's ({option}): here it will look otherwise"
