"""Put SD 1.5's weights into a Modal Volume, once: `modal run modal_volume.py`.

    modal run modal_volume.py                               v1-5-pruned-emaonly.safetensors, 4.27 GB
    modal run modal_volume.py --url URL --sha256 HEX        any other Stable Diffusion 1.x checkpoint
    modal run modal_volume.py --list
    modal run modal_volume.py --remove NAME

sd/download.py does it inside a container without a GPU: the file grows as NAME.part, is checked by its sha256 and only
then renamed, so NAME is whole or not there, and a download that was cut off goes on where it stopped. NAME.sha256 is
kept beside it: a second run reads that, and starts no container.
"""

import argparse
import sys
from pathlib import Path

import modal

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from sd import download  # noqa: E402

VOLUME = "sd-weights"
WEIGHTS = "/root/weights"
"""Where the volume is mounted."""

HOUR = 3600
TQDM = "tqdm==4.70.1"
"""As in requirements.txt, which a test compares; all that sd/download.py needs beside the standard library."""

app = modal.App("sd-volume")
weights = modal.Volume.from_name(VOLUME, create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install(TQDM)
    .env({"TQDM_MININTERVAL": "5"})  # a line of the log every five seconds, not ten a second
    .add_local_dir(HERE / "sd", "/root/sd", ignore=lambda path: path.suffix != ".py")
)


# One container: two would write one .part file. No retries by Modal: sd/download.py retries what may pass, and what
# does not pass, such as wrong bytes, would fail again. The default timeout of five minutes is too short for 4 GB.
@app.function(image=image, volumes={WEIGHTS: weights}, timeout=HOUR, max_containers=1, retries=0)
def fetch(url: str, sha256: str, size: int | None, name: str) -> str:
    """In the container: download into the volume and commit. Returns "" or, in one line, why it failed."""
    path = HERE / "weights" / name
    try:
        download.download(download.Source(url, sha256, size), path)
        Path(f"{path}.sha256").write_text(f"{sha256}  {name}\n")
    except (download.DownloadError, OSError) as error:
        return str(error)
    finally:
        weights.commit()  # what has come of the file too, for the next run to go on from
    return ""


@app.local_entrypoint()
def main(
    url: str | None = None,
    sha256: str | None = None,
    name: str | None = None,
    list: bool = False,
    remove: str | None = None,
):
    """Download SD 1.5's weights, or with --url and --sha256 others, into the Volume "sd-weights"."""
    try:
        if list:
            show()
        elif remove:
            delete(remove)
        else:
            put(url, sha256, name)
    except (download.DownloadError, OSError, modal.exception.Error) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None


def put(url: str | None, sha256: str | None, name: str | None) -> None:
    """Have the file in the volume. Raises DownloadError, without a container if the arguments are wrong."""
    source, path = download.chosen(argparse.Namespace(format="safetensors", url=url, sha256=sha256, out=None))
    name = check_name(name or path.name)
    if name in files() and recorded(name) == source.sha256:
        print(f"{name} is in the volume {VOLUME} already")
        return
    if error := fetch.remote(source.url, source.sha256, source.size, name):
        raise download.DownloadError(error)
    print(f"{name} is in the volume {VOLUME}, {files()[name] / 1e9:.2f} GB, sha256 is right")


def check_name(name: str) -> str:
    """The name of a file in the volume. Raises DownloadError unless it is one, and one that will be found."""
    if Path(name).name != name or Path(name).suffix not in (".safetensors", ".ckpt"):
        raise download.DownloadError(f"--name must be a file name that ends in .safetensors or .ckpt, not {name!r}")
    return name


def files() -> dict[str, int]:
    """Name -> bytes of the files in the volume."""
    return {entry.path.lstrip("/"): entry.size for entry in weights.listdir("/", recursive=True)}


def recorded(name: str) -> str:
    """The sha256 that an earlier run found the file to have, or "" """
    try:
        return b"".join(weights.read_file(f"{name}.sha256")).decode().split(" ")[0]
    except FileNotFoundError:
        return ""  # put there by other means: the container reads it whole


def show() -> None:
    """Print what is in the volume."""
    found = {name: size for name, size in sorted(files().items()) if not name.endswith(".sha256")}
    for name, size in found.items():
        print(f"{size / 1e9:8.2f} GB  {name}")
    if not found:
        print(f"the volume {VOLUME} is empty")


def delete(name: str) -> None:
    """Remove a file and what belongs to it. Raises DownloadError if it is not there."""
    there = [path for path in (name, f"{name}.part", f"{name}.sha256") if path in files()]
    if not there:
        raise download.DownloadError(f"there is no {name} in the volume {VOLUME}; --list shows what there is")
    for path in there:
        weights.remove_file(path)
    print(f"removed {', '.join(there)}")
