"""The recorder: swaps that would undo another's are refused, both named; what is derived is refreshed; stages hold."""

import pytest
import torch
from torch import nn

from sd.guidance import Call, Conditions, Guided
from sd.optimizations import OptimizationError
from sd.optimizations.base import Record, added, without_bias
from tests.optimizations.support import inputs


class One(nn.Linear):
    pass


class Two(nn.Linear):
    pass


class BuildsOnOne(One):
    pass


@pytest.fixture
def record(make):
    return Record(make())


def layer(record: Record) -> nn.Linear:
    return record.pipe.unet.time_embed[0]


def test_a_swap_that_would_undo_another_names_both_and_the_module(record):
    record.patch("first").swap(layer(record), One)
    with pytest.raises(OptimizationError, match=r"second would undo first in unet\.time_embed\.0"):
        record.patch("second").swap(layer(record), Two)
    assert type(layer(record)) is One


def test_a_swap_may_build_on_another_or_share_its_class(record):
    record.patch("first").swap(layer(record), One, a=1)
    record.patch("second").swap(layer(record), One, b=2)
    record.patch("third").swap(layer(record), BuildsOnOne)
    assert (type(layer(record)), layer(record).a, layer(record).b) == (BuildsOnOne, 1, 2)
    record.undo()
    assert type(layer(record)) is nn.Linear
    assert not {"a", "b"} & set(vars(layer(record)))


def test_an_attribute_that_another_switch_set_is_not_overwritten(record):
    attention = record.pipe.unet.middle_block[1].transformer_blocks[0].attn1
    record.patch("first").set(attention, "attend", max)
    with pytest.raises(OptimizationError, match=r"second would undo first in unet\.middle_block\.1"):
        record.patch("second").set(attention, "attend", min)
    assert attention.attend is max


def test_a_class_cannot_change_beneath_a_wrapped_call(record):
    record.patch("first").around(layer(record), lambda forward: forward)
    with pytest.raises(OptimizationError, match="second would undo first"):
        record.patch("second").swap(layer(record), Two)


@torch.no_grad()
def test_calls_are_wrapped_from_the_inside_out_and_unwrapped(record):
    order: list[str] = []

    def noting(name: str):
        return lambda forward: lambda *inputs: (order.append(name), forward(*inputs))[1]

    for name in ("inner", "outer"):
        record.patch(name).around("predict", noting(name))
    record.pipe.unet(*inputs())
    assert order == ["outer", "inner"]
    record.undo()
    record.pipe.unet(*inputs())
    assert order == ["outer", "inner"]


@torch.no_grad()
def test_refreshers_see_each_context_in_the_order_of_their_switches(record):
    seen = []
    first, second = record.patch("first"), record.patch("second")
    first.before_predict(lambda context: seen.append(("first", len(context))))
    second.before_predict(lambda context: seen.append(("second", len(context))))
    second.also_predicts(lambda context: context[:1] if len(context) > 1 else None)
    record.pipe.unet(*inputs())
    assert seen == [("first", 2), ("second", 2), ("first", 1), ("second", 1)]
    record.undo([second])
    record.pipe.unet(*inputs())
    assert seen[4:] == [("first", 2)]


def test_a_patch_can_be_taken_back_alone(record):
    keep, drop = record.patch("keep"), record.patch("drop")
    keep.swap(layer(record), One, a=1)
    drop.swap(layer(record), BuildsOnOne, b=2)
    drop.around("decode", lambda decode: None)
    record.undo([drop])
    assert type(layer(record)) is One
    assert set(vars(layer(record))) >= {"a"}
    assert "b" not in vars(layer(record))
    assert "decode" not in vars(record.pipe.vae)
    assert [patch.name for patch in record.patches] == ["keep"]


@torch.no_grad()
@pytest.mark.parametrize("plain", [nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(8, 4)])
def test_without_bias_leaves_out_just_the_bias(plain):
    x = torch.randn(2, 8, 5, 5) if isinstance(plain, nn.Conv2d) else torch.randn(2, 8)
    y, bias = without_bias(plain, x)
    shape = (-1, 1, 1) if isinstance(plain, nn.Conv2d) else (-1,)
    assert torch.allclose(y + bias.view(shape), plain(x), atol=1e-6)
    plain.__class__ = type("Other", (type(plain),), {})
    y, bias = without_bias(plain, x)
    assert bias is None
    assert torch.equal(y, plain(x)), "a class that does not say how has added it"


@torch.no_grad()
def test_added_is_the_sum():
    conv, x = nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 5, 5)
    shift, residual = torch.randn(2, 4), torch.randn(2, 4, 5, 5)
    assert torch.equal(added(conv, x, shift, residual), conv(x) + shift[:, :, None, None] + residual)
    assert torch.equal(added(conv, x), conv(x))


# ---- where in a picture a call is


def test_the_call_record_follows_a_picture(make):
    pipe, seen = make(), []
    predict = pipe.unet.forward
    pipe.unet.forward = lambda *given: (
        seen.append((pipe.call.step, pipe.call.steps, pipe.call.timestep, pipe.call.guided, pipe.call.halves_alike)),
        predict(*given),
    )[1]
    pipe.generate("a cat", steps=3, height=16, width=16, seed=1)
    pipe.generate("a cat", steps=2, cfg_scale=1, height=16, width=16, seed=1)
    assert seen[:3] == [(0, 3, 667, True, True), (1, 3, 334, True, True), (2, 3, 1, True, True)]
    assert seen[3:] == [(0, 2, 501, False, False), (1, 2, 1, False, False)]
    assert pipe.call == Call()


def test_the_call_record_is_as_before_after_an_error(make):
    pipe = make()

    def failing(*inputs):
        raise RuntimeError("out of memory")

    pipe.unet.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.generate("a cat", steps=3, height=16, width=16, seed=1)
    assert pipe.call == Call()


def test_guidance_says_that_halves_are_alike_only_around_its_own_calls():
    call, seen = Call(), []

    def predict(x, t, context):
        seen.append(call.halves_alike)
        return x

    Guided(predict, Conditions(torch.zeros(2, 1, 1), 7.5), call)(torch.zeros(1, 1, 2, 2), torch.tensor(1))
    Guided(predict, Conditions(torch.zeros(1, 1, 1), 1), call)(torch.zeros(1, 1, 2, 2), torch.tensor(1))
    assert seen == [True, False]
    assert not call.halves_alike
