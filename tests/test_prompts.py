"""Prompt syntax, chunks and weights, beside transformers' tokens and hidden states and a written-out definition."""

import copy

import numpy as np
import pytest
import torch
from compel import Compel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from bench.reference.numbers import pixels, relative_error
from bench.reference.oracles import transformers_clip
from bench.reference.weights import TINY
from sd import inference, optimizations
from sd.pictures.png import read_parameters
from sd.pipeline import DATA, StableDiffusion
from sd.prompts import BREAK, parse, tokenize
from sd.tokenizer import Tokenizer
from tests.optimizations.stand_in import install
from tests.weights import random_models, tiny_pipeline

OURS = Tokenizer()
THINGS = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("fox", "owl", "tree", "car", "hat")]
LONG = ", ".join(THINGS)
LONGER = ", ".join([LONG] * 3)


@pytest.fixture(scope="module")
def theirs() -> CLIPTokenizer:
    return CLIPTokenizer(str(DATA / "vocab.json"), str(DATA / "merges.txt"))


# ---- text to pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a fox", [("a fox", 1.0)]),
        ("", []),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(a: b:0.5)", [("a: b", 0.5)]),
        ("(red)", [("(red)", 1.0)]),
        ("(red:very)", [("(red:very)", 1.0)]),
        ("(red:1e999)", [("(red:1e999)", 1.0)]),
        ("(red:nan)", [("(red:nan)", 1.0)]),
        ("[red] {x}", [("[red] {x}", 1.0)]),
        (r"\(red:1.3\)", [("(red:1.3)", 1.0)]),
        ("(a:1.2)(b:1.2)", [("ab", 1.2)]),
        ("(fox:-1)", [("fox", -1.0)]),
        ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("a BREAKFAST b", [("a BREAKFAST b", 1.0)]),
        ("(a BREAK b:1.5)", [("a", 1.5), BREAK, ("b", 1.5)]),
    ],
)
def test_weights(text, pieces):
    assert parse(text) == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1**2)]),
        ("(a (red:1.3) fox:0.5)", [("a ", 0.5), ("red", 0.65), (" fox", 0.5)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("([red])", [("red", 1.0)]),
        (r"a \(red\) \[fox\]", [("a (red) [fox]", 1.0)]),
        ("a: b", [("a: b", 1.0)]),
        # The examples of AUTOMATIC1111's own parser.
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(((house)))", [("house", 1.1**3)]),
    ],
)
def test_a1111(text, pieces):
    found = parse(text, "a1111")
    assert [words for words, _ in found] == [words for words, _ in pieces]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in pieces], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "syntax", "message"),
    [
        ("(red", "a1111", r"the bracket \( is not closed in the prompt '\(red'; write \\\("),
        ("red]", "a1111", r"a bracket is closed that is not open in the prompt 'red\]'"),
        ("(red]", "a1111", "a bracket is closed that is not open"),
        ("(red:1000)", "weights", "must be from -10 to 10, not 1000"),
        ("(((((((((((((((((((((((((x)))))))))))))))))))))))))", "a1111", "must be from -10 to 10, not 10.8"),
        (f"(red:{'9' * 400})", "weights", "must be from -10 to 10, not inf"),
        (f"(red:-{'9' * 5000}.5)", "a1111", "must be from -10 to 10, not -inf"),
        ("(" * 200 + "red" + ":9)" * 200, "a1111", "must be from -10 to 10, not 7"),
        ("(" * 400 + "red" + ":9)" * 399 + ":0)", "a1111", "must be from -10 to 10, not nan"),
        ("red", "other", "no prompt syntax 'other'; there are weights, a1111, plain"),
    ],
)
def test_what_makes_no_sense(text, syntax, message):
    with pytest.raises(ValueError, match=message):
        parse(text, syntax)


@given(st.text(st.sampled_from("ab ,:()[]\\1.BREAK"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused(text):
    assert parse(text, "plain") == [(text, 1.0)]
    parse(text)
    try:
        pieces = parse(text, "a1111")
    except ValueError:
        return
    assert all(words and np.isfinite(weight) for words, weight in pieces)


# ---- pieces to tokens


@pytest.mark.parametrize("text", ["", "a red fox", "naïve café, 3 (owls)", LONG[:200], "word " * 75])
def test_a_prompt_without_forms_has_the_tokens_it_had(theirs, text):
    read = tokenize(text, OURS)
    assert read.ids == theirs([text], padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert read.ids == OURS([text]).tolist()
    assert not read.weighted


@pytest.mark.parametrize("text", ["", "a red fox", "a fox " * 60, "a fox " * 100, "the quick brown fox " * 40])
def test_without_weights_the_context_is_that_of_compel(theirs, text):
    """Weights it defines otherwise: between the context and that of an empty prompt."""
    pipe = tiny_pipeline()
    tokenizer = copy.copy(theirs)
    tokenizer.model_max_length = 77
    compel = Compel(tokenizer, transformers_clip(pipe.clip, pipe.config.text), truncate_long_prompts=False)
    wanted = compel.pad_conditioning_tensors_to_same_length([compel(""), compel(text)])
    assert relative_error(pipe.encode_prompts([text], [""]), torch.cat(wanted)) < 1e-6


def test_long_prompts_are_cut_at_commas_and_lose_nothing(theirs):
    text = LONGER.replace("a ", "a very big ")
    read = tokenize(text, OURS)
    assert len(read.ids) == 4
    assert {len(row) for row in read.ids} == {77}
    kept = [token for row in read.ids for token in row if token not in (OURS.start_id, OURS.end_id)]
    assert kept == theirs(text)["input_ids"][1:-1]
    comma = theirs(",")["input_ids"][1]
    for row in read.ids[:-1]:
        assert [token for token in row if token != OURS.end_id][-1] == comma


@given(st.lists(st.integers(0, 24), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_where_chunks_end(words_between_commas):
    """AUTOMATIC1111's rule: before a word that has no place, behind the last comma of tokens 55 to 74, if any."""
    text = ", ".join("x " * count for count in [54, *words_between_commas])
    rest, x, comma = OURS.encode(text)[1:-1], *OURS.encode("x,")[1:-1]
    expected = []
    while len(rest) > 75:
        near = [i for i in range(55, 75) if rest[i] == comma]
        end = near[-1] + 1 if near and rest[75] == x else 75
        expected.append(rest[:end])
        rest = rest[end:]
    found = [[i for i in row if i in (x, comma)] for row in tokenize(text, OURS).ids]
    assert found == [*expected, rest]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("x " * 54 + "," + "x " * 21, 75),  # the comma is the 21st from the end
        ("x " * 55 + "," + "x " * 20, 56),
        ("x " * 60 + "," + "x " * 14 + ", x", 75),  # what has no place is a comma
    ],
)
def test_the_ends_of_where_a_comma_counts(text, first):
    x, comma = OURS.encode("x,")[1:-1]
    assert sum(token in (x, comma) for token in tokenize(text, OURS).ids[0]) == first


def test_words_without_a_comma_fill_a_chunk(theirs):
    read = tokenize("word " * 80, OURS)
    assert [row.count(theirs("word")["input_ids"][1]) for row in read.ids] == [75, 5]
    far = tokenize("a, " + "word " * 80, OURS)
    assert far.ids[0][76] == OURS.end_id
    assert far.ids[0].count(theirs("word")["input_ids"][1]) == 73


def test_break_and_weights_by_token():
    read = tokenize("a (red fox:1.5) BREAK owl", OURS)
    assert [w for w in read.weights[0] if w != 1] == [1.5, 1.5]
    assert len(read.ids) == 2
    assert read.ids[1] == tokenize("owl", OURS).ids[0]


# ---- tokens to a context


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return tiny_pipeline()


def chunk_by_chunk(pipe: StableDiffusion, ids: list[list[int]], skip: int = 1) -> torch.Tensor:
    """What transformers makes of each chunk: [S, C]."""
    encoder = transformers_clip(pipe.clip, pipe.config.text)
    with torch.no_grad():
        states = encoder(torch.tensor(ids), output_hidden_states=True).hidden_states[-skip]
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return norm(states).flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("text", ["a red fox", LONGER, "a BREAK b BREAK c"])
def test_chunks_one_after_the_other(pipe, text):
    context = pipe.encode_prompts([text], None)
    assert relative_error(context[0], chunk_by_chunk(pipe, tokenize(text, OURS).ids)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mean", [0.3, 0.0])
@pytest.mark.parametrize("more", ["", " BREAK an owl", " BREAK an (owl:0.2) and a (fox:3) BREAK a hat"])
def test_weights_keep_the_mean_of_each_chunk_where_there_is_one(mean, more):
    pipe = tiny_pipeline()
    norm = pipe.clip.final_layer_norm
    norm.bias += mean - norm.bias.mean()
    norm.weight.fill_(1)
    text = "a (red:1.4) fox, (blurry:0.3)" + more
    read = tokenize(text, OURS)
    plain = chunk_by_chunk(pipe, read.ids).double()
    expected = plain * torch.tensor(read.weights, dtype=torch.float64).flatten()[:, None]
    for before, after in zip(plain.split(77), expected.split(77), strict=True):
        after *= before.mean() / after.mean() if mean else 1
    context = pipe.encode_prompts([text], None)[0]
    assert relative_error(context, expected) < 1e-5
    assert relative_error(context, plain) > 1e-3
    assert relative_error(pipe.encode_prompts([text], None, "plain")[0], expected[:77]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(pipe, skip):
    context = pipe.encode_prompts(["a red fox"], None, clip_skip=skip)
    assert relative_error(context[0], chunk_by_chunk(pipe, tokenize("a red fox", OURS).ids, skip)) < 1e-5


@torch.no_grad()
def test_halves_and_batches_have_the_chunks_of_the_longest(pipe):
    texts, negatives = ["a fox", LONGER], ["blurry", ""]
    context = pipe.encode_prompts(texts, negatives)
    assert context.shape == (4, 3 * 77, pipe.config.text.width)
    empty = pipe.encode_prompts([""], None)[0]
    for row, text in zip(context, (*negatives, *texts), strict=True):
        alone = pipe.encode_prompts([text], None)[0]
        assert relative_error(row[: len(alone)], alone) < 1e-6
        rest = row[len(alone) :].unflatten(0, (-1, 77))
        assert all(relative_error(chunk, empty) < 1e-6 for chunk in rest)


# ---- pictures


DRAW = {"steps": 2, "seed": 3}


def test_plain_prompts_draw_what_they_drew(pipe):
    for text in ("a red fox", "(red) [fox] a: b"):
        draw = lambda syntax, text=text: pixels(pipe.generate(text, prompt_syntax=syntax, **DRAW))  # noqa: E731
        assert np.array_equal(draw(None), draw("plain"))
    weighted, plain = (pixels(pipe.generate(text, **DRAW)) for text in ("a (red:3) fox", "a red fox"))
    assert not np.array_equal(weighted, plain)


MIXED = ["a fox", LONGER, "an owl", "a BREAK b", f"[a fox:{LONGER}:1]"]


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1}, {"init_image": True}, {"hires": 2}, {"latents": True}])
def test_a_picture_is_the_same_alone_and_beside_longer_prompts(pipe, options):
    """An empty chunk more changes what is drawn, also one of a negative prompt."""
    prompts, negatives, seeds = [*MIXED, "a fox"], [""] * len(MIXED) + [LONGER], list(range(6))
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    starts = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green", "white", "black", "yellow")]
    own = {name: {"init_image": starts, "latents": noise}[name] for name, given in options.items() if given is True}
    shared = {"steps": 2, "prompt_syntax": "a1111", "height": 64, "width": 64, **options}
    together = pipe.generate(prompts, negatives, seed=seeds, **{**shared, **own})
    for i, (image, text, negative) in enumerate(zip(together, prompts, negatives, strict=True)):
        one = {name: given[i : i + 1] for name, given in own.items()}
        (alone,) = pipe.generate(text, negative, seed=i, **{**shared, **one})
        assert np.abs(pixels([alone]) - pixels([image])).max() <= 1, text
        assert (image.info["prompt"], image.info["seed"]) == (text, i)


def test_on_step_sees_each_batch(pipe):
    seen = []
    on_step = lambda step, steps, latents: seen.append((step, len(latents)))  # noqa: E731
    pipe.generate(["a fox", LONGER, "an owl"], on_step=on_step, **DRAW)
    assert seen == [(1, 2), (2, 2), (1, 1), (2, 1)]


def test_the_command_draws_a_picture_beside_longer_ones_as_alone(tmp_path, shallow_checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--ckpt", str(shallow_checkpoint), "--device", "cpu", "--opt", "none", "--steps", "2"]
    prompts = ["a fox", LONGER, f"[an owl:{LONGER}:1]", "a car"]
    asked = [part for text in prompts for part in ("--prompt", text)]
    syntax = ["--prompt-syntax", "a1111", "--seed", "1"]
    assert inference.main([*asked, *shared, *syntax, "--batch-size", "4", "--out", "all.png"]) == 0
    files = sorted(tmp_path.glob("all*.png"))
    said = [read_parameters(file) for file in files]
    assert [(one["prompt"], one["batch"]) for one in said] == list(
        zip(prompts, [[0, 2], [0, 1], [0, 1], [1, 2]], strict=True)
    )
    for file in files:
        again = ["--from-png", str(file), "--ckpt", str(shallow_checkpoint), "--device", "cpu", "--out", "again.png"]
        assert inference.main(again) == 0
        assert file.read_bytes() == (tmp_path / "again.png").read_bytes()
        (tmp_path / "again.png").unlink()


@pytest.mark.parametrize(
    "names", ["kv-cache,packed-qkv,time-cache", "cuda-graph,kv-cache", "loop-graph", "tgate=1,shared-halves"]
)
def test_long_weighted_prompts_beside_optimizations(monkeypatch, names):
    if "graph" in names:
        install(monkeypatch)
    fast, plain = (StableDiffusion(TINY, *random_models(TINY)) for _ in range(2))
    optimizations.apply(fast, names)
    if "tgate" in names:
        optimizations.apply(plain, "tgate=1")
    for text, skip in ((LONGER + ", (owl:1.3), " + LONG, None), ("a fox", 2), ("a (fox:0.4)", None)):
        a, b = (pixels(p.generate(text, "blurry", clip_skip=skip, **DRAW)) for p in (fast, plain))
        assert np.abs(a - b).max() <= 1
