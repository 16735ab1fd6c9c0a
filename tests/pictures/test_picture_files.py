"""The names of pictures' files, and going on where a run has stopped, without a model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd.pictures.files import NAME_FIELDS, left_to_draw, output_files, slug
from sd.pictures.parameters import PARAMETERS, UserError
from tests.pictures.test_plan import some_jobs

# ---- names


def test_names(tmp_path):
    jobs = some_jobs(3)
    assert output_files(f"{tmp_path}/a.png", jobs[:1], many=False) == [tmp_path / "a.png"]
    assert [f.name for f in output_files(f"{tmp_path}/a.png", jobs, many=True)] == ["a-1.png", "a-2.png", "a-3.png"]
    assert [f.name for f in output_files(f"{tmp_path}/a.png", jobs[:1], many=True)] == ["a-1.png"]
    pattern = f"{tmp_path}/{{index:04}}-{{seed}}-{{prompt}}-{{steps}}{{{{x}}}}.png"
    assert output_files(pattern, jobs, many=True)[1].name == "0002-1-x-50{x}.png"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{index.__class__}.png", "has the field {index.__class__}"),
        ("{index[0]}.png", "has the field"),
        ("{index!r}.png", "has the field"),
        ("{0}.png", "has the field"),
        ("{}.png", "has the field"),
        ("{colour}.png", "there are {index}, {seed}"),
        ("{index.png", "--out"),
        ("{index:s}.png", "--out"),
        ("{seed:{index}}.png", "has the field"),
        ("a.gif", "a-1.gif must end in one of .png, .jpg, .jpeg, .webp"),
        ("a", "a-1 must end in one of"),
        ("/dev/null/{index}.png", "/dev/null is no folder"),
        ("{sampler}.png", "pictures 1 and 2 would both be"),
        (f"{'x' * 252}{{index}}.png", "longer than 255 bytes"),
        ("folder.png", "is a folder"),
    ],
)
def test_patterns_that_cannot_work(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("[", r"\[")):
        output_files(pattern, some_jobs(2), many="folder" not in pattern)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@given(st.text())
def test_a_prompt_in_a_name_stays_one_harmless_word(text):
    word = slug(text)
    assert word
    assert len(word) <= 40
    assert not set(word) & set("/\\.:*?\"'<>|{} \0\n")
    assert len(word.encode()) < 200
    assert Path(word).name == word


def test_slugs():
    assert slug("A red apple, on SNOW!") == "a-red-apple-on-snow"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == "picture"
    assert set(NAME_FIELDS) <= set({"index", *PARAMETERS})


# ---- what is there already


def test_what_is_there_is_not_drawn_again(tmp_path):
    jobs = some_jobs(4)
    pictures = list(zip(jobs, output_files(f"{tmp_path}/a.png", jobs, many=True), strict=True))
    there = {}
    for job, file in pictures[:2]:
        file.touch()
        there[file] = {**job.parameters(), "height": 64, "model": "tiny"}
    assert left_to_draw(pictures, there.__getitem__) == pictures[2:]
    with pytest.raises(UserError, match="another picture \\(its model is 'tiny', not 'large'\\)"):
        left_to_draw(pictures, there.__getitem__, {"model": "large"})
    there[pictures[1][1]]["seed"] = 77
    with pytest.raises(UserError, match="its seed is 77, not 1"):
        left_to_draw(pictures, there.__getitem__)
    assert left_to_draw(pictures, there.__getitem__, ignore=["seed"]) == pictures[2:]


def test_a_file_of_somebody_else_is_not_taken_for_a_picture(tmp_path):
    def refuse(path):
        raise ValueError("no parameters")

    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match="not one of this program's"):
        left_to_draw([(some_jobs(1)[0], tmp_path / "a.png")], refuse)
