"""The service on this machine: `python -m sd.serve`, and what any other host of it needs.

It listens on a loopback address; elsewhere only with a password, SD_AUTH=basic with SD_USER and SD_PASSWORD. The app
is in sd/service.py, which alone imports the web framework.
"""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sd import inference
from sd.jobs import OneLineParser, UserError
from sd.orders import Limits, limits_from_env

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sd.pipeline import StableDiffusion
    from sd.service import BasicAuth

__all__ = ["Limits", "auth_from_env", "create_app", "limits_from_env"]


def create_app(
    pipe: "StableDiffusion",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    auth: "BasicAuth | None" = None,
    facts: Mapping[str, object] | None = None,
    hosts: Collection[str] | None = None,
) -> "FastAPI":
    """`service.create_app`, where the arguments are described."""
    from sd import service

    return service.create_app(pipe, limits, auth, facts, hosts)


def auth_from_env(environ: Mapping[str, str]) -> "BasicAuth | None":
    """SD_AUTH=basic: the name and password in SD_USER and SD_PASSWORD. SD_AUTH=none or unset: None, the caller keeps
    strangers out. Raises UserError.
    """
    wanted = environ.get("SD_AUTH") or "none"
    if wanted == "none":
        return None
    if wanted != "basic":
        raise UserError(f"SD_AUTH must be basic or none, not {wanted!r}")
    from sd.service import BasicAuth

    user, password = environ.get("SD_USER", ""), environ.get("SD_PASSWORD", "")
    if not user or not password or ":" in user:
        raise UserError("SD_AUTH=basic needs SD_USER, without a colon, and SD_PASSWORD")
    return BasicAuth(user, password)


# ---- arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="serve.py",
        description="Serve pictures over HTTP: POST /generate, GET /healthz, and a page at /.",
        epilog="SD_AUTH=basic with SD_USER and SD_PASSWORD asks for a password; any --host but loopback needs it.",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(%(default)s)")
    where.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    inference.add_model_options(parser.add_argument_group("the model"))
    inference.add_speed_options(parser.add_argument_group("speed"))
    _add_limits(parser.add_argument_group("the most that is taken ($SD_MAX_STEPS and so on)"))
    return parser.parse_args(argv)


def _add_limits(group: argparse._ArgumentGroup) -> None:
    given = limits_from_env(os.environ)
    for one in fields(Limits):
        flag = "--" + one.name.replace("_", "-")
        text = f"{one.metadata['help']} (%(default)s)"
        group.add_argument(flag, type=int, default=getattr(given, one.name), metavar="N", help=text)


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})


# ---- the address


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises UserError."""
    if not 0 <= port < 2**16:  # getaddrinfo would take it modulo 2**16
        raise UserError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
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


def run(args: argparse.Namespace) -> None:
    """Check, bind, load, serve until Ctrl-C. Raises UserError for what the caller got wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sd").setLevel(logging.INFO)
    limits, auth = limits_of(args), auth_from_env(os.environ)
    if not auth and not is_loopback(args.host):
        raise UserError(f"--host {args.host} is open to others: it needs SD_AUTH=basic, SD_USER and SD_PASSWORD")
    with bind(args.host, args.port) as sock:
        from sd import service  # noqa: F401 (a package that is missing is told before the weights are read)

        checkpoint = inference.choose_checkpoint(args, {})
        pipe = inference.load_pipeline(args, checkpoint)
        facts = inference.facts(args, pipe, checkpoint)
        # A page elsewhere can point its own name at 127.0.0.1 and so read the answers: the Host header tells.
        hosts = None if auth else {"localhost", "127.0.0.1", "::1", args.host.lower()}
        app = create_app(pipe, limits, auth, facts, hosts)
        sock.listen(128)
        print(f"{facts['model']} on {facts['device']}: {url(sock)}", flush=True)
        serve(app, sock)


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
    return inference.exit_code(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, inference.leave)
    raise SystemExit(main())
