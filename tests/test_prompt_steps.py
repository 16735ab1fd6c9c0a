"""Prompts that change over the steps: examples, any tree beside what it means, and what the network is given."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.reference.numbers import pixels
from sd import inference, optimizations
from sd.pictures.png import read_parameters
from sd.prompt_steps import over_steps
from tests.optimizations.stand_in import install
from tests.weights import shallow_pipeline

SIDE = 16


@pytest.mark.parametrize(
    ("prompt", "steps", "forms"),
    [
        ("a [cat:dog:0.5]", 4, ["a cat", "a cat", "a dog", "a dog"]),
        ("a [cat:dog:1]", 3, ["a cat", "a dog", "a dog"]),
        ("a [dog: 2 ] b", 3, ["a  b", "a  b", "a dog b"]),
        ("[cat::.25] x", 4, ["cat x", " x", " x", " x"]),
        (f"[a:b:{'9' * 400}]", 2, ["a", "a"]),
        (f"[a:b:{'9' * 5000}.5]", 2, ["a", "a"]),
        (f"[a:b:.{'0' * 400}1]", 2, ["b", "b"]),
        ("[a|b|c]", 5, list("abcab")),
        ("[fe|]male", 3, ["female", "male", "female"]),
        ("[(a:2):1]", 2, ["", "(a:2)"]),
        ("x[[[b]]:1]", 2, ["x", "x[[b]]"]),
        ("a[b:[c:d:2]:1]e", 4, ["abe", "ace", "ade", "ade"]),
        ("[[a|b]:(c:1.2):3]", 4, ["a", "b", "a", "(c:1.2)"]),
        ("(big [cat:dog:1]:1.3)", 2, ["(big cat:1.3)", "(big dog:1.3)"]),
        ("((a][:b:c [d:1]", 2, ["((a][:b:c ", "((a][:b:c d"]),
        *(
            (same, 3, [same] * 3)
            for same in ("[soft]", "a [open", "a ] b", r"\[a:b:1\]", "[a:b:c]", "[a:b|c]", "(a:1.2)")
        ),
    ],
)
def test_forms(prompt, steps, forms):
    assert over_steps(prompt, steps) == forms


words = st.text("ab c", max_size=4)


def trees(inner):
    """A prompt with what it says at a step."""
    whole = st.integers(0, 9)
    share = st.integers(0, 100).map(lambda n: n / 100)

    def changing(first, then, at):
        text = f"[{first[0]}:{then[0]}:{at}]"
        return text, lambda i, n: (first if i < (int(at * n) if isinstance(at, float) else at) else then)[1](i, n)

    def alternating(options):
        return f"[{'|'.join(text for text, _ in options)}]", lambda i, n: options[i % len(options)][1](i, n)

    def joined(parts):
        return "".join(text for text, _ in parts), lambda i, n: "".join(part(i, n) for _, part in parts)

    return (
        st.builds(changing, inner, inner, whole | share)
        | st.lists(inner, min_size=2, max_size=4).map(alternating)
        | st.lists(inner, max_size=3).map(joined)
        | inner.map(lambda one: (f"({one[0]}:1.1)", lambda i, n: f"({one[1](i, n)}:1.1)"))
    )


leaves = words.map(lambda text: (text, lambda i, n: text))


@given(st.recursive(leaves, trees, max_leaves=8), st.integers(1, 12))
def test_any_tree(tree, steps):
    text, at = tree
    assert over_steps(text, steps) == [at(i, steps) for i in range(steps)]
    for syntax in ("weights", "plain", None):
        assert over_steps(text, steps, syntax) == [text] * steps


def test_too_many_in_each_other():
    with pytest.raises(ValueError, match="over 100 brackets stand in each other"):
        over_steps("[" * 10_000 + "a|b", 3)


def contexts_of(pipe, monkeypatch, *args, **kwargs):
    """What the UNet is called with, step by step."""
    seen, predict = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, context: seen.append(context) or predict(x, t, context))
    pipe.generate(*args, height=SIDE, width=SIDE, prompt_syntax="a1111", **kwargs)
    return seen


def test_the_network_is_given_each_form_at_its_steps(monkeypatch):
    pipe = shallow_pipeline()
    seen = contexts_of(pipe, monkeypatch, "a [cat|dog]", "[red:blue:0.5]", steps=4, seed=1)
    forms = [("red", "a cat"), ("red", "a dog"), ("blue", "a cat"), ("blue", "a dog")]
    assert [pipe.encode_prompts([p], [n], "a1111").tolist() for n, p in forms] == [c.tolist() for c in seen]
    seen = contexts_of(pipe, monkeypatch, "[cat:dog:3]", steps=4, seed=1, sampler="heun")
    assert len({id(context) for context in seen}) == 2, "one object for the steps in which it stays"
    assert len(seen) == 7


def test_a_picture_that_starts_from_another_is_drawn_by_the_last_steps(monkeypatch):
    from PIL import Image

    pipe, image = shallow_pipeline(), Image.new("RGB", (SIDE, SIDE), "red")
    seen = contexts_of(pipe, monkeypatch, "[cat:dog:0.8]", steps=10, seed=1, init_image=image, strength=0.4)
    forms = [pipe.encode_prompts([form], [""], "a1111") for form in ("cat", "cat", "dog", "dog")]
    assert all(torch.equal(a, b) for a, b in zip(seen, forms, strict=True))


@pytest.mark.parametrize(
    "names", ["kv-cache", "cuda-graph,kv-cache", "loop-graph,kv-cache", "shared-halves", "packed-qkv"]
)
def test_beside_optimizations(monkeypatch, names):
    if "graph" in names:
        install(monkeypatch)
    fast, plain = shallow_pipeline(), shallow_pipeline()
    optimizations.apply(fast, names)
    draw = {"steps": 6, "height": SIDE, "width": SIDE, "prompt_syntax": "a1111", "negative_prompt": "[x:y:2]"}
    for prompt in ("a [cat|dog] [big:small:0.5]", "an owl", "[a fox:an owl:3]"):
        a, b = (pixels(pipe.generate([prompt, "b"], seed=3, **draw)) for pipe in (fast, plain))
        assert np.abs(a - b).max() <= 1, prompt


def test_the_command(tmp_path, shallow_checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = ["--ckpt", str(shallow_checkpoint), "--device", "cpu"]
    given = ["--prompt", "[a|b]", "--prompt-syntax", "a1111", "--steps", "3", "--seed", "1"]
    assert inference.main([*given, *shared, "--out", "a.png"]) == 0
    assert read_parameters(tmp_path / "a.png")["prompt"] == "[a|b]"
    assert inference.main(["--from-png", "a.png", *shared, "--out", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    given[1] = "[a|(b]"
    assert inference.main([*given, *shared]) == 2
    assert "bracket" in capsys.readouterr().err
