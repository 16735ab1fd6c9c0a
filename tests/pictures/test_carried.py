"""Files that jobs name, on their way to another machine: names that stay, names that would be one, what is missing."""

import pytest

from sd.pictures.carried import carried, named_by
from sd.pictures.parameters import UserError, checked
from sd.pictures.plan import Plan, plan
from sd.pictures.prompts_file import Entry


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.png here, b/a.png below, and two others of that name elsewhere; a net with a colon in its name."""
    here = tmp_path / "here"
    (here / "b").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(here)
    for i, name in enumerate(("here/a.png", "here/b/a.png", "other/a.png", "a.png", "here/n:1.pt")):
        (tmp_path / name).write_bytes(bytes([i]))
    return tmp_path


def planned(*lines: dict) -> Plan:
    entries = [Entry(f"line {i}", checked("", {"prompt": "x", **line})) for i, line in enumerate(lines, 1)]
    return plan(entries, {}, 0)


def test_names_are_as_typed_or_told_apart(files):
    other = str(files / "other/a.png")
    asked = carried(planned({"init_image": "a.png", "num_images": 2}, {"init_image": "b/a.png", "mask": other}, {}))
    assert len(asked.plan) == 4
    assert [job.init_image for job in asked.plan] == ["a.png", "a.png", "b/a.png", None]
    assert asked.plan[0].seed + 1 == asked.plan[1].seed
    mask = asked.plan[2].mask
    folder, _, last = mask.partition("/")
    assert (len(folder), last) == (12, "a.png")
    assert {name: path.read_bytes() for name, path in asked.files.items()} == {
        "a.png": b"\0",
        "b/a.png": b"\1",
        mask: b"\2",
    }
    assert [named_by(job) for job in asked.plan] == [{"a.png"}, {"a.png"}, {"b/a.png", mask}, set()]


def test_a_folder_above_is_not_named(files):
    asked = carried(planned({"init_image": "../a.png"}, {"init_image": "../here/a.png"}))
    assert asked.plan[0].init_image == "a.png"
    assert asked.plan[1].init_image != "a.png"
    assert [path.read_bytes() for path in asked.files.values()] == [b"\3", b"\0"]


def test_a_control_names_two_files(files):
    asked = carried(planned({"control": [f"n:1.pt:{files}/other/a.png:0.5:0-0.25", "n:1.pt:a.png"]}))
    (job,) = asked.plan
    second = job.control[1].split(":")[1]
    assert job.control == ("n_1.pt:a.png:0.5:0-0.25", f"n_1.pt:{second}:1:0-1")
    assert named_by(job) == {"n_1.pt", "a.png", second} == asked.files.keys()
    assert [asked.files[name].read_bytes() for name in ("n_1.pt", "a.png", second)] == [b"\4", b"\2", b"\0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"init_image": "gone.png"}, "line 1: there is no file gone.png"),
        ({"init_image": "b"}, "line 1: there is no file b"),
        ({"control": "n:1.pt:gone.png"}, "line 1: there is no file "),
        ({"control": "n.pt"}, "line 1: control must be FILE:PICTURE"),
        ({"control": "a.png:a.png:2:3-4"}, "line 1: a control acts between two fractions"),
    ],
)
def test_what_is_missing_is_told(files, line, message):
    with pytest.raises(UserError, match=message):
        carried(planned(line))


def test_a_million_pictures_are_not_made(files):
    assert len(carried(planned({"init_image": "a.png", "num_images": 10**6})).plan) == 10**6
