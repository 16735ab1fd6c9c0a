"""How many pictures at once, and what a PNG says of the place in a batch."""

import pytest
import torch
from PIL import Image

from bench.reference.weights import tiny_config
from sd.pictures import drawing
from sd.pictures.parameters import UserError
from sd.pictures.plan import Entry, plan


def test_the_batch_grows_with_memory_and_shrinks_with_the_picture(monkeypatch):
    config, cuda = tiny_config(), torch.device("cuda")
    one = drawing.picture_bytes(config, 64, 64, torch.float32)
    for free, at_once in [(0, 1), (one, 1), (10 * one, 8), (10**15, drawing.MOST_ON_ACCELERATOR)]:
        monkeypatch.setattr(drawing, "free_memory", lambda device, free=free: free)
        assert drawing.pictures_at_once(config, 64, 64, torch.float32, cuda) == at_once
    assert drawing.picture_bytes(config, 128, 64, torch.float16) == one


def test_memory_of_this_machine():
    free = drawing.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


class Pipe:
    """Returns empty pictures, and keeps what it was asked for."""

    config = tiny_config()

    def generate(self, prompts, **given):
        self.prompts, self.given = prompts, given
        return [Image.new("RGB", (8, 8)) for _ in prompts]


def test_a_batch_is_one_call_with_every_parameter():
    jobs = plan([Entry("", {"prompt": "a", "negative_prompt": "n"}), Entry("", {"prompt": "b"})], {"steps": 3}, 7)
    pipe, start = Pipe(), Image.new("RGB", (8, 8))
    pictures = drawing.draw_batch(pipe, jobs, start)
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
        drawing.check_sizes(Pipe(), [(job, None) for job in jobs])
