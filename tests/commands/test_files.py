"""Where prompts come from and pictures go: formats, pipes, folders, JSON, names that are taken, damaged files."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd.inference import main
from sd.pictures.formats import encoded, read_parameters
from sd.pictures.plan import plan
from sd.pictures.prompts_file import Entry, read_prompts
from sd.pictures.run import Run, pictures_of
from sd.pipeline import StableDiffusion
from tests.sparing import sparing

PROGRAM = Path(__file__).resolve().parents[2] / "sd" / "inference.py"
LINE = ("--steps", "1", "--seed", "1")


@pytest.fixture
def folder(shallow_checkpoint, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(shallow_checkpoint))
    return tmp_path


def draw(*arguments: object) -> int:
    return main([*map(str, arguments), *LINE])


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments), *LINE]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, **options)


def picture(name: str, side: int = 16) -> str:
    rows = np.random.default_rng(len(name)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(rows).save(name)
    return name


# ---- pictures


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "new/folder/a.png"])
def test_a_file_of_any_kind_is_drawn_again(folder, name):
    assert draw("--prompt", "a fox", "--out", name) == 0
    assert main(["--from-png", name, "--out", f"again{Path(name).suffix}"]) == 0
    assert Path(name).read_bytes() == Path(f"again{Path(name).suffix}").read_bytes()


def test_a_second_run_skips_pictures_of_any_kind(folder, capfd):
    line = ("--prompt", "a fox", "--num-images", 2, "--out", "out/{seed}.webp")
    assert draw(*line) == 0
    assert draw(*line) == 0
    assert "all 2 pictures are there already" in capfd.readouterr().out


def test_a_folder_is_made_only_for_a_picture(folder):
    assert draw("--prompt", "x", "--ckpt", "none.safetensors", "--out", "new/a.png") == 2
    assert not Path("new").exists()


def test_to_standard_output(folder):
    done = process("--prompt", "a fox", "--out", "-", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"IEND\xaeB`\x82"), "and nothing after it"
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.format == "PNG"
        assert json.loads(image.info["prompt"]) == "a fox"
    assert b"standard output  seed 1" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("option", ["--init-image", "--mask"])
def test_a_picture_is_not_drawn_over_what_it_is_drawn_from(folder, option, capfd):
    given = {"--init-image": picture("a.png"), "--mask": picture("mask.png")}
    before = Path(given[option]).read_bytes()
    files = [word for pair in given.items() for word in pair]
    os.symlink(given[option], "link.png")
    for name in (given[option], "link.png", folder / given[option]):
        assert draw("--prompt", "x", *files, "--out", name) == 2
        assert "is a picture that is drawn from" in capfd.readouterr().err
    assert Path(given[option]).read_bytes() == before


def test_a_picture_is_not_drawn_over_that_of_a_control(folder, capfd):
    Path("net.safetensors").write_bytes(b"")
    picture("edges.png")
    assert draw("--prompt", "x", "--control", "net.safetensors:edges.png:0.5", "--out", "edges.png") == 2
    assert "edges.png is a picture that is drawn from" in capfd.readouterr().err


def test_a_blur_beside_outpaint_is_not_said_to_change_nothing(folder, caplog):
    line = ("--prompt", "x", "--init-image", picture("a.png"), "--mask-blur", "2", "--out", "b.png")
    assert draw(*line, "--outpaint", "16,0,0,0") == 0
    assert "changes nothing" not in caplog.text
    assert draw(*line) == 0
    assert "--mask-blur changes nothing without --mask or --outpaint" in caplog.text


def test_two_programs_that_choose_the_same_name(folder, monkeypatch):
    """Another one has written output.png since this one looked."""
    generate = StableDiffusion.generate

    def generating(*args, **kwargs):
        Path("output.png").write_bytes(b"theirs")
        return generate(*args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate", generating)
    assert draw("--prompt", "x") == 0
    assert Path("output.png").read_bytes() == b"theirs"
    assert read_parameters("output-1.png")["prompt"] == "x"


def test_a_disk_that_is_full(folder, monkeypatch, capfd):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd.pictures.saving.write_whole", full)
    assert draw("--prompt", "x", "--out", "a.png") == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: a.png cannot be written (No space left on device)"


# ---- prompts


@pytest.mark.parametrize("name", ["p.json", "p.txt", "p", "p.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "steps": 3}\n{"prompt": "b"}\n',
        '\n{"prompt": "a", "steps": 3.0}\n\n  {"prompt": "b"}',
        '[{"prompt": "a", "steps": 3}, "b"]',
        '[\n  {"prompt": "a",\n   "steps": 3},\n  {"prompt": "b"}\n]\n',
    ],
)
def test_json_under_any_name(tmp_path, name, text):
    if name == "p.jsonl" and text.startswith("["):
        pytest.skip("lines are promised")
    (tmp_path / name).write_text(text)
    entries = read_prompts(tmp_path / name)
    assert [dict(entry.parameters) for entry in entries] == [{"prompt": "a", "steps": 3}, {"prompt": "b"}]
    assert type(entries[0].parameters["steps"]) is int


@pytest.mark.parametrize("text", ["{red|blue} fox\na cat", "[a:b:0.5] fox", "[a|b]", '"a fox"', "(a:1.2)", "a {b}"])
def test_prompts_that_look_like_json(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    assert [entry.parameters["prompt"] for entry in read_prompts(tmp_path / "p.txt")] == text.split("\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"', "p.txt line 2: not JSON"),
        ('{"prompt": "a"', "p.txt line 1: not JSON"),
        ('[{"prompt": "a"},\n {"prompt": ]', "p.txt line 1: not JSON"),
        ('{"prompt": "a"}\na fox', "p.txt line 2: not JSON"),
        ('[{"prompt": "a"}, {"steps": 3}]', 'p.txt item 2: it lacks "prompt"'),
        ("[1, 2]", "p.txt item 1: not an object"),
        ("[]", "p.txt holds no prompt"),
        ('{\n  "prompt": "a",\n  "stpes": 3\n}', "p.txt item 1: there is no parameter 'stpes'"),
        ('{"prompt": "a", "steps": 20.5}', "line 1: steps must be a whole number, not 20.5"),
        ('{"prompt": "a", "seed": true}', "line 1: seed must be a whole number, not True"),
    ],
)
def test_json_that_is_wrong_is_never_drawn_as_text(folder, capfd, text, message):
    Path("p.txt").write_text(text)
    assert main(["--prompts-file", "p.txt"]) == 2
    assert message in capfd.readouterr().err


def test_prompts_from_standard_input(folder):
    done = process(
        "--prompts-file", "-", "--out", "{prompt}.png", input=b'{"prompt": "a"}\n{"prompt": "b"}', check=True
    )
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]
    assert done.returncode == 0


def test_files_that_a_prompts_file_names_are_beside_it(folder, monkeypatch):
    Path("there").mkdir()
    picture("there/start.png")
    Path("there/p.jsonl").write_text('{"prompt": "a", "init_image": "start.png"}')
    assert draw("--prompts-file", "there/p.jsonl", "--out", "a.png") == 0
    assert read_parameters("a-1.png")["init_image"] == "there/start.png"
    Path("there/q.jsonl").write_text('{"prompt": "a", "control": ["n.safetensors:e.png:0.5", "/m.pth:e.png"]}')
    (entry,) = read_prompts("there/q.jsonl")
    assert entry.parameters["control"] == ("there/n.safetensors:there/e.png:0.5", "/m.pth:there/e.png")


def test_one_damaged_picture_does_not_stop_the_others(folder, capfd):
    whole = Path(picture("whole.png", 64)).read_bytes()
    Path("cut.png").write_bytes(whole[:-3000])
    lines = [{"prompt": name, "init_image": f"{name}.png"} for name in ("whole", "cut")] + [{"prompt": "last"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for expected in (["whole-1.png", "last-3.png"], []):
        assert draw("--prompts-file", "p.jsonl", "--out", "{prompt}-{index}.png") == 1
        out, errors = capfd.readouterr()
        assert [line.split()[0] for line in out.splitlines() if "seed" in line] == expected
        assert errors.splitlines()[-1].startswith("error: p.jsonl line 2: cut.png cannot be read as a picture")


def test_pictures_that_start_from_several_are_one_batch(folder, monkeypatch):
    sizes, generate = [], StableDiffusion.generate

    def generating(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        return generate(self, prompts, *args, **kwargs)

    names = [picture("a.png"), picture("bb.png"), picture("oblong.png")]
    Image.open("oblong.png").resize((32, 16)).save("oblong.png")
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": name, "init_image": name}) for name in names))
    for folder_name in ("one", "three"):
        monkeypatch.setattr(StableDiffusion, "generate", generating)
        size = {"one": 1, "three": 3}[folder_name]
        line = ("--prompts-file", "p.jsonl", "--out", f"{folder_name}/{{index}}.png", "--batch-size", size)
        assert draw(*line) == 0
    assert sizes == [1, 1, 1, 2, 1]
    for i in (1, 2, 3):
        alone, together = (np.asarray(Image.open(f"{name}/{i}.png"), dtype=int) for name in ("one", "three"))
        assert np.abs(alone - together).max() <= 1
        assert read_parameters(f"three/{i}.png")["init_image"] == names[i - 1]


# ---- many


def test_a_million_pictures_begin_at_once(folder):
    started = time.process_time()
    given = {"num_images": 10**6, "seed": 5, "init_image": picture("a.png")}
    pictures = pictures_of(Run(prompt=["x"], parameters=given, out="out/{index:07}.png"))
    window = next(pictures.windows())
    assert time.process_time() - started < 5  # of this process: a guard, on a loaded machine too
    assert len(pictures) == 10**6
    assert [str(file) for _, file in window[:2]] == ["out/0000001.png", "out/0000002.png"]
    assert pictures.jobs[-1].seed == 10**6 + 4


def test_a_plan_is_the_list_that_it_stands_for():
    entries = [Entry("", {"prompt": "a", "num_images": 3, "seed": 7}), Entry("", {"prompt": "b", "num_images": 2})]
    jobs = plan(entries, {}, first_seed=100)
    wanted = [(1, "a", 7), (2, "a", 8), (3, "a", 9), (4, "b", 103), (5, "b", 104)]
    assert [(job.index, job.prompt, job.seed) for job in jobs] == wanted
    assert [(job.index, job.prompt, job.seed) for job in (jobs[-1], jobs[3], *jobs[1:3])] == [
        wanted[i] for i in (4, 3, 1, 2)
    ]
    with pytest.raises(IndexError):
        jobs[5]


def test_pictures_beyond_a_window(folder, monkeypatch, capfd):
    monkeypatch.setattr("sd.pictures.files.WINDOW", 2)
    line = ("--prompt", "x", "--num-images", 5, "--out", "{seed}.png")
    Path("3.png").write_bytes(b"")
    assert draw(*line) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png", "3.png"], "as far as they were known"
    Path("3.png").unlink()
    assert draw(*line) == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.png" for i in range(1, 6)]
    assert draw(*line) == 0
    assert "all 5 pictures are there already" in capfd.readouterr().out


# ---- terminals


def test_the_last_negative_prompt_holds(folder, caplog):
    assert draw("--prompt", "x", "-n", "a", "--negative-prompt", "b", "--out", "a.png") == 0
    assert "--negative-prompt is given more than once: the last one holds" in caplog.text
    assert read_parameters("a.png")["negative_prompt"] == "b"


CLOSED = ("2>&-", "| head -c 1", ">&-", ">&- 2>&-", "2>&1 | head -c 1", "2>/dev/full", ">/dev/full")


@pytest.mark.parametrize("redirected", sparing(CLOSED, lambda one: one in CLOSED[:2]))
def test_what_cannot_be_printed_costs_no_picture(folder, redirected):
    Path("naïve").mkdir()
    line = f'"{sys.executable}" "{PROGRAM}" --prompt x --num-images 2 {" ".join(LINE)} --out naïve/é.png {redirected}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], env=environment, timeout=120)
    assert sorted(path.name for path in Path("naïve").iterdir()) == ["é-1.png", "é-2.png"]
    assert done.returncode == 0


# ---- without end


def test_what_has_no_end_is_told_at_once(folder, capfd):
    for line, message in {
        ("--prompts-file", "/dev/zero"): "/dev/zero is over 64 MB",
        ("--prompt", "x" * 1_000_001): "prompt must be at most 1000000 characters",
        ("--prompt", "x", "--device", "meta"): "--device: 'meta' cannot be used here",
        ("--prompt", "x", "--ckpt", "a\x1b[31mb\u202e"): "a [31mb",
    }.items():
        started = time.process_time()
        assert draw(*line) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert message in error
        assert error.isprintable()
        assert time.process_time() - started < 20  # a guard, not a benchmark


def test_prompts_from_a_fifo(folder):
    script = f'"{sys.executable}" "{PROGRAM}" --prompts-file <(printf "a\\nb\\n") --out {{prompt}}.png {" ".join(LINE)}'
    subprocess.run(["bash", "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]


def test_a_picture_that_asks_for_a_huge_batch(folder, monkeypatch, capfd):
    assert draw("--prompt", "x", "--out", "a.png") == 0
    said = {**read_parameters("a.png"), "batch": [1023, 1024]}
    Path("b.png").write_bytes(encoded(Image.open("a.png"), ".png", said))
    monkeypatch.setattr("sd.pictures.drawing.free_memory", lambda device: 100 * 2**20)
    assert main(["--from-png", "b.png", "--out", "c.png"]) == 2
    assert "1024 pictures of 16x16 at once takes about" in capfd.readouterr().err
