"""Runs notebooks from top to bottom, stores them with what they show, and writes notebooks/README.md.

    python notebooks/run.py                 all of them, on the demo model
    python notebooks/run.py int8_by_hand    this one

What a notebook shows is kept small: pictures as JPEG, plots with a palette.
"""

import base64
import io
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
NAMES = (
    "text_to_image_by_hand",
    "schedules_and_samplers",
    "guidance_seeds_negative",
    "attention_maps",
    "interpolation",
    "ladder",
    "your_own_optimization",
    "int8_by_hand",
)
"""The order in which they are to be read."""

INDEX = "index"  # the tag of the cell whose picture stands in the README
FORMATS = {"image/jpeg": ".jpg", "image/png": ".png"}


# ---- what is run


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(notebook: NotebookNode, timeout: int = 600) -> NotebookNode:
    """The notebook with what its cells have shown, in a kernel of its own. Raises CellExecutionError."""
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()


def with_checkpoint(notebook: NotebookNode, checkpoint: str | Path) -> NotebookNode:
    """The notebook with its line `CKPT = ...` changed, the one line by which it draws with another model."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, found = re.subn(r"^CKPT = .*$", f"CKPT = {str(checkpoint)!r}", first.source, flags=re.MULTILINE)
    assert found == 1, "the first code cell has one line CKPT = ..."
    return notebook


# ---- what is kept


def tidied(notebook: NotebookNode, seconds: float) -> NotebookNode:
    """Without what differs from run to run, and with small pictures."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "seconds": round(seconds),
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        if cell.cell_type == "code":
            cell.execution_count = None
            # Warnings name files of the machine that this ran on.
            cell.outputs = [small(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def small(output: NotebookNode) -> NotebookNode:
    if "execution_count" in output:
        output.execution_count = None
    output.metadata = {} if "data" in output else output.get("metadata")
    if "data" not in output:
        output.pop("metadata")
    elif "image/png" in output.data:
        image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        kind, content = encoded(image)
        output.data = {kind: base64.b64encode(content).decode(), "text/plain": f"{image.width}x{image.height} pixels"}
    return output


def encoded(image: Image.Image) -> tuple[str, bytes]:
    """Its type and bytes: what has few colours, as a plot, with a palette, and all else as JPEG."""
    file, plot = io.BytesIO(), image.getcolors(4096) is not None
    if plot:
        image.quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=88, subsampling=0, optimize=True)
    return "image/png" if plot else "image/jpeg", file.getvalue()


# ---- the index


def picture(notebook: NotebookNode) -> tuple[str, bytes]:
    """The suffix and the bytes of the picture that stands for the notebook."""
    (cell,) = (cell for cell in notebook.cells if INDEX in cell.metadata.get("tags", ()))
    found = [(kind, data) for output in cell.outputs for kind, data in output.get("data", {}).items()]
    kind, data = next((kind, data) for kind, data in found if kind in FORMATS)
    return FORMATS[kind], base64.b64decode(data)


def index() -> str:
    """The text of README.md: of each notebook its title, its first paragraph, its picture and its seconds."""
    rows = [HEAD]
    for name in NAMES:
        notebook = read(name)
        title, about, *_ = notebook.cells[0].source.split("\n\n")
        rows += [
            f"## [{title.removeprefix('# ')}]({name}.ipynb)",
            " ".join(about.split()),
            f"![{title.removeprefix('# ')}](pictures/{name}{picture(notebook)[0]})",
            f"{len(notebook.cells)} cells, {notebook.metadata['seconds']} seconds.",
        ]
    return "\n\n".join(rows) + "\n"


HEAD = """# Notebooks

Eight lessons, to be run and changed. Each draws with the demo model of this repository, and with Stable Diffusion 1.5
after one line is changed: `CKPT = ...` in its first cell (on a GPU, or with patience). Each ends with exercises, whose
answers are folded. What they show is kept in them, so GitHub shows it too.

```
pip install -r requirements.txt jupyterlab matplotlib
jupyter lab notebooks
```

They need no other installation. `python notebooks/run.py` runs them all and stores them anew, with this page; it needs
`requirements-dev.txt`. The seconds below are those that one core of a Zen 5 CPU was at work, the import of PyTorch
included. The times that notebooks show come from there too, while others were at work beside them."""


def processor_seconds() -> float:
    """Of all kernels that have ended: it does not matter what else the machine did."""
    return os.times().children_user + os.times().children_system


def main(names: list[str]) -> None:
    for name in names or NAMES:
        before = processor_seconds()
        notebook = executed(read(name))
        notebook = tidied(notebook, processor_seconds() - before)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        suffix, content = picture(notebook)
        for old in (FOLDER / "pictures").glob(f"{name}.*"):
            old.unlink()
        (FOLDER / "pictures" / f"{name}{suffix}").write_bytes(content)
        print(f"{name}: {notebook.metadata['seconds']} s", flush=True)
    (FOLDER / "README.md").write_text(index())


if __name__ == "__main__":
    main([Path(name).stem for name in sys.argv[1:]])
