"""A file is judged by what it holds: a whole model loads, whatever else lies beside it."""

import argparse
import collections
import logging
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sd import model_loader
from tests.checkpoints.common import assert_same, error_of

FOREIGN = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "LoRA",
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "conditioner.embedders.0.transformer.text_model.x": "Stable Diffusion XL",
    "logit_scale": "holds no|not a whole|layout",
    "embedding_manager.string_to_param.*": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_model_loads_and_says_what_it_left_out(tmp_path, models, tensors, caplog, name):
    save_file({**tensors, name: torch.zeros(3)}, tmp_path / "weights.safetensors")
    assert_same(model_loader.load(tmp_path / "weights.safetensors")[1:], models)
    assert f"left out 1 tensors that are no part of the model: {name}" in caplog.text


def test_usual_leftovers_are_not_told(tmp_path, tensors, caplog):
    usual = ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "model_ema.decay", "posterior_mean_coef1")
    text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file({**tensors, **{name: torch.zeros(3) for name in (*usual, text)}}, tmp_path / "weights.safetensors")
    caplog.set_level(logging.INFO)
    model_loader.load(tmp_path / "weights.safetensors")
    assert not caplog.records


@pytest.mark.parametrize("part", ["cond_stage_model.", "model.diffusion_model.", "first_stage_model."])
def test_where_a_part_is_missing_the_family_is_named(tmp_path, tensors, part):
    rest = {name: t for name, t in tensors.items() if not name.startswith(part)}
    save_file({**rest, "control_model.input_blocks.0.0.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    assert "a ControlNet" in error_of(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("config", ["{}", "yes", '{"model": "x"}', "[1]", '{"text": 1}', "[" * 5000])
def test_a_config_of_others_in_the_metadata(tmp_path, models, tensors, config):
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"config": config, "format": "pt"})
    assert_same(model_loader.load(tmp_path / "weights.safetensors")[1:], models)


def test_a_config_of_our_own_is_held_to(tmp_path, tensors):
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"config": '{"text": {}, "unet": {}, "vae": 3}'})
    assert "the configuration in its metadata is bad" in error_of(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    "keys", [["state_dict"], ["model"], ["module"], ["model", "state_dict"], ["state_dict", "module"]]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_under_other_keys(tmp_path, models, tensors, keys, zipped):
    content = tensors
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)


BESIDE = {
    "array": np.arange(6.0).reshape(2, 3),
    "scalar": np.float64(3.0),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "nested": collections.defaultdict(dict, {"a": {"b": 1}}),
    "parameters": nn.ParameterDict({"a": nn.Parameter(torch.zeros(2))}),
    "list": nn.ParameterList([nn.Parameter(torch.zeros(2))]),
    "path": pathlib.PosixPath("/tmp/x"),
    "namespace": argparse.Namespace(a=1),
    "frozenset": frozenset([1, 2]),
    "set": {1, 2},
    "ordered": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_leave_beside_the_weights_does_nothing(tmp_path, models, tensors, kind, zipped):
    if kind in ("parameters", "list") and not zipped:
        pytest.skip("torch pickled their source code then, which nothing reads")
    content = {"state_dict": tensors, "hyper_parameters": BESIDE[kind]}
    torch.save(content, tmp_path / "weights.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("evil", [Evil(print, "it ran"), Evil(eval, "1"), Evil(getattr, 1, "real"), Evil(exec, "1")])
def test_what_would_run_is_refused_among_them(tmp_path, tensors, evil, capfd):
    content = {"state_dict": tensors, "a": collections.defaultdict(list, {"a": [evil]}), "b": np.arange(3)}
    torch.save(content, tmp_path / "weights.ckpt")
    assert "refuses to run builtins." in error_of(tmp_path / "weights.ckpt")
    assert capfd.readouterr().out == ""


def test_a_matrix_of_zeros_is_told(tmp_path, models, tensors, caplog):
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    zeros = {**tensors, name: torch.zeros_like(tensors[name])}
    save_file(zeros, tmp_path / "weights.safetensors")
    model_loader.load(tmp_path / "weights.safetensors")
    assert f"{name} is all zeros: the file may have been cut and padded" in caplog.text
    assert caplog.text.count("all zeros") == 1
