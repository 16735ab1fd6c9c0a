"""A container: the real `modal._container_entrypoint` as a process that sees only what was uploaded.

Where mount namespaces are allowed, /root is made of the uploaded files with the volumes mounted in it, read-only where
the function says so. Elsewhere the same tree is a folder, and environment variables point there; then nothing enforces
the read-only mounts.
"""

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modal_proto import api_pb2

HOME = "/root"
"""Where Modal puts the entry script and where it runs."""


def namespaces_allowed() -> bool:
    """Whether a process may have mounts of its own here. LOOPBACK_NAMESPACES=0 says no."""
    return os.environ.get("LOOPBACK_NAMESPACES") != "0" and _can_mount()


@functools.cache
def _can_mount() -> bool:
    if not Path(HOME).is_dir():
        return False
    command = ["unshare", "-Urm", "mount", "--bind", "/tmp", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@dataclass
class Container:
    """What a container is made of; `start` makes it a process.

    files: paths in the container -> content and permission bits. volumes: mount path -> (folder, read-only).
    """

    task_id: str
    folder: Path
    arguments: api_pb2.ContainerArguments
    server_url: str
    files: Mapping[str, tuple[bytes, int]]
    environment: Mapping[str, str]
    volumes: Mapping[str, tuple[Path, bool]]
    namespace: bool = field(default_factory=namespaces_allowed)

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True)
        (self.folder / "arguments").write_bytes(self.arguments.SerializeToString())
        for path, (content, mode) in self.files.items():
            self._write(path, content, mode)
        command = [sys.executable, "-m", "modal._container_entrypoint"]
        if self.namespace:
            command = ["unshare", "-Urm", "bash", "-euc", self._script(command)]
        else:
            self._link_volumes()
        return subprocess.Popen(
            command,
            env=self._environment(),
            cwd="/" if self.namespace else self._inside(HOME),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def _inside(self, path: str) -> Path:
        """Where a path of the container lies here."""
        return self.folder / path.lstrip("/")

    def _write(self, path: str, content: bytes, mode: int) -> None:
        if not path.startswith(HOME + "/"):
            return  # Modal's own client, which is installed here
        file = self._inside(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(mode or 0o644)

    def _script(self, command: list[str]) -> str:
        """Shell commands: mount, then become the container."""
        lines = []
        for folder in _needed_under_home():  # the Python that runs all this may live in /root
            point = self._inside(str(folder))
            point.mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --rbind {shlex.quote(str(folder))} {shlex.quote(str(point))}")
        for path, (folder, read_only) in self.volumes.items():
            point = self._inside(path)
            point.mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(point))}")
            if read_only:
                lines.append(f"mount -o remount,bind,ro {shlex.quote(str(point))}")
        lines += [f"mount --rbind {shlex.quote(str(self._inside(HOME)))} {HOME}", f"cd {HOME}"]
        return "\n".join([*lines, f"exec {shlex.join(command)}"])

    def _link_volumes(self) -> None:
        for path, (folder, _) in self.volumes.items():
            point = self._inside(path)
            point.parent.mkdir(parents=True, exist_ok=True)
            point.symlink_to(folder)

    def _environment(self) -> dict[str, str]:
        home = HOME if self.namespace else str(self._inside(HOME))
        given = {name: value.replace(HOME, home) for name, value in self.environment.items()}
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": home,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            **given,
            "PYTHONPATH": home,
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": self.task_id,
            "MODAL_SERVER_URL": self.server_url,
            "MODAL_CONFIG_PATH": "/nonexistent",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self.folder / "arguments"),
            "MODAL_OVERRIDE_HEADERS": f"x-loopback-task: {self.task_id}",
        }


def _needed_under_home() -> list[Path]:
    """What the mount on /root would hide of this Python and its packages."""
    needed = {Path(sys.prefix), Path(sys.base_prefix), Path(api_pb2.__file__).parent.parent}
    return [folder for folder in sorted(needed) if folder.is_relative_to(HOME)]
