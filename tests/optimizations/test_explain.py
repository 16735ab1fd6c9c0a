"""Explain: what runs in each module, and who put it there."""

import pytest
import torch

from sd import optimizations
from sd.optimizations.attention import attention_report


def rows(pipe, ending: str, part: str = "unet") -> list:
    found = [row for row in pipe.explain().rows if row.module.startswith(f"{part}.") and row.module.endswith(ending)]
    assert found, ending
    return found


def test_the_plain_pipeline_has_no_switches(make):
    explanation = make().explain()
    assert {row.switches for row in explanation.rows} == {()}
    assert {row.dtype for row in explanation.rows} == {"float32"}
    assert {row.kernel for row in explanation.rows} == {"PyTorch", "attention: SDPA, as PyTorch picks"}


def test_every_layer_is_in_it_once(make):
    pipe = make()
    layers = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm)
    modules = [m for model in (pipe.clip, pipe.unet, pipe.vae) for m in model.modules()]
    expected = sum(isinstance(m, layers) or hasattr(m, "attend") for m in modules)
    assert sum(row.count for row in pipe.explain().rows) == expected


@pytest.mark.parametrize(
    ("names", "ending", "kernel", "switches"),
    [
        ("attention=math", ".attn1", "attention: math", ("attention",)),
        ("naive", ".attn2", "attention: naive", ("naive",)),
        ("kv-cache", ".attn2", "keys and values once a prompt, attention: SDPA, as PyTorch picks", ("kv-cache",)),
        ("kv-cache", ".attn2.to_k", "PyTorch, once a prompt", ("kv-cache",)),
        ("packed-qkv", ".attn1.to_v", "by the module around it", ("packed-qkv",)),
        (
            "channels-last,pointwise-linear",
            ".proj_in",
            "matrix product over positions",
            ("channels-last", "pointwise-linear"),
        ),
        ("time-cache", ".emb_layers.*", "PyTorch, once a model", ("time-cache",)),
    ],
)
def test_what_a_switch_put_there(make, names, ending, kernel, switches):
    for row in rows(make(names), ending):
        assert (row.kernel, row.switches) == (kernel, switches)


def test_calls_that_are_wrapped_come_first(make):
    explanation = make("kv-cache", "keep-memory", "vae-tiling=16", "guidance-interval=0.0-0.5").explain()
    calls = {row.module: row.switches for row in explanation.rows[:3]}
    assert calls == {
        "pipe.generate()": ("keep-memory",),
        "unet.forward()": ("guidance-interval",),
        "vae.decode()": ("vae-tiling",),
    }


def test_dtypes_are_the_weights(make):
    assert {row.dtype for row in make("fp16").explain().rows} == {"float16"}
    kinds = {row.dtype for row in rows(make("int8-weights"), ".to_q")}
    assert len(kinds) == 1
    assert "float32" not in kinds or "Int8" in kinds.pop()


def test_the_backends_named_are_those_that_run(make):
    """Against the profiler, for what is asked for by name."""
    pipe = make("attention=math")
    ran = {run.backend for run in attention_report(pipe, 16, 16)}
    named = {row.kernel.removeprefix("attention: ") for row in pipe.explain().rows if "attention" in row.kernel}
    assert ran == named == {"math"}


def test_it_is_printed_as_a_table(make):
    text = str(make("kv-cache").explain())
    assert text.splitlines()[0].split() == ["WHERE", "WHAT", "RUNS", "DTYPE", "SWITCH"]
    assert any(line.endswith("kv-cache") for line in text.splitlines())


def test_it_is_plain_again_after_undo(make):
    pipe = make("kv-cache", "shared-halves", "keep-memory")
    optimizations.undo(pipe)
    assert pipe.explain() == make().explain()
