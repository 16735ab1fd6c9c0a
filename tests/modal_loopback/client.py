"""`modal ...` as a person types it, as a subprocess that can reach nothing but the loopback control plane."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.modal_loopback.plane import ControlPlane


def heed_interrupts() -> None:
    """Whatever runs the tests in the background may ignore Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Finished:
    code: int
    out: str
    errors: str

    @property
    def text(self) -> str:
        return self.out + self.errors


class Loopback:
    """A control plane and the client beside it. repository: where modal_*.py lie; cwd: where the command is typed."""

    def __init__(self, plane: ControlPlane, repository: Path, cwd: Path):
        self.plane = plane
        self.repository = repository
        self.cwd = cwd

    def start(self, command: str, script: str, *arguments: object, **environment: str) -> subprocess.Popen:
        """`modal COMMAND SCRIPT ARGUMENTS`, started."""
        line = [sys.executable, "-m", "modal", command, str(self.repository / script), *map(str, arguments)]
        return subprocess.Popen(
            line,
            cwd=self.cwd,
            env=self._environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )

    def run(self, command: str, script: str, *arguments: object, timeout: float = 300, **environment: str) -> Finished:
        """`modal COMMAND SCRIPT ARGUMENTS`, to its end."""
        process = self.start(command, script, *arguments, **environment)
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            out, errors = process.communicate()
            raise AssertionError(f"modal {command} hangs:\n{out}\n{errors}") from None
        return Finished(process.returncode, out, errors)

    def _environment(self) -> dict[str, str]:
        # An unset or empty address falls back to the real service.
        assert urlsplit(self.plane.url).hostname == "127.0.0.1"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "SD_"))}
        return kept | {
            "MODAL_SERVER_URL": self.plane.url,
            "MODAL_TOKEN_ID": "ak-loopback",
            "MODAL_TOKEN_SECRET": "as-loopback",
            "MODAL_CONFIG_PATH": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
