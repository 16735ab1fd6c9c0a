"""Who may ask the service, and what its answers allow a browser. Needs no web framework."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sd.pictures.parameters import UserError


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


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
