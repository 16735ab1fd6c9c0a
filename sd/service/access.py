"""Who may ask the service, and what its answers allow a browser. Needs no web framework."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sd.pictures.parameters import UserError

# ---- passwords


@dataclass(frozen=True)
class BasicAuth:
    """The one name and password that HTTP Basic must bring."""

    user: str
    password: str = field(repr=False)

    def accepts(self, authorization: str) -> bool:
        """Whether this Authorization header is the right one; the time does not tell how near it was."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, f"{self.user}:{self.password}".encode())


def auth_from_env(environ: Mapping[str, str]) -> BasicAuth | None:
    """SD_AUTH=basic: the name and password in SD_USER and SD_PASSWORD. SD_AUTH=none or unset: None, the caller keeps
    strangers out. Raises UserError.
    """
    wanted = environ.get("SD_AUTH") or "none"
    if wanted == "none":
        return None
    if wanted != "basic":
        raise UserError(f"SD_AUTH must be basic or none, not {wanted!r}")
    user, password = environ.get("SD_USER", ""), environ.get("SD_PASSWORD", "")
    if not user or not password or ":" in user:
        raise UserError("SD_AUTH=basic needs SD_USER, without a colon, and SD_PASSWORD")
    return BasicAuth(user, password)


# ---- guessing


def client_of(address: str) -> str:
    """Who an address stands for: itself, or of IPv6 the network of 64 bits, which is one customer's."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    found = getattr(found, "ipv4_mapped", None) or found
    return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


class Lockout:
    """Wrong passwords by client. Each is answered later than the one before; after some there is no answer for a while.

    While a client is locked out, its password is not looked at, so that it cannot be found by guessing on.
    """

    FREE = 10
    """Wrong ones in a row before a client is locked out."""
    FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0
    FIRST_LOCK, LONGEST_LOCK = 30.0, 900.0
    FORGOTTEN = 3600.0
    """Seconds without a wrong one."""
    REMEMBERED = 10_000
    """Clients, of which the one that was wrong longest ago is forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._wrong: dict[str, tuple[int, float]] = {}  # how many, and when the last; the oldest first

    def seconds_left(self, client: str) -> float:
        """For which the client is locked out: 0 if it is not. One without an address could be anybody."""
        count, last = self._wrong.get(client, (0, 0.0))
        if count < self.FREE or not client:
            return 0.0
        lock = min(self.FIRST_LOCK * 2 ** min(count - self.FREE, 20), self.LONGEST_LOCK)
        return max(0.0, last + lock - self._clock())

    def wrong(self, client: str) -> float:
        """Count one; returns the seconds after which to say so."""
        now = self._clock()
        count, last = self._wrong.pop(client, (0, now))
        count = 1 if now - last > self.FORGOTTEN else count + 1
        self._wrong[client] = count, now
        if len(self._wrong) > self.REMEMBERED:
            del self._wrong[next(iter(self._wrong))]
        return min(self.FIRST_DELAY * 2 ** min(count - 1, 20), self.LONGEST_DELAY)

    def right(self, client: str) -> None:
        self._wrong.pop(client, None)


# ---- names, and what a browser is told


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host.lower() == "localhost"


def host_name(host: str) -> str:
    """A Host header without its port: "[::1]:8000" -> "::1"."""
    named = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    return named[1].strip("[]").lower() if named else ""


def content_security_policy(html: str) -> str:
    """Nothing but the page's own script and style, its own server, and pictures made in the page."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
