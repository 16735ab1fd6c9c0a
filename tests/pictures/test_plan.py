"""Prompts files, jobs and batches, without a model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd.pictures.parameters import PARAMETERS, UserError
from sd.pictures.plan import Job, draw_in_batches, groups, plan
from sd.pictures.prompts_file import Entry, read_prompts


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def some_jobs(count: int, **changes) -> list[Job]:
    return plan([Entry("", {"prompt": "x", "num_images": count})], changes, first_seed=0)


# ---- prompt files


def test_a_prompt_a_line(tmp_path):
    file = write(tmp_path / "p.txt", "\ufeffa fox\r\n\n  # not a comment \nein Füchslein 🦊\u2028\n")
    assert [e.parameters["prompt"] for e in read_prompts(file)] == ["a fox", "# not a comment", "ein Füchslein 🦊"]


def test_any_parameter_by_line(tmp_path):
    line = {
        "prompt": "a fox",
        "negative_prompt": "blur",
        "steps": 3,
        "cfg_scale": 2,
        "seed": 9,
        "height": 64,
        "width": 128,
        "sampler": "Euler a",
        "schedule": "Karras",
        "eta": 0.5,
        "s_noise": 1,
        "prompt_syntax": "a1111",
        "clip_skip": 2,
        "init_image": "a.png",
        "strength": 0.5,
        "mask": "m.png",
        "mask_blur": 3,
        "mask_invert": True,
        "outpaint": "64,0,0,0",
        "control": ["n.safetensors:a.png:0.5", "m.safetensors:b.png"],
        "control_preprocess": "canny",
        "num_images": 2,
    }
    other = {"prompt": "b", "steps": None, "hires": 2, "hires_strength": 0.4, "sampler": "deis", "solver_order": 2}
    assert {*line, *other, "mask_padding"} == set(PARAMETERS)  # which do not all go together
    file = write(tmp_path / "p.jsonl", f"{json.dumps(line)}\n{json.dumps(other)}\n")
    jobs = plan(read_prompts(file), {"steps": 7}, first_seed=100)
    assert [(j.index, j.prompt, j.steps, j.seed) for j in jobs] == [
        (1, "a fox", 3, 9),
        (2, "a fox", 3, 10),
        (3, "b", 7, 102),
    ]
    own = ("euler_a", "karras", 0.5, 1.0, None, "a1111", 2, False, 0.5, False, 3.0, True, None, "64,0,0,0", None, 0.5)
    here = tmp_path  # the folder of the file that names them
    nets = (f"{here}/n.safetensors:{here}/a.png:0.5", f"{here}/m.safetensors:{here}/b.png")
    controls = (nets, ("canny",))
    assert jobs[0].settings() == (3, 2.0, 64, 128, *own, *controls)
    others = (None, None, "deis", None, None, None, 2, None, None, True, PARAMETERS["strength"].default, True, 0.0)
    assert jobs[2].settings()[2:] == (*others, False, None, None, 2.0, 0.4, None, None)
    assert jobs[2].where == f"{file} line 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b", "steps": 0}', "line 2: steps must be from 1 to 1000, not 0"),
        ('{"prompt": "a", "steps": 1001}', "line 1: steps"),
        ('{"prompt": "a", "steps": 20.5}', "line 1: steps"),
        ('{"prompt": "a", "steps": "20"}', "line 1: steps"),
        ('{"prompt": "a", "steps": true}', "line 1: steps"),
        ('{"prompt": "a", "cfg_scale": NaN}', "line 1: cfg_scale must be a finite number"),
        ('{"prompt": "a", "cfg_scale": 1e999}', "line 1: cfg_scale"),
        ('{"prompt": "a", "cfg_scale": 1e40}', "line 1: cfg_scale must be from -1000 to 1000, not 1e+40"),
        ('{"prompt": "a", "cfg_scale": 1%s}' % ("0" * 400), "line 1: cfg_scale must be from -1000 to 1000, not 1000"),
        ('{"prompt": "a", "strength": 2}', "line 1: strength must be over 0"),
        ('{"prompt": "a", "strength": 0}', "line 1: strength must be over 0"),
        ('{"prompt": "a", "sampler": "magic"}', "line 1: no sampler 'magic'; there are ddpm, ddim"),
        ('{"prompt": "a", "sampler": []}', "line 1: sampler must be text, not []"),
        ('{"prompt": "a", "seed": -1}', "line 1: seed"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "line 1: seed"),
        ('{"prompt": "a", "seed": 9223372036854775807, "num_images": 2}', "line 1: seed"),
        ('{"prompt": "a", "height": 0}', "line 1: height"),
        ('{"prompt": "a", "num_images": 0}', "line 1: num_images"),
        ('{"prompt": "a", "stpes": 3}', "line 1: there is no parameter 'stpes'; is it 'steps'? there are prompt, "),
        ('{"prompt": "a", "control": 3}', "line 1: control must be text, not 3"),
        ('{"prompt": "a", "control_preprocess": "x"}', "line 1: no control_preprocess 'x'; there are none, canny"),
        ('{"prompt": "a", "control": "n:p", "control_preprocess": ["none", "canny"]}', "2 control_preprocess for 1"),
        ('{"prompt": 3}', 'line 1: it lacks "prompt"'),
        ('{"steps": 3}', 'line 1: it lacks "prompt"'),
        ('\n{"prompt": ', "line 2: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('"a fox"', "line 1: not an object"),
        ('{"prompt": "\\ud800"}', "line 1: prompt holds characters"),
        ("\n \n", "holds no prompt"),
        (b"a caf\xe9", "is not UTF-8 text"),
    ],
)
def test_mistakes_name_the_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        plan(read_prompts(write(tmp_path / "p.jsonl", text)), {}, first_seed=0)
    assert message in str(error.value)
    assert "p.jsonl" in str(error.value)


def test_unreadable_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(path)


@given(st.text())
def test_any_text_file_is_prompts_or_one_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read = read_prompts(file)
    except UserError as error:
        read = [Entry(str(error), {"prompt": ""})]
    assert all(isinstance(entry.parameters["prompt"], str) and "any.jsonl" in entry.where for entry in read)


# ---- batches


def test_pictures_of_other_settings_are_other_groups():
    jobs = [replace(job, values={**job.values, "steps": 10 + job.index % 2}) for job in some_jobs(5)]
    found = groups((job, Path(f"{job.index}.png")) for job in jobs)
    assert [[job.index for job, _ in group] for group in found] == [[1, 3, 5], [2, 4]]


class Memory:
    """A device that holds so many pictures at once."""

    def __init__(self, holds: int):
        self.holds = holds
        self.asked: list[int] = []
        self.shrunk: list[int] = []

    def draw(self, batch):
        self.asked.append(len(batch))
        if len(batch) > self.holds:
            raise RuntimeError("out of memory")
        return [job.index for job in batch]

    def run(self, count: int, size: int) -> list[int]:
        done = draw_in_batches(some_jobs(count), self.draw, size, lambda e: "memory" in str(e), self.shrunk.append)
        drawn = []
        for batch, pictures in done:
            assert [job.index for job in batch] == pictures
            drawn += pictures
        return drawn


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_no_picture_is_lost_when_memory_runs_out(holds, count, size):
    memory = Memory(holds)
    assert memory.run(count, size) == list(range(1, count + 1))


def test_batches_are_halved_and_stay_so():
    memory = Memory(holds=3)
    memory.run(10, size=8)
    assert memory.asked == [8, 4, 2, 2, 2, 2, 2]
    assert memory.shrunk == [4, 2]


def test_one_picture_that_does_not_fit_is_an_error():
    with pytest.raises(RuntimeError, match="out of memory"):
        Memory(holds=0).run(3, size=4)


def test_other_errors_pass_through():
    def broken(batch):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        next(draw_in_batches(some_jobs(4), broken, 4, lambda error: False, lambda size: None))


def test_a_job_has_the_parameters_of_a_picture():
    [job] = some_jobs(1, steps=7)
    assert (job.prompt, job.steps, job.seed, job.height) == ("x", 7, 0, None)
    for name in ("num_images", "colour", "__deepcopy__"):
        assert not hasattr(job, name)
    assert len({job, replace(job), replace(job, index=2)}) == 2


ROOMS = "sd.pictures.run, sd.pictures.files, sd.pictures.drawing, sd.pictures.model, sd.pictures.provenance"


def test_planning_needs_no_torch():
    modules = f"{ROOMS}, sd.pictures.png, sd.images, sd.download"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
