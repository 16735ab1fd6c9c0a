"""Learned words beside diffusers, from files of every layout, in prompts of every form."""

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from bench.reference import oracles
from bench.reference.numbers import noise, pixels, relative_error
from bench.reference.oracles import diffusers_pipeline
from sd import inference, optimizations
from sd.checkpoints.errors import CheckpointError
from sd.pictures.png import read_parameters
from sd.pipeline import StableDiffusion
from sd.prompts import tokenize
from tests.optimizations.stand_in import install
from tests.weights import tiny_pipeline

SIDE = 64


@pytest.fixture
def pipe() -> StableDiffusion:
    return tiny_pipeline()


def vectors(pipe: StableDiffusion, count: int = 2, seed: int = 0) -> torch.Tensor:
    return 0.1 * noise(count, pipe.config.text.width, seed=seed)


def written(folder, layout: str, rows: torch.Tensor):
    """A file called toy.* that holds these vectors for the word <toy>, where it has a place for a word."""
    if layout == "a1111":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "toy", "step": 500}
        torch.save(content, folder / "toy.pt")
        return folder / "toy.pt"
    if layout == "first":
        parameters = nn.ParameterDict({"*": nn.Parameter(rows)})
        torch.save({"string_to_token": {"*": 265}, "string_to_param": parameters}, folder / "toy.pt")
        return folder / "toy.pt"
    if layout == "legacy":
        torch.save({"<toy>": rows}, folder / "toy.bin", _use_new_zipfile_serialization=False)
        return folder / "toy.bin"
    if layout == "diffusers.bin":
        torch.save({"<toy>": rows}, folder / "toy.bin")
        return folder / "toy.bin"
    name = {"diffusers": "<toy>", "emb_params": "emb_params", "clip_l": "clip_l"}[layout]
    save_file({name: rows}, folder / "toy.safetensors")
    return folder / "toy.safetensors"


LAYOUTS = ("a1111", "first", "legacy", "diffusers.bin", "diffusers", "emb_params", "clip_l")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_every_layout(pipe, tmp_path, layout):
    rows = vectors(pipe)
    (word,) = pipe.add_embedding(written(tmp_path, layout, rows))
    assert word == ("<toy>" if layout in ("legacy", "diffusers.bin", "diffusers") else "toy")
    assert torch.equal(pipe.words.words[word].vectors, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_vector_of_any_kind(pipe, tmp_path, dtype):
    rows = vectors(pipe, 1)[0].to(dtype)
    torch.save({"<toy>": rows}, tmp_path / "a.bin")
    pipe.add_embedding(tmp_path / "a.bin")
    assert torch.equal(pipe.words.vectors(), rows[None].float())


# ---- beside diffusers


def by_diffusers(pipe: StableDiffusion, path, prompt: str, negative: str) -> torch.Tensor:
    theirs = diffusers_pipeline(pipe, oracles.ddim_scheduler(), StableDiffusionPipeline)
    theirs.load_textual_inversion(str(path), token="<toy>")
    positive, negative = theirs.encode_prompt(prompt, "cpu", 1, True, negative)
    return torch.cat([negative, positive])


@pytest.mark.parametrize("prompt", ["<toy>", "a <toy> on a table", "two <toy>, <toy>", "a toy and no word"])
@pytest.mark.parametrize("syntax", ["weights", "plain", "a1111"])
def test_contexts_against_diffusers(pipe, tmp_path, prompt, syntax):
    path = written(tmp_path, "diffusers", vectors(pipe, 3))
    plain = pipe.encode_prompts([prompt], ["<toy> blurry"], syntax)
    pipe.add_embedding(path)
    ours = pipe.encode_prompts([prompt], ["<toy> blurry"], syntax)
    assert relative_error(ours, by_diffusers(pipe, path, prompt, "<toy> blurry")) < 1e-6
    assert relative_error(ours, plain) > 1e-3
    pipe.remove_embeddings()
    assert torch.equal(pipe.encode_prompts([prompt], ["<toy> blurry"], syntax), plain)


def test_a_picture_against_diffusers(pipe, tmp_path):
    path = written(tmp_path, "diffusers.bin", vectors(pipe))
    pipe.add_embedding(path)
    (ours,) = pipe.generate("a <toy>", "blurry", 6, 7.5, 3, SIDE, SIDE, "ddim")
    theirs = diffusers_pipeline(pipe, oracles.ddim_scheduler())
    theirs.load_textual_inversion(str(path))
    generator = torch.Generator().manual_seed(3)
    (expected,) = theirs(
        "a <toy>",
        negative_prompt="blurry",
        num_inference_steps=6,
        guidance_scale=7.5,
        height=SIDE,
        width=SIDE,
        generator=generator,
    ).images
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1


# ---- in prompts


def test_weights_chunks_and_clip_skip(pipe, tmp_path):
    """As if the vectors were rows of the token table: what other words of it would do."""
    rows = pipe.clip.embeddings.token_embedding.weight[[320, 736]].clone()  # "a", "red"
    path = written(tmp_path, "diffusers", rows)
    first, second = (pipe.tokenizer.decode([i]) for i in (320, 736))
    pipe.add_embedding(path)
    for text in ("({}:1.3) fox", "{} BREAK {}", "x " * 74 + "{} y", "x, " * 30 + "{}", "[{}|cat] {}"):
        for skip in (1, 2):
            with_word = text.replace("{}", "<toy>")
            spelled = text.replace("{}", f"{first} {second}")
            if text.startswith("x " * 74):  # both in the second chunk, since a word is not torn apart
                spelled = "x " * 74 + f"BREAK {first} {second} y"
            a, b = (pipe.encode_prompts([t], ["n"], "a1111", skip) for t in (with_word, spelled))
            assert torch.allclose(a, b, atol=1e-6), text


@pytest.mark.parametrize("count", [1, 19, 56, 57, 60, 74, 75])
def test_a_long_word_has_its_place_in_a_chunk(pipe, count):
    """Whatever is before it: nothing is lost, no chunk is too long, and the word is in one of them."""
    pipe.words.learn({"<toy>": vectors(pipe, count)}, Path("toy.safetensors"))
    tokenizer, first = pipe.tokenizer, pipe.config.text.vocab_size
    word = list(range(first, first + count))
    for before, after_comma in ((25, 18), (25, 20), (54, 19), (55, 19), (56, 0), (0, 74), (3, 3), (70, 5)):
        read = tokenize("x " * before + "," + " x" * after_comma + " <toy> y", tokenizer, words=pipe.words)
        assert {len(row) for row in [*read.ids, *read.weights]} == {77}
        chunks = [[i for i in row if i not in (tokenizer.start_id, tokenizer.end_id)] for row in read.ids]
        spelled = [tokenizer.encode(text)[1:-1] for text in ("x " * before + "," + " x" * after_comma, "y")]
        assert [i for chunk in chunks for i in chunk] == [*spelled[0], *word, *spelled[1]]
        assert any(chunk[i : i + count] == word for chunk in chunks for i in range(len(chunk)))
    pipe.encode_prompts(["x " * 25 + "," + " x" * 18 + " <toy>"], None)


def test_the_longest_word_wins_and_case_means_nothing(pipe, tmp_path):
    for name, seed in (("art", 1), ("art deco", 2)):
        save_file({name: vectors(pipe, 1, seed)}, tmp_path / f"{name}.safetensors")
        pipe.add_embedding(tmp_path / f"{name}.safetensors")
    first = pipe.config.text.vocab_size
    groups = list(pipe.words.groups("Art  Deco,art party art1", pipe.tokenizer))
    spelled = [pipe.tokenizer.encode(text)[1:-1] for text in (",", "party art1")]
    assert groups == [[first + 1], spelled[0], [first], *([token] for token in spelled[1])]


@pytest.mark.parametrize("names", ["cuda-graph", "loop-graph", "kv-cache", "exact", "cpu"])
def test_beside_optimizations(pipe, monkeypatch, tmp_path, names):
    install(monkeypatch)
    fast = tiny_pipeline()
    optimizations.apply(fast, names if names not in ("exact",) else "channels-last,packed-qkv,kv-cache,shared-halves")
    path = written(tmp_path, "diffusers", vectors(pipe))
    draw = {"steps": 3, "seed": 3, "height": SIDE, "width": SIDE}
    for prompt in ("a fox", "a <toy>", "a fox"):
        if prompt == "a <toy>":
            for one in (pipe, fast):
                one.add_embedding(path)
        a, b = (pixels(one.generate(prompt, **draw)[0]) for one in (pipe, fast))
        assert np.abs(a - b).max() <= 1


def test_a_saved_model_has_no_learned_words(pipe, tmp_path):
    pipe.add_embedding(written(tmp_path, "a1111", vectors(pipe)))
    pipe.save(tmp_path / "a.safetensors")
    again = StableDiffusion.load(tmp_path / "a.safetensors", "cpu")
    assert not again.words
    assert again.clip.embeddings.token_embedding.weight.shape[0] == again.config.text.vocab_size


# ---- what is wrong


def test_words_that_are_taken_or_cannot_be(pipe, tmp_path):
    path = written(tmp_path, "a1111", vectors(pipe))
    assert pipe.add_embedding(path, "My Toy") == ["My Toy"]
    with pytest.raises(ValueError, match="my toy is a learned word already, as My Toy"):
        pipe.add_embedding(path, "my toy")
    for word in ("", "  "):
        with pytest.raises(ValueError, match="cannot be a word of a prompt"):
            pipe.add_embedding(path, word)
    save_file({"one": vectors(pipe), "two": vectors(pipe)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="holds 2 words"):
        pipe.add_embedding(tmp_path / "two.safetensors", "x")
    assert sorted(pipe.add_embedding(tmp_path / "two.safetensors")) == ["one", "two"]
    with pytest.raises(ValueError, match="no learned word 'three'; there are My Toy, "):
        pipe.remove_embeddings("three")
    pipe.remove_embeddings("one")
    assert list(pipe.words.words) == ["My Toy", "two"]
    save_file({"long": vectors(pipe, 76)}, tmp_path / "long.safetensors")
    with pytest.raises(ValueError, match="long has 76 vectors, over 75"):
        pipe.add_embedding(tmp_path / "long.safetensors")


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<toy>": torch.zeros(2, 1024)}, "vectors of 1024, and this model's are of"),
        ({"<toy>": torch.full((1, 32), float("nan"))}, "<toy> "),
        ({"<toy>": torch.zeros(2, 3, 32)}, "no vectors"),
        ({"<toy>": torch.zeros(0, 32)}, "no vectors"),
        ({"<toy>": torch.zeros(2, 32, dtype=torch.int64)}, "no vectors"),
        ({"clip_g": torch.zeros(1, 1280), "clip_l": torch.zeros(1, 768)}, "Stable Diffusion XL"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(4)}, "weights of a model"),
        ({"string_to_param": torch.zeros(())}, "no vectors"),
        ({"string_to_param": {"a": torch.zeros(2, 64), "b": torch.zeros(2, 3, 64)}}, "no vectors"),
        ({"string_to_param": {"a": torch.zeros(2, 64), "b": torch.zeros(2, 1024)}}, "vectors of 1024"),
        ({"string_to_param": {}}, "holds no learned word"),
        ({"name": "toy"}, "holds no learned word"),
        ([1, 2], "holds no learned word"),
        ({"<toy>": Evil()}, "refuses to run builtins.print"),
        ({"string_to_param": {"*": Evil()}}, "refuses to run builtins.print"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_wrong_are_one_line(pipe, tmp_path, capfd, content, message, zipped):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        pipe.add_embedding(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert "a.pt" in str(error.value)
    assert capfd.readouterr().out == ""


def test_damaged_files(pipe, tmp_path):
    whole = written(tmp_path, "a1111", vectors(pipe)).read_bytes()
    random = np.random.default_rng(0)
    for i in range(60):
        data = bytearray(whole)
        if i % 2:
            del data[random.integers(1, len(data)) :]
        for place in random.integers(0, len(data), 3):
            data[place] ^= 1 << int(random.integers(8))
        (tmp_path / "b.pt").write_bytes(data)
        with suppress(CheckpointError):
            pipe.add_embedding(tmp_path / "b.pt", f"word {i}")


# ---- the command


def test_the_command(tmp_path, tiny_checkpoint, pipe, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "a1111", vectors(pipe))
    shared = ["--ckpt", str(tiny_checkpoint), "--device", "cpu"]
    line = ["--prompt", "a <toy>", "--steps", "2", "--seed", "1", *shared]
    assert inference.main([*line, "--out", "plain.png"]) == 0
    assert inference.main([*line, "--embedding", "toy.pt:<toy>", "--out", "a.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    ((name, _, word),) = read_parameters(tmp_path / "a.png")["embeddings"]
    assert (name, word) == ("toy.pt", "<toy>")
    assert inference.main(["--from-png", "a.png", *shared, "--out", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    (tmp_path / "toy.pt").unlink()
    assert inference.main(["--from-png", "a.png", *shared, "--out", "b.png"]) == 2
    assert "with the words of toy.pt" in capsys.readouterr().err
    assert inference.main([*line, "--embedding", "none.pt"]) == 2
    assert "--embedding: there is no file none.pt" in capsys.readouterr().err
