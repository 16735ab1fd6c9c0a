"""Fetch SD 1.5's weights into data/: `python sd/download.py`.

The file grows as NAME.part, is checked by its sha256 and only then renamed, so NAME is whole or not there. A download
that was cut off, in whatever way, goes on where it stopped when the same command is run again. Any other file can be
fetched with --url, --sha256 and --out. Only the standard library and tqdm are needed.
"""

import argparse
import email.utils
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

DATA = Path(__file__).resolve().parent.parent / "data"
REPOSITORY = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
CHUNK = 2**20
SILENCE = 30.0
"""Seconds without a byte after which a connection counts as lost."""

RETRIES = 6
LONGEST_PAUSE = 120.0
SLOWEST = 1024, 60.0
"""Bytes a second, over so many seconds, under which a connection counts as lost."""

KEPT_FREE = 256 * 2**20
"""Bytes that a body without a known end leaves on the disk."""

RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Source:
    """What to fetch. sha256 in lower-case hexadecimal; size in bytes, None if only the server knows it."""

    url: str
    sha256: str
    size: int | None = None

    @property
    def name(self) -> str:
        return Path(urllib.parse.urlsplit(self.url).path).name


FORMATS = {
    "safetensors": Source(
        REPOSITORY + "v1-5-pruned-emaonly.safetensors",
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        4_265_146_304,
    ),
    "ckpt": Source(
        REPOSITORY + "v1-5-pruned-emaonly.ckpt",
        "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
    ),
}


class DownloadError(Exception):
    """Why the file could not be fetched and what to do about it, in one line."""


class _WrongBytesError(Exception):
    """What came, or would come, is not the file."""


class _InterruptedError(Exception):
    """A failure that may pass. after: seconds that the server asks to be left alone, if it does."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


def download(
    source: Source,
    path: Path,
    retries: int = RETRIES,
    first_pause: float = 1.0,
    silence: float = SILENCE,
    pause: Callable[[float], None] = time.sleep,
) -> bool:
    """Fetch a file to path unless it is there and right; returns whether anything was fetched.

    retries: failures in a row, without a byte between them, after which it gives up; before each it waits
        first_pause seconds, then twice that, and so on, or as long as the server's Retry-After says.
    Raises DownloadError, also for a file at path with another sha256: that is somebody's own, and stays.
    """
    if path.exists():
        _check_is(source, path)
        return False
    with _locked_part(path) as part:
        for last in (False, True):
            try:
                _fill(source, part, _Patience(retries, first_pause, pause), silence)
                _check_hash(source, part)
            except _WrongBytesError as error:
                part.truncate(0)
                if last:
                    _part_path(path).unlink()
                    raise DownloadError(f"{source.url} does not hold the right file: {error}") from None
                _tell(f"{error}; fetching it anew")
            else:
                break
        os.fsync(part.fileno())
        os.replace(_part_path(path), path)
    return True


def _check_is(source: Source, path: Path) -> None:
    if not path.is_file():
        raise DownloadError(f"{path} is there and is not a file; name another one with --out")
    with path.open("rb") as file:
        try:
            _check_hash(source, file)
        except _WrongBytesError as error:
            raise DownloadError(f"{path} is there and is another file ({error}); move it away first") from None


def _check_hash(source: Source, file: BinaryIO) -> None:
    """All of it from the start, so that what an earlier run fetched is checked too."""
    file.seek(0, os.SEEK_END)
    if source.size is not None and file.tell() != source.size:
        raise _WrongBytesError(f"{file.tell()} bytes, not {source.size}")
    file.seek(0)
    if (found := hashlib.file_digest(file, "sha256").hexdigest()) != source.sha256:
        raise _WrongBytesError(f"sha256 {found[:12]}..., not {source.sha256[:12]}...")


# ---- the part file


def _part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


@contextmanager
def _locked_part(path: Path) -> Iterator[BinaryIO]:
    """The part file, open for reading and appending, which no other download has open."""
    part_path = _part_path(path)
    try:
        # Not through a link, to somebody's file: appending would write to that.
        part = open(part_path, "a+b", buffering=0, opener=_not_through_links)  # noqa: SIM115
    except OSError as error:
        if part_path.is_symlink():
            raise DownloadError(f"{part_path} is a link, which is not followed; remove it") from None
        raise DownloadError(f"{part_path} cannot be written ({error.strerror})") from None
    with part:
        _lock(part, part_path)
        yield part


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock(part: BinaryIO, part_path: Path) -> None:
    """The kernel drops the lock with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads at once are caught by the sha256 only
        return
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DownloadError(f"another download is writing {part_path}; wait for it or stop it") from None
    if not part_path.exists() or not os.path.samestat(os.fstat(part.fileno()), part_path.stat()):
        raise DownloadError(f"another download has just finished {part_path}; run this again")


# ---- one file over several connections


class _Patience:
    """Counts failures in a row and waits longer after each."""

    def __init__(self, retries: int, first_pause: float, pause: Callable[[float], None]):
        self.retries = retries
        self.first_pause = first_pause
        self.pause = pause
        self.failures = 0

    def failed(self, error: _InterruptedError, progressed: bool) -> None:
        """Wait, or raise DownloadError when there have been too many."""
        self.failures = 1 if progressed else self.failures + 1
        if self.failures > self.retries:
            raise DownloadError(f"gave up after {self.failures} failures in a row: {error}; run it again to go on")
        seconds = self.first_pause * 2 ** (self.failures - 1) if error.after is None else error.after
        seconds = min(seconds, LONGEST_PAUSE)
        _tell(f"{error}; trying again in {seconds:g} s")
        self.pause(seconds)


def _fill(source: Source, part: BinaryIO, patience: _Patience, silence: float) -> None:
    """Append to the part file until it is complete."""
    etag = ""
    with _progress_bar(source) as bar:
        while True:
            have = part.seek(0, os.SEEK_END)
            if source.size is not None and have >= source.size:
                return
            try:
                with _open(source, have, etag, silence) as response:
                    etag = _strong_etag(response) or etag
                    total = _prepare(source, part, have, response)
                    bar.total, bar.n = total, part.seek(0, os.SEEK_END)
                    bar.refresh()
                    _copy(response, part, total, bar.update)
                return
            except _Complete:
                return
            except _InterruptedError as error:
                patience.failed(error, progressed=part.seek(0, os.SEEK_END) > have)


class _Complete(Exception):
    """The server says that there is nothing after what we have."""


def _open(source: Source, have: int, etag: str, silence: float) -> http.client.HTTPResponse:
    """The response to a request for all after the first `have` bytes.

    The ETag of this run's earlier connections makes the server send the whole file if it has changed since. Across
    runs the sha256 is the judge.
    """
    headers = {"User-Agent": "sd-download/1.0", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag
    try:
        request = urllib.request.Request(source.url, headers=headers)
        return urllib.request.build_opener(_OnlyHttp).open(request, timeout=silence)
    except urllib.error.HTTPError as error:
        raise _status_error(source, error, have) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, socket.gaierror):
            host = urllib.parse.urlsplit(source.url).hostname
            raise DownloadError(f"{host} cannot be found ({reason.strerror}): is this machine online?") from None
        raise _InterruptedError(f"{source.url}: {reason}") from None


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Redirects lead to no other kind of address."""

    def redirect_request(self, request, fp, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise DownloadError(f"{request.full_url} leads to {url[:200]}, which is no http address")
        return super().redirect_request(request, fp, code, message, headers, url)


def _status_error(source: Source, error: urllib.error.HTTPError, have: int) -> Exception:
    if error.code == 416:
        total = _number(r"bytes \*/(\d+)", error.headers.get("Content-Range"))
        return _Complete() if total in (None, have) else _WrongBytesError(f"{have} bytes, not {total}")
    told = f"{source.url}: {error.code} {error.reason}"
    if error.code in RETRIED_STATUS:
        return _InterruptedError(told, _retry_after(error.headers.get("Retry-After")))
    return DownloadError(told)


def _prepare(source: Source, part: BinaryIO, have: int, response: http.client.HTTPResponse) -> int | None:
    """Make the part file end where the response begins; returns the size of the whole, or None if nobody knows it.

    Raises _WrongBytesError if the server's file has another size, DownloadError if the disk cannot hold it.
    """
    begins, total = 0, _number(r"(\d+)$", response.headers.get("Content-Length"))
    if response.status == 206:
        content_range = response.headers.get("Content-Range")
        begins, total = _number(r"bytes (\d+)-", content_range), _number(r"/(\d+)$", content_range)
        if begins != have:
            raise _WrongBytesError(f"the server answers a request for bytes {have}- with {content_range}")
    elif have:
        _tell("the server does not resume; starting over")
        part.truncate(0)
    if source.size is not None and total not in (None, source.size):
        raise _WrongBytesError(f"the server's file has {total} bytes, not {source.size}")
    if total is not None:
        _check_space(Path(part.name).parent, total - begins)
    return total or source.size


def _check_space(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DownloadError(f"{folder} has {free / 1e9:.2f} GB free; {needed / 1e9:.2f} GB are needed")


def _copy(
    response: http.client.HTTPResponse, part: BinaryIO, total: int | None, on_bytes: Callable[[int], object]
) -> None:
    """Append the body. Raises _InterruptedError if it ends early or trickles, _WrongBytesError if it is too long.

    One without a known end leaves KEPT_FREE bytes on the disk: DownloadError.
    """
    since, bytes_since = time.monotonic(), 0
    try:
        while chunk := response.read1(CHUNK):  # what there is: a trickle would fill CHUNK in a week
            _write(part, chunk)
            on_bytes(len(chunk))
            bytes_since += len(chunk)
            if (seconds := time.monotonic() - since) > SLOWEST[1]:
                if bytes_since < SLOWEST[0] * seconds:
                    raise _InterruptedError(f"{bytes_since} bytes came in {seconds:.0f} seconds")
                since, bytes_since = time.monotonic(), 0
            if total is None and shutil.disk_usage(Path(part.name).parent).free < KEPT_FREE:
                told = f"the disk is all but full after {part.tell()} bytes of a body without a known end"
                part.truncate(0)
                raise DownloadError(told)
            if total is not None and part.tell() > total:
                raise _WrongBytesError(f"more than {total} bytes came")
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"the connection broke ({error or type(error).__name__})") from None
    if total is not None and part.tell() < total:
        raise _InterruptedError(f"the connection ended after {part.tell()} of {total} bytes")


def _write(part: BinaryIO, chunk: bytes) -> None:
    try:
        while chunk:
            chunk = chunk[part.write(chunk) :]
    except OSError as error:
        raise DownloadError(f"{part.name} cannot be written ({error.strerror}); it will be resumed") from None


# ---- headers


def _strong_etag(response: http.client.HTTPResponse) -> str:
    etag = response.headers.get("ETag", "")
    return "" if etag.startswith("W/") else etag  # RFC 9110, 13.1.5: a weak one does not stand for bytes


def _retry_after(header: str | None) -> float | None:
    """Seconds: the header gives them, or a date. None without the header or with nonsense in it."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _number(pattern: str, header: str | None) -> int | None:
    found = re.search(pattern, header or "")
    return int(found[1]) if found else None


# ---- what is told on the way


def _tell(message: str) -> None:
    """A line on stderr, above the bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


@contextmanager
def _progress_bar(source: Source) -> Iterator:
    from tqdm import tqdm

    with tqdm(desc=source.name, total=source.size, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        yield bar


# ---- the command line


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DownloadError(f"{message} (--help lists all options)")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _OneLineParser(prog="download.py", description="Fetch the weights of Stable Diffusion 1.5.")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="which file (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to, a file or a folder (data/)")
    parser.add_argument("--url", help="a mirror of the same file, or with --sha256 any other file")
    parser.add_argument("--sha256", metavar="HEX", help="of the file at --url")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> tuple[Source, Path]:
    """What to fetch and where to. Raises DownloadError."""
    source = FORMATS[args.format]
    if args.sha256 and not args.url:
        raise DownloadError("--sha256 is for another file: give its --url too")
    if args.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", args.sha256):
        raise DownloadError("--sha256 must be 64 hexadecimal digits")
    if args.url and not re.match("https?://[^/]", args.url):
        raise DownloadError(f"--url must begin with https:// or http://, not {args.url}")
    name = source.name
    if args.url:
        source = Source(args.url, (args.sha256 or source.sha256).lower(), None if args.sha256 else source.size)
        name = source.name if args.sha256 else name
    out = args.out or DATA
    path = out / name if out.is_dir() else out
    if not path.name or path.is_dir():
        raise DownloadError(f"--out: {path} is a folder; name the file")
    if not path.parent.is_dir():
        raise DownloadError(f"--out: there is no folder {path.parent}")
    return source, path


def main(argv: list[str] | None = None) -> int:
    """0 when the file is there and right, 2 after one line on stderr for an error, 130 after Ctrl-C."""
    try:
        source, path = chosen(parse_arguments(argv))
        fetched = download(source, path)
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    except (DownloadError, OSError) as error:
        shown = "".join(c if c.isprintable() else " " for c in str(error))  # a server's words are among them
        print(f"error: {' '.join(shown.split())}", file=sys.stderr)
        return 2
    print(f"{path}  {path.stat().st_size / 1e9:.2f} GB, sha256 is right{'' if fetched else ', was there already'}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not sd/, where modules could shadow packages
    raise SystemExit(main())
