"""How many pictures at once, and what a PNG says of the place in a batch."""

import pytest
import torch
from PIL import Image

from bench.reference.weights import tiny_config
from sd.pictures import drawing
from sd.pictures.parameters import UserError
from sd.pictures.plan import plan
from sd.pictures.prompts_file import Entry


def test_the_batch_grows_with_memory_and_shrinks_with_the_picture(monkeypatch):
    config, cuda = tiny_config(), torch.device("cuda")
    one = drawing.picture_bytes(config, 64, 64, torch.float32)
    for free, at_once in [(one, 1), (5 * one, 4), (10**15, drawing.MOST_AT_ONCE["cuda"])]:
        monkeypatch.setattr(drawing, "free_memory", lambda device, free=free: free)
        assert drawing.pictures_at_once(config, 64, 64, torch.float32, cuda) == at_once
    assert drawing.pictures_at_once(config, 64, 64, torch.float32, torch.device("cpu")) == 1
    assert drawing.pictures_at_once(config, 64, 64, torch.float32, cuda, asked=100) == 100
    monkeypatch.setattr(drawing, "free_memory", lambda device: 3 * one)
    with pytest.raises(UserError, match=r"100 pictures of 64x64 at once takes about .* free: --batch-size 3"):
        drawing.pictures_at_once(config, 64, 64, torch.float32, cuda, asked=100)
    with pytest.raises(UserError, match=r"256x64 takes about .* GB are free: a smaller --height and --width"):
        drawing.pictures_at_once(config, 256, 64, torch.float32, cuda)
    assert drawing.picture_bytes(config, 128, 64, torch.float16) == one


def test_memory_of_this_machine():
    free = drawing.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_a_container_s_limit_less_what_would_give_way(tmp_path, monkeypatch):
    """Files that are cached count as used there, and are given up when memory is asked for."""
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 300\ninactive_file 550\nfile 600"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(drawing, "CGROUPS", tmp_path)
    assert drawing.free_memory(torch.device("cpu")) == 650
    (tmp_path / "memory.max").write_text("max")
    assert drawing.free_memory(torch.device("cpu")) > 2**20


class Pipe:
    """Returns empty pictures, and keeps what it was asked for."""

    config = tiny_config()
    source = None

    def generate(self, prompts, **given):
        self.prompts, self.given = prompts, given
        return [Image.new("RGB", (8, 8)) for _ in prompts]


def test_a_batch_is_one_call_with_every_parameter():
    jobs = plan([Entry("", {"prompt": "a", "negative_prompt": "n"}), Entry("", {"prompt": "b"})], {"steps": 3}, 7)
    pipe, start = Pipe(), Image.new("RGB", (8, 8))
    pictures = drawing.draw_batch(pipe, jobs, {"init_image": start})
    assert pipe.prompts == ["a", "b"]
    wanted = {"negative_prompt": ["n", ""], "seed": [7, 8], "steps": 3, "cfg_scale": 7.5, "sampler": "ddpm"}
    wanted |= {"height": None, "width": None, "init_image": start, "strength": 0.8, "on_step": None}
    wanted |= dict.fromkeys(("schedule", "eta", "s_noise", "solver_order", "prompt_syntax", "clip_skip", "mask"))
    wanted |= {"mask_blur": 0.0, "mask_invert": False, "hires_strength": 0.5}
    wanted |= dict.fromkeys(("mask_padding", "outpaint", "hires", "control", "control_preprocess"))
    assert pipe.given == wanted
    assert [picture.info["batch"] for picture in pictures] == [[0, 2], [1, 2]]
    assert [picture.info["seed"] for picture in pictures] == [7, 8]
    assert not {"height", "init_image", "strength"} & set(pictures[0].info)


def test_a_size_that_the_model_does_not_draw_names_its_line():
    jobs = plan([Entry("p.jsonl line 2", {"prompt": "a", "width": 100})], {}, 0)
    with pytest.raises(UserError, match=r"p\.jsonl line 2: 64x100 .* is not a multiple of 64"):
        drawing.check_sizes(Pipe(), jobs)
