"""Which backend attends, by chip, dtype and head size; and the report of what ran."""

import pytest
import torch

from bench.reference.weights import TINY
from sd.optimizations.attention import Chip, attention_report, backend_for


@pytest.mark.parametrize(
    ("chip", "dtype", "head_size", "backend"),
    [
        (Chip("cpu"), torch.float32, 40, "flash"),
        (Chip("cpu"), torch.float32, 512, "flash"),
        (Chip("mps"), torch.float16, 40, "math"),
        (Chip("cuda", (7, 5)), torch.float16, 40, "efficient"),
        (Chip("cuda", (7, 5)), torch.float16, 512, "math"),
        (Chip("cuda", (8, 0)), torch.float16, 40, "flash"),
        (Chip("cuda", (8, 6)), torch.bfloat16, 256, "flash"),
        (Chip("cuda", (8, 0)), torch.float16, 512, "math"),
        (Chip("cuda", (8, 0)), torch.float32, 40, "efficient"),
        (Chip("cuda", (9, 0)), torch.float16, 160, "cudnn"),
        (Chip("cuda", (9, 0)), torch.float16, 512, "efficient"),
        (Chip("cuda", (12, 0)), torch.float16, 40, "flash"),
    ],
)
def test_attention_backend_by_chip(chip, dtype, head_size, backend):
    assert backend_for(chip, dtype, head_size) == backend


@pytest.mark.parametrize(
    ("names", "backends"),
    [([], {"flash", "math"}), (["naive"], {"naive"}), (["attention=math"], {"math"}), (["attention"], {"flash"})],
)
def test_attention_report_tells_what_ran(make, names, backends):
    """Plain, the VAE falls to math: its heads are not side by side in memory, which flash wants."""
    pipe = make(*names, config=TINY)
    runs = attention_report(pipe, 64, 64)
    assert {run.backend for run in runs} == backends
    assert [run.module for run in runs[:2]] == ["clip.encoder.layers.0.self_attn", "clip.encoder.layers.1.self_attn"]
    cross = next(run for run in runs if run.module == "unet.middle_block.1.transformer_blocks.0.attn2")
    assert (cross.q, cross.keys) == ((2, 8, 1, 16), 77)
    assert runs[-1].module == "vae.decoder.mid.attn_1"
    attention = pipe.unet.middle_block[1].transformer_blocks[0].attn2
    assert ("attend" in vars(attention)) == bool(names), "the report leaves no trace"
