"""The service on this machine: `python -m sd.serve`, and what any other host of it needs.

It listens on a loopback address; elsewhere only with a password, SD_AUTH=basic with SD_USER and SD_PASSWORD. The app
is in sd/service/app.py, and uvicorn around it in sd/service/server.py.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sd import inference
from sd.pictures.model import ModelChoice, add_model_options, add_speed_options
from sd.pictures.parameters import OneLineParser, UserError
from sd.printable import Printable
from sd.service.access import auth_from_env, is_address, is_loopback
from sd.service.logs import AtMost
from sd.service.offers import Offers
from sd.service.orders import Limits, limits_from_env

if TYPE_CHECKING:
    from sd.service.app import Service
    from sd.service.server import Server


@dataclass(frozen=True)
class Hosting:
    """Where and how it is served. trusted_proxy: addresses whose X-Forwarded-For names the client. grace: seconds in
    which a drawing is finished after SIGTERM. log_prompts: the log may hold what clients write. opt_choices:
    optimizations that a request may ask for beside --opt, with commas between.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    trusted_proxy: Sequence[str] | None = None
    grace: float = 30.0
    log_prompts: bool = False
    opt_choices: str | None = None


# ---- arguments


def parse_arguments(argv: list[str] | None = None) -> tuple[Hosting, Limits, ModelChoice]:
    parser = OneLineParser(
        prog="serve.py",
        description="Serve pictures over HTTP: POST /generate, GET /healthz, GET /metrics, and a page at /.",
        epilog="SD_AUTH=basic with SD_USER and SD_PASSWORD asks for a password; any --host but loopback needs it.",
    )
    _add_hosting(parser.add_argument_group("where and how").add_argument)
    add_model_options(parser.add_argument_group("the model").add_argument)
    _add_speed(parser.add_argument_group("speed").add_argument)
    _add_limits(parser.add_argument_group("the most that is taken ($SD_MAX_STEPS and so on)").add_argument)
    args = parser.parse_args(argv)
    return inference.options(Hosting, args), inference.options(Limits, args), inference.options(ModelChoice, args)


def _add_hosting(add: Callable[..., object]) -> None:
    add("--host", default=Hosting.host, metavar="ADDRESS", help="(%(default)s)")
    add("--port", type=int, default=Hosting.port, metavar="N", help="0 takes a free one (%(default)s)")
    add(
        "--trusted-proxy",
        action="append",
        metavar="ADDRESS",
        help="a proxy whose X-Forwarded-For says who the client is; repeat it for several",
    )
    add(
        "--grace",
        type=float,
        default=Hosting.grace,
        metavar="SECONDS",
        help="after SIGTERM, to finish what is drawn (%(default)g)",
    )
    add("--log-prompts", action="store_true", help="write prompts into the log")


def _add_speed(add: Callable[..., object]) -> None:
    add_speed_options(add)
    add(
        "--opt-choices",
        metavar="NAMES",
        help="optimizations that a request may add to these, as deepcache=3,tgate=5: the page compares both",
    )


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


def run(hosting: Hosting, limits: Limits, model: ModelChoice) -> None:
    """Check, bind, load, serve until Ctrl-C or SIGTERM. Raises UserError for what the caller got wrong."""
    _start_log()
    auth, host = auth_from_env(os.environ), hosting.host
    check(hosting)
    model.check_files()
    choices = tuple(filter(None, (name.strip() for name in (hosting.opt_choices or "").split(","))))
    if not auth and not is_loopback(host):
        raise UserError(f"--host {host} is open to others: it needs SD_AUTH=basic, SD_USER and SD_PASSWORD")
    if choices:
        from sd import optimizations

        optimizations.check(choices)
    with bind(host, hosting.port) as sock:
        from sd.checkpoints.shrinking import on_bus_error
        from sd.service import app, server  # here: a package that is missing is told before the weights are read

        if __name__ == "__main__":
            on_bus_error(inference.leave_at_once)
        checkpoint = model.checkpoint()
        pipe = model.load(checkpoint)
        facts = model.facts(pipe, checkpoint)
        # A page elsewhere can point its own name at 127.0.0.1 and so read the answers: the Host header tells.
        hosts = None if auth else {"localhost", "127.0.0.1", "::1", host.lower()}
        made = app.create_app(pipe, limits, auth, facts, hosts, hosting.log_prompts, Offers(model.lora_dir, choices))
        sock.listen()
        print(f"{facts['model']} on {facts['device']}: {url(sock)}", flush=True)
        serving = server.Server(made, limits, hosting.grace, hosting.trusted_proxy or ())
        end_on_sigterm(serving)
        if __name__ == "__main__":
            on_bus_error(partial(park, made.state.service))
        serving.run(sockets=[sock])
    if made.state.service.lost:  # a thread may be parked, for which Python would wait
        sys.stderr.flush()
        os._exit(inference.fail(made.state.service.lost))


def park(service: "Service", message: str) -> NoReturn:
    """In the thread that draws, which cannot go on: the others answer those who wait, and end the server."""
    service.lose(message)
    while True:
        time.sleep(3600)


def check(hosting: Hosting) -> None:
    """Raises UserError."""
    if not 0 <= hosting.grace <= 3600:
        raise UserError(f"--grace must be from 0 to 3600 seconds, not {hosting.grace:g}")
    for address in hosting.trusted_proxy or ():
        if not is_address(address):
            raise UserError(f"--trusted-proxy must be an address such as 10.0.0.1, not {address!r}")


def end_on_sigterm(serving: "Server") -> None:
    """Ctrl-C goes on ending the process at once, and so does a second SIGTERM."""

    def end(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serving.should_exit = True

    signal.signal(signal.SIGTERM, end)


def _start_log() -> None:
    """Lines to stderr, so many in a while: who makes the server complain does not fill its disk."""
    handler = logging.StreamHandler()
    handler.addFilter(AtMost())
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("sd").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients get wrong has its line in the access log


def main(argv: list[str] | None = None) -> int:
    """2 after one line on stderr for what the caller can put right, 130 after Ctrl-C."""
    return inference.exit_code(lambda: run(*parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, inference.leave)
    raise SystemExit(main())
