"""Words that the demo model has not learned are told, with what is near; a model with a whole table knows all."""

import json

import pytest
import torch

from sd import inference
from sd.pictures.plan import plan
from sd.pictures.prompts_file import Entry
from sd.pictures.vocabulary import near, notice, unknown_words
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.service.app import create_app
from tests.service.support import JSON, serving
from tests.weights import tiny_pipeline


@pytest.fixture(scope="module")
def demo() -> StableDiffusion:
    return StableDiffusion.load(DEMO_CHECKPOINT, "cpu")


def jobs(*prompts: str, **others: object):
    return plan([Entry("", {"prompt": prompt, **others}) for prompt in prompts], {}, 0)


@pytest.mark.parametrize(
    ("prompt", "others", "expected"),
    [
        ("a blue fox on a yellow background", {}, []),
        ("a lighthouse in a storm", {}, ["lighthouse", "storm"]),
        ("Lighthouse, LIGHTHOUSE!", {}, ["lighthouse"]),
        ("a (red:1.3) fox BREAK a fox, 4k 2:1", {}, []),
        ("a fox <lora:lighthouse:0.8>", {"prompt_syntax": "a1111"}, []),
        ("a fox", {"negative_prompt": "a storm"}, ["storm"]),
    ],
)
def test_words_without_a_row(demo, prompt, others, expected):
    assert unknown_words(demo, jobs(prompt, **others)) == expected


def test_words_that_are_near(demo):
    found = near(demo, ["lighthouse", "storm", "foxes", "aple", "qqqq"])
    assert {"house", "light"} <= {*found["lighthouse"]}
    assert found["storm"] == ["thunderstorm"]
    assert found["foxes"][0] == "fox"
    assert "apple" in found["aple"]
    assert found["qqqq"] == []
    for word in {one for others in found.values() for one in others}:
        assert not unknown_words(demo, jobs(word)), word


@pytest.fixture
def fresh(monkeypatch) -> tuple[StableDiffusion, list[int]]:
    """A pipeline whose table nobody has looked through, and the counts of words that were found at each look."""
    pipe, counts = StableDiffusion.load(DEMO_CHECKPOINT, "cpu"), []
    names = pipe.tokenizer.names
    monkeypatch.setattr(pipe.tokenizer, "names", lambda ids: counts.append(len(ids)) or names(ids))
    return pipe, counts


def test_the_table_is_looked_through_once_and_for_unknown_words_alone(fresh):
    pipe, counts = fresh
    assert near(pipe, []) == near(pipe, iter(())) == {}
    assert counts == []
    first = near(pipe, ["foxes"])
    assert near(pipe, iter(["foxes"])) == first != {"foxes": []}
    assert near(pipe, ["storm"]) == {"storm": ["thunderstorm"]}
    assert len(counts) == 1


def test_a_table_that_changes_is_looked_through_again(fresh):
    pipe, counts = fresh
    embedding = pipe.clip.embeddings.token_embedding
    (fox,) = pipe.tokenizer.encode("fox")[1:-1]
    row = embedding.weight[fox].clone()
    assert near(pipe, ["foxes"])["foxes"][0] == "fox"
    with torch.no_grad():
        embedding.weight[fox] = 0
    assert "fox" not in near(pipe, ["foxes"])["foxes"]
    table = embedding.weight.detach().clone()
    table[fox] = row
    embedding.weight = torch.nn.Parameter(table, requires_grad=False)
    assert near(pipe, ["foxes"])["foxes"][0] == "fox"
    assert counts == [counts[0], counts[0] - 1, counts[0]]


def test_learned_words_are_known(demo, monkeypatch):
    monkeypatch.setitem(demo.words.words, "lighthouse", None)
    assert unknown_words(demo, jobs("a lighthouse")) == []
    assert unknown_words(demo, jobs("a storm")) == ["storm"]


def test_a_whole_table_knows_all():
    assert notice(tiny_pipeline(), jobs("a lighthouse in a storm", "qqqq xyz")) == ""


def test_the_command_says_it_in_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("SD_CKPT", raising=False)
    draw = ["--steps", "1", "--ckpt", str(DEMO_CHECKPOINT), "--out", str(tmp_path / "{index}.png"), "--opt", "none"]
    many = [part for word in "abcdef" for part in ("--prompt", f"{word * 9}q")]
    assert inference.main([*draw, "--prompt", "a lighthouse", "--prompt", "a fox", *many]) == 0
    (line,) = [line for line in caplog.messages if "has not learned" in line]
    assert line.startswith("the model has not learned 'lighthouse' (near: house, light), ")
    assert line.endswith(" and 1 others, and draws something else for them")
    caplog.clear()
    assert inference.main([*draw, "--overwrite", "--prompt", "a red apple"]) == 0
    assert "has not learned" not in caplog.text


def test_the_service_says_it_beside_the_picture(demo):
    with serving(create_app(demo)) as client:
        status, headers, _ = client.draw(prompt="a lighthouse", steps=1)
        assert (status, json.loads(headers["x-unknown"])) == (200, {"lighthouse": ["house", "light"]})
        (picture,) = json.loads(client.draw(JSON, prompt="foxes", steps=1)[2])["pictures"]
        assert picture["unknown"]["foxes"][0] == "fox"
        status, headers, _ = client.draw(prompt="狐狸 " * 600, steps=1)
        assert (status, len(headers["x-unknown"]) < 4000) == (200, True)
        assert "x-unknown" not in client.draw(prompt="a fox", steps=1)[1]
