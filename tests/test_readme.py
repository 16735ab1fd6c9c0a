"""The documents hold: Python blocks run as they are printed, and what a line names is there."""

import contextlib
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd import inference
from sd.pictures.png import read_parameters
from sd.pipeline import DEMO_CHECKPOINT

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "bench/README.md",
    "docs/guide/README.md",
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
)

pytestmark = pytest.mark.skipif(not DEMO_CHECKPOINT.exists(), reason="the demo model is not here")


def text(document: str) -> str:
    return (ROOT / document).read_text()


def fenced(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)


def file_of(block: str) -> str | None:
    """The file that a block belongs to, as its first line says it."""
    first = re.match(r"# (sd/\S+\.py)\n", block)
    return first and first[1]


BLOCKS = {file_of(block): block for block in fenced("README.md", "python")}
"""The README's Python by the file that it belongs to; None for what is typed."""


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# ---- Python


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository as far as it draws; working directories are elsewhere."""
    for folder in ("sd", "data"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "v1-5*", "*.ckpt")
        )
    return tmp_path


LINES = """
import json, sys
from sd.inference import main
for line in json.loads(sys.argv[1]):
    assert main(line) == 0, line
"""


def draw(root: Path, *lines: tuple) -> None:
    """Command lines with the copy's program, in one process: importing torch takes longer than drawing."""
    words = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run([sys.executable, "-c", LINES, words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_block_has_its_test():
    assert len(BLOCKS) == len(fenced("README.md", "python")), "two blocks of one file"
    own = next(name for name in BLOCKS if name and name.startswith("sd/optimizations/"))
    assert BLOCKS.keys() == {None, own, "sd/samplers.py"}


def test_the_library_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(DEMO_CHECKPOINT))
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(BLOCKS[None], "README.md", "exec"), names)
    assert names["pipe"].optimizations == ["deepcache=3", "kv-cache", "shared-halves"]
    assert re.search(r"attn2 .*keys and values once a prompt.* kv-cache$", out.getvalue(), re.MULTILINE)
    assert names["eps"].shape == names["x"].shape
    assert names["images"].shape == names["pixels"].shape
    assert (names["images"] - names["pixels"]).abs().mean() < 0.1, "the VAE gives the picture back"


def test_the_picture_it_saves_can_be_drawn_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(DEMO_CHECKPOINT))
    until_saved = BLOCKS[None].split("\n\noptimizations.undo")[0]
    exec(compile(until_saved.replace("steps=20", "steps=4"), "README.md", "exec"), {})
    (saved,) = tmp_path.glob("*.png")
    assert read_parameters(saved)["steps"] == 4
    assert inference.main(["--from-png", str(saved), "--out", str(tmp_path / "again.png")]) == 0
    np.testing.assert_allclose(pixels(tmp_path / "again.png"), pixels(saved), atol=1)  # threads may differ


def test_your_own_optimization(copy):
    file = next(name for name in BLOCKS if name and name.startswith("sd/optimizations/"))
    name = re.search(r'@optimization\("([^"]+)"', BLOCKS[file])[1]
    (copy / file).write_text(BLOCKS[file])
    same = ("--prompt", "a red apple", "--steps", 12, "--seed", 1, "--sampler", "ddim")
    draw(copy, *((*same, "--opt", f"{name}={interval}", "--out", f"{interval}.png") for interval in (1, 2)))
    assert read_parameters(copy / "2.png")["opt"] == f"{name}=2"
    assert 0.1 < np.abs(pixels(copy / "1.png") - pixels(copy / "2.png")).mean() < 20, "another picture, and no noise"


@pytest.mark.full(memory=False)
def test_your_own_sampler(copy):
    function = BLOCKS["sd/samplers.py"]
    name = re.search(r"def (\w+)", function)[1]
    with (copy / "sd" / "samplers.py").open("a") as file:
        file.write(f"\n\n{function}")
    same = ("--prompt", "a red apple", "--seed", 1, "--steps", 20, "--cfg-scale", 2)
    draw(copy, *((*same, "--sampler", sampler, "--out", f"{sampler}.png") for sampler in (name, "ddim")))
    assert read_parameters(copy / f"{name}.png")["sampler"] == name
    assert 0.1 < np.abs(pixels(copy / f"{name}.png") - pixels(copy / "ddim.png")).mean() < 20, "the same, more or less"


# ---- what is named


def spans(document: str) -> list[str]:
    """What stands between backticks outside of blocks, on one line or two."""
    return [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text(document)))
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", text(document))
    local = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert [link for link in local if not (ROOT / document).parent.joinpath(link).exists()] == []


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, words joined by hyphens, other signs left out."""
    headings = re.findall(r"^#+ +(.*?) *$", re.sub(r"(?ms)^```.*?^```$", "", document.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_anchors_are_headings(document):
    for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text(document)):
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        if not link.startswith("http") and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_readme_leads_to_every_document():
    linked = set(re.findall(r"\]\(([^)#\s]+)", text("README.md")))
    documents = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")}
    assert documents | {"docs/guide/README.md", "notebooks", "bench/README.md"} <= linked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document):
    """Whatever begins with one of our folders, and whatever is a source file by its name."""
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isalpha() and path.name != "out"
    )
    named = re.compile(rf"(?:(?:{folders})/[\w./-]*|[\w./-]+\.(?:py|cpp|h|sh|html|ipynb))")
    found = {span.split()[0] for span in spans(document) if named.fullmatch(span.split()[0])}
    near = (ROOT, (ROOT / document).parent)
    assert sorted(name for name in found if not any((folder / name).exists() for folder in near)) == []


def commands(document: str) -> Iterator[list[str]]:
    """The words of every command line, in blocks and between backticks, less its comment and its environment."""
    blocks = "\n".join(fenced(document, "")).replace("\\\n", " ")
    for line in (*blocks.splitlines(), *spans(document)):
        if not re.match(r"(\w+=\S* +)*([\w./-]*python3?|make|modal|bench/\S+\.sh|train/\S+\.sh)\b", line):
            continue
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        yield words


def of_program(words: list[str]) -> tuple[str, list[str]] | None:
    """The file that a command line runs, and the options that it has; None for others' programs."""
    rest = [word for word in words[1:] if word not in ("run", "deploy")]
    if "python" in words[0]:
        if rest[0] == "-m":
            if rest[1].split(".")[0] not in ("sd", "bench", "train"):
                return None
            rest[:2] = [rest[1].replace(".", "/") + ".py"]
    elif "/" in words[0]:
        rest = words
    if not rest or not re.fullmatch(r"[\w./-]+\.(py|sh)", rest[0]):
        return None
    return rest[0], [word.partition("=")[0] for word in rest[1:] if re.match(r"--[a-z]", word)]


def help_of(program: str, monkeypatch) -> str:
    """What --help prints; run in this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    before, out = signal.getsignal(signal.SIGINT), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    return out.getvalue()


def modal_options(program: str) -> str:
    """Those of `modal run`: the parameters of the entry point."""
    main = runpy.run_path(str(ROOT / program))["main"].info.raw_f
    return " ".join("--" + name.replace("_", "-") for name in inspect.signature(main).parameters)


COMMANDS = [pytest.param(words, id=f"{name}: {' '.join(words)[:60]}") for name in DOCUMENTS for words in commands(name)]


def test_command_lines_are_found():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("words", [command for command in COMMANDS if command.values[0][0] == "make"])
def test_make_has_its_targets(words):
    makefile = text("Makefile")
    for word in words[1:]:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if given else rf"^{name}:", makefile, re.MULTILINE), word


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("words", [command for command in COMMANDS if command.values[0][0] != "make"])
def test_programs_have_their_options(words, helps, monkeypatch):
    found = of_program(words)
    if found is None:
        return
    program, options = found
    assert (ROOT / program).is_file()
    if options and program.endswith(".py") and program not in helps:
        helps[program] = modal_options(program) if words[0] == "modal" else help_of(program, monkeypatch)
    assert [option for option in options if not re.search(rf"{option}\b(?!-)", helps[program])] == []


# ---- what the demo model is asked for

BEYOND_THE_DEMO = ("README.md: a lighthouse in a storm", "docs/modal.md: a lighthouse in a storm")
"""Prompts that stand beside the words "SD 1.5", or after its download."""


def test_prompts_are_words_that_the_demo_model_has_learned():
    """Unless files go with them that are for SD 1.5."""
    from sd.pictures.plan import plan
    from sd.pictures.prompts_file import Entry
    from sd.pictures.vocabulary import unknown_words
    from sd.pipeline import StableDiffusion

    pipe, asked = StableDiffusion.load(DEMO_CHECKPOINT, "cpu"), []
    for document in DOCUMENTS:
        lines = [words for words in commands(document) if "--prompt" in words]
        spelled = re.findall(r'`--prompt "([^"]+)"', text(document))
        words = [
            line[line.index("--prompt") + 1] for line in lines if not {"--lora", "--embedding", "--control"} & {*line}
        ]
        asked += [(document, prompt) for prompt in (*words, *spelled) if prompt != "..."]
    assert len(asked) >= 8
    unknown = {
        f"{document}: {prompt}"
        for document, prompt in asked
        if unknown_words(pipe, plan([Entry("", {"prompt": prompt, "prompt_syntax": "a1111"})], {}, 0))
    }
    assert unknown == {*BEYOND_THE_DEMO}
