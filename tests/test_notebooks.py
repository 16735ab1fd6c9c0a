"""The notebooks: what is stored in them, what the index says of them, and that they run from top to bottom."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from notebooks import run
from sd.pipeline import DEMO_CHECKPOINT
from tests.sparing import sparing

PATHS = re.compile(r"(?<![\w.])(/(home|root|tmp|usr|var|opt|work|Users|mnt)/|[A-Z]:\\)")


@pytest.fixture(params=run.NAMES)
def stored(request) -> NotebookNode:
    return run.read(request.param)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures_of(notebook: NotebookNode) -> list[Image.Image]:
    found = [output.get("data", {}) for output in outputs_of(notebook)]
    encoded = [data[kind] for data in found for kind in run.FORMATS if kind in data]
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in encoded]


# ---- what is stored


def test_all_are_in_the_order_to_be_read():
    assert sorted(run.NAMES) == sorted(path.stem for path in run.FOLDER.glob("*.ipynb"))


def test_it_is_a_lesson(stored):
    nbformat.validate(stored)
    assert 10 <= len(stored.cells) <= 40
    assert stored.cells[0].source.startswith("# ")
    exercises = stored.cells[-1].source
    assert exercises.startswith("## Exercises") or "\n## Exercises" in exercises
    assert exercises.count("<details><summary>Answer</summary>") == exercises.count("</details>") >= 2
    assert max(len(cell.source.splitlines()) for cell in stored.cells) <= 60


def test_one_line_names_the_checkpoint(stored):
    lines = [line for cell in code_cells(stored) for line in cell.source.splitlines() if line.startswith("CKPT")]
    assert lines == [next(line for line in code_cells(stored)[0].source.splitlines() if line.startswith("CKPT = "))]
    assert (run.FOLDER.parent / lines[0].split('"')[1]) == DEMO_CHECKPOINT


def test_what_it_shows_is_there_and_small(stored):
    assert len(nbformat.writes(stored)) < 400_000
    pictures = pictures_of(stored)
    assert len(pictures) >= 3
    assert max(picture.width for picture in pictures) <= 512
    assert all(cell.execution_count is None for cell in code_cells(stored))
    assert not [output for output in outputs_of(stored) if output.output_type == "error"]


def test_it_names_no_machine(stored):
    told = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs_of(stored)]
    for text in (*told, *(cell.source for cell in stored.cells)):
        assert not PATHS.search(text), text
        assert " at 0x" not in text
        assert len(text.splitlines()) <= 60


def test_its_links_lead_somewhere(stored):
    source = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", source):
        assert link.startswith("https://") or (run.FOLDER / link).exists(), link


# ---- the index


def test_the_index_is_that_of_the_notebooks():
    """And its pictures are those that stand in them: `python notebooks/run.py` writes both."""
    assert (run.FOLDER / "README.md").read_text() == run.index()
    expected = {name + run.picture(run.read(name))[0]: run.picture(run.read(name))[1] for name in run.NAMES}
    assert {path.name: path.read_bytes() for path in (run.FOLDER / "pictures").iterdir()} == expected


def test_tidied():
    """Counts, warnings and the metadata of a run go; a picture becomes small, a plot keeps its rare colours."""
    gray, plot = Image.linear_gradient("L"), Image.new("RGB", (300, 200), "white")
    colours = ((31, 119, 180), (255, 127, 14), (44, 160, 44))
    for i, colour in enumerate(colours):
        plot.paste(colour, (50 * i, 0, 50 * i + 4, 4))
    noisy = Image.merge("RGB", (gray, gray.transpose(Image.Transpose.ROTATE_90), Image.effect_noise(gray.size, 80)))
    outputs = [new_output("display_data", {"image/png": _png(one), "text/plain": "<at 0x7f>"}) for one in (noisy, plot)]
    warned = new_output("stream", name="stderr", text="/somewhere/file.py: warned")
    said = new_output("stream", name="stdout", text="said")
    cell = new_code_cell("1", execution_count=3, outputs=[*outputs, warned, said])
    cell.metadata = {"execution": {"a": "1"}, "tags": ["index"]}
    tidy = run.tidied(new_notebook(cells=[cell]), 12.3)
    assert tidy.metadata["seconds"] == 12
    assert dict(tidy.cells[0].metadata) == {"tags": ["index"]}
    first, second, third = tidy.cells[0].outputs
    assert (set(first.data), set(second.data)) == ({"image/jpeg", "text/plain"}, {"image/png", "text/plain"})
    assert first.data["text/plain"] == "256x256 pixels"
    assert third.text == "said"
    found = pictures_of(tidy)[1].convert("RGB")
    assert all(found.getpixel((50 * i + 1, 1)) == colour for i, colour in enumerate(colours))
    nbformat.validate(tidy)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ---- that they run


@pytest.mark.parametrize("folder", [run.FOLDER, run.FOLDER.parent], ids=["notebooks", "root"])
def test_it_finds_the_repository(folder):
    """Without an installation, from either folder: what the first cell says is enough for the others' imports."""
    first = code_cells(run.read(run.NAMES[0]))[0].source
    code = f"{first}\nimport notebooks.show, sd.config, bench\nprint((ROOT / CKPT).exists())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == f"{DEMO_CHECKPOINT.exists()}\n", done.stderr


def test_another_checkpoint_is_one_line(tiny_checkpoint):
    """By hand and by `generate` the pictures are the same, whatever the model's size: the notebook asserts it."""
    notebook = run.executed(run.with_checkpoint(run.read("text_to_image_by_hand"), tiny_checkpoint))
    assert max(picture.width for picture in pictures_of(notebook)) <= 512
    said = "".join(output.get("text", "") for output in outputs_of(notebook))
    assert "largest difference of a byte: 0" in said


@pytest.mark.skipif(not DEMO_CHECKPOINT.exists(), reason="the demo model is not here")
@pytest.mark.parametrize("name", sparing(run.NAMES, lambda name: False))
def test_it_runs(name):
    notebook = run.executed(run.read(name))
    shown = [len(cell.outputs) > 0 for cell in code_cells(notebook)]
    kept = [len(cell.outputs) > 0 for cell in code_cells(run.read(name))]
    assert shown == kept  # stderr is not kept, and there is none


def test_the_checkpoints_line_must_be_there():
    with pytest.raises(AssertionError, match="CKPT"):
        run.with_checkpoint(new_notebook(cells=[new_code_cell("x = 1")]), Path("other.safetensors"))
