"""The service on this machine: `python -m sd.serve`, and what any other host of it needs.

It listens on a loopback address; elsewhere only with a password, SD_AUTH=basic with SD_USER and SD_PASSWORD. The app
is in sd/service/app.py, which alone imports the web framework.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sd import inference
from sd.pictures.model import ModelChoice, add_model_options, add_speed_options
from sd.pictures.parameters import OneLineParser, UserError
from sd.service.access import auth_from_env, is_loopback
from sd.service.orders import Limits, limits_from_env

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True)
class Address:
    host: str
    port: int


# ---- arguments


def parse_arguments(argv: list[str] | None = None) -> tuple[Address, Limits, ModelChoice]:
    parser = OneLineParser(
        prog="serve.py",
        description="Serve pictures over HTTP: POST /generate, GET /healthz, and a page at /.",
        epilog="SD_AUTH=basic with SD_USER and SD_PASSWORD asks for a password; any --host but loopback needs it.",
    )
    where = parser.add_argument_group("where").add_argument
    where("--host", default="127.0.0.1", metavar="ADDRESS", help="(%(default)s)")
    where("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    add_model_options(parser.add_argument_group("the model").add_argument)
    add_speed_options(parser.add_argument_group("speed").add_argument)
    _add_limits(parser.add_argument_group("the most that is taken ($SD_MAX_STEPS and so on)").add_argument)
    args = parser.parse_args(argv)
    return inference.options(Address, args), inference.options(Limits, args), inference.options(ModelChoice, args)


def _add_limits(add: Callable[..., object]) -> None:
    given = limits_from_env(os.environ)
    for one in fields(Limits):
        text = f"{one.metadata['help']} (%(default)s)"
        add("--" + one.name.replace("_", "-"), type=int, default=getattr(given, one.name), metavar="N", help=text)


# ---- the address


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises UserError."""
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo 2**16
        raise UserError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol, asyncio switches Nagle's algorithm off: answers on a kept connection would wait 40 ms.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(
            f"{host} port {port} cannot be used ({error.strerror or error}); --host and --port name another"
        ) from None
    return sock


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


# ---- the run


def run(address: Address, limits: Limits, model: ModelChoice) -> None:
    """Check, bind, load, serve until Ctrl-C. Raises UserError for what the caller got wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sd").setLevel(logging.INFO)
    auth, host = auth_from_env(os.environ), address.host
    if not auth and not is_loopback(host):
        raise UserError(f"--host {host} is open to others: it needs SD_AUTH=basic, SD_USER and SD_PASSWORD")
    with bind(host, address.port) as sock:
        from sd.service import app  # here: a package that is missing is told before the weights are read

        checkpoint = model.checkpoint()
        pipe = model.load(checkpoint)
        facts = model.facts(pipe, checkpoint)
        # A page elsewhere can point its own name at 127.0.0.1 and so read the answers: the Host header tells.
        hosts = None if auth else {"localhost", "127.0.0.1", "::1", host.lower()}
        made = app.create_app(pipe, limits, auth, facts, hosts)
        sock.listen(128)
        print(f"{facts['model']} on {facts['device']}: {url(sock)}", flush=True)
        serve(made, sock)


def serve(app: "FastAPI", sock: socket.socket) -> None:
    """Answer on the socket until a signal ends the process, at once: nothing is being written that it could spoil."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, ws="none")
    Server(config).run(sockets=[sock])


def main(argv: list[str] | None = None) -> int:
    """2 after one line on stderr for what the caller can put right, 130 after Ctrl-C."""
    return inference.exit_code(lambda: run(*parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, inference.leave)
    raise SystemExit(main())
