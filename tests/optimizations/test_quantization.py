"""The quantization schemes on a small model: what is stored, which kernels run, how far off, and files."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.ao.nn.quantized as nnq
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub

from bench import common, sensitivity
from bench.reference.numbers import relative_error
from sd import optimizations
from sd.guidance import Conditions
from sd.noise import PictureNoise
from sd.optimizations import OptimizationError, quantization, quantized_files
from sd.optimizations.quantization import quantize, weight_bytes
from sd.optimizations.quantized_files import load_quantized, save_quantized
from sd.pipeline import StableDiffusion
from sd.samplers import choose
from sd.schedules import at_timesteps
from sd.unet import CrossAttention, FeedForward
from tests.weights import SHALLOW
from tests.weights import shallow_pipeline as pipeline

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "input_blocks.1.1.transformer_blocks.0"
STATIC_LAYERS = [f"{BLOCK}.attn1", f"{BLOCK}.ff", f"{BLOCK}.attn2"]


def int8_static(pipe: StableDiffusion, layers: list[str] | None = None, **options) -> None:
    """A block of the transformers, unless others are named: calibration takes its time."""
    layers = STATIC_LAYERS if layers is None else layers
    quantize(pipe, "int8_static", layers, **{"prompts": ["a red apple"], "steps": 2, **options})


APPLY = {
    "int8_weight_only": lambda pipe: quantize(pipe, "int8_weight_only"),
    "int8_dynamic": lambda pipe: quantize(pipe, "int8_dynamic"),
    "int8_static": int8_static,
}
every_scheme = pytest.mark.parametrize("scheme", APPLY)


@torch.no_grad()
def latents(pipe: StableDiffusion) -> Tensor:
    """After two steps from fixed noise."""
    noise = PictureNoise([5], (4, 8, 8), pipe.device, torch.float32)
    conditions = Conditions(pipe.encode_prompts(["a cat"], [""]), 3.0)
    return pipe.sample(noise(), conditions, choose("ddim"), at_timesteps([501, 1]), noise)


@torch.no_grad()
def predicted_noise(pipe: StableDiffusion) -> Tensor:
    noise = PictureNoise([5], (4, 8, 8), pipe.device, pipe.dtype)()
    return pipe.unet(noise, torch.tensor(501), pipe.encode_prompts(["a cat"], None))


def kernels(pipe: StableDiffusion) -> dict[str, int]:
    """Names of the operators that one UNet call runs, and how often."""
    with torch.profiler.profile() as profile:
        predicted_noise(pipe)
    return {event.key: event.count for event in profile.key_averages()}


def linears(pipe: StableDiffusion) -> dict[str, nn.Linear]:
    return {name: module for name, module in pipe.unet.named_modules() if isinstance(module, nn.Linear)}


# --- what is stored, and what runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
def test_torchao_weights_are_int8_and_within_half_a_quantum(scheme):
    plain, pipe = pipeline(), pipeline()
    APPLY[scheme](pipe)
    for name in pipe.unet.quantization.layers:
        weight, expected = pipe.unet.get_submodule(name).weight, linears(plain)[name].weight
        assert weight.qdata.dtype == torch.int8
        assert weight.qdata.unique().numel() > 100
        assert weight.scale.shape == (expected.shape[0], 1)
        assert ((weight.dequantize() - expected).abs() <= weight.scale * 0.5001).all()


@pytest.mark.parametrize("engine", ["x86", "onednn"])
def test_static_weights_are_int8_and_within_half_a_quantum(engine):
    plain, pipe = pipeline(), pipeline()
    int8_static(pipe, engine=engine)
    packed = {name: m for name, m in pipe.unet.named_modules() if isinstance(m, nnq.Linear)}
    assert len(packed) == 4 + 2 + 4
    for name, module in packed.items():
        assert module.weight().int_repr().dtype == torch.int8
        scale = module.weight().q_per_channel_scales()[:, None]
        assert ((module.weight().dequantize() - linears(plain)[name].weight).abs() <= scale * 0.5001).all()


def test_weight_only_multiplies_in_floating_point():
    pipe = pipeline()
    quantize(pipe, "int8_weight_only")
    linear = pipe.unet.get_submodule(f"{BLOCK}.attn1.to_q")
    x = torch.randn(3, linear.in_features)
    torch.testing.assert_close(linear(x), x @ linear.weight.dequantize().T)
    assert "aten::_int_mm" not in kernels(pipe)


def test_dynamic_multiplies_in_int8():
    pipe = pipeline()
    quantize(pipe, "int8_dynamic")
    assert kernels(pipe)["aten::_int_mm"] == len(pipe.unet.quantization.layers) == 40


@pytest.mark.parametrize("engine", ["x86", "onednn"])
def test_static_multiplies_in_int8(engine):
    pipe = pipeline()
    int8_static(pipe, engine=engine)
    assert kernels(pipe)["quantized::linear"] == 10


def test_static_takes_all_transformers_by_default():
    pipe = pipeline()
    quantize(pipe, "int8_static", prompts=["a red apple"], steps=1)
    assert len(pipe.unet.quantization.layers) == 2 * 4 + 4
    assert sum(isinstance(module, nnq.Linear) for module in pipe.unet.modules()) == 4 * 8 + 2 * 4


def test_static_feed_forward_computes_what_its_scales_say():
    pipe = pipeline()
    int8_static(pipe, [f"{BLOCK}.ff"])
    ff = pipe.unet.get_submodule(f"{BLOCK}.ff")

    def rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
        return ((x / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale

    def linear(x: Tensor, quant: nnq.Quantize, layer: nnq.Linear) -> Tensor:
        x = rounded(x, quant.scale.item(), quant.zero_point.item())
        weight, bias = layer._weight_bias()
        return rounded(x @ weight.dequantize().T + bias, layer.scale, layer.zero_point)

    x = torch.randn(2, 64, SHALLOW.unet.model_channels)
    value, gate = linear(x, ff.net[0].quant, ff.net[0].proj).chunk(2, dim=-1)
    expected = linear(value * nn.functional.gelu(gate), ff.quant, ff.net[2])
    # A value next to the border between two numbers may fall to either side, and the second layer hands that on.
    assert relative_error(ff(x), expected) < 0.01


# --- how far off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "bound"), [("int8_weight_only", 0.03), ("int8_dynamic", 0.05), ("int8_static", 0.15)]
)
def test_error_is_bounded_and_not_zero(scheme, bound):
    pipe = pipeline()
    expected = predicted_noise(pipe)
    APPLY[scheme](pipe)
    assert 1e-4 < relative_error(predicted_noise(pipe), expected) < bound


def test_weight_only_keeps_half_precision_activations():
    pipe = pipeline(torch.float16)
    expected = predicted_noise(pipe)
    quantize(pipe, "int8_weight_only")
    actual = predicted_noise(pipe)
    assert actual.dtype == torch.float16
    assert relative_error(actual, expected) < 0.03


@pytest.mark.parametrize(("vnni", "highest"), [(False, 127), (True, 255)])
def test_static_activations_have_seven_bits_without_vnni(monkeypatch, vnni, highest):
    monkeypatch.setattr(quantization, "has_vnni", lambda: vnni)
    pipe = pipeline()
    int8_static(pipe, [f"{BLOCK}.attn1"])
    seen = []
    quant = pipe.unet.get_submodule(f"{BLOCK}.attn1").quant_x
    quant.register_forward_hook(lambda _module, _inputs, output: seen.append(output.int_repr().max().item()))
    predicted_noise(pipe)
    assert highest * 0.7 < max(seen) <= highest * 1.1
    assert pipe.unet.quantization.reduce_range is not vnni


# --- the plain model --------------------------------------------------------------------------------------------------


def test_plain_model_has_no_quantization_points():
    pipe = pipeline()
    assert not any(isinstance(m, QuantStub | DeQuantStub) for m in pipe.unet.modules())
    assert {type(m) for m in pipe.unet.modules() if isinstance(m, CrossAttention | FeedForward)} == {
        CrossAttention,
        FeedForward,
    }


@every_scheme
def test_quantizing_one_pipeline_leaves_another_over_the_same_weights_alone(scheme):
    plain = pipeline()
    expected = predicted_noise(plain)
    other = common.clone_pipeline(plain)
    APPLY[scheme](other)
    assert torch.equal(predicted_noise(plain), expected)
    assert not torch.equal(predicted_noise(other), expected)


def test_prepared_model_has_the_points_and_the_plain_parameter_names():
    plain, pipe = pipeline(), pipeline()
    quantization._prepare(pipe.unet, quantization.default_layers(pipe, "int8_static"), reduce_range=True)
    assert [name for name, _ in pipe.unet.named_parameters()] == [name for name, _ in plain.unet.named_parameters()]
    attention, ff = pipe.unet.get_submodule(f"{BLOCK}.attn2"), pipe.unet.get_submodule(f"{BLOCK}.ff")
    assert isinstance(attention.quant_x, QuantStub)
    assert isinstance(attention.dequant, DeQuantStub)
    assert isinstance(ff.net[0].quant, QuantStub)
    assert isinstance(ff.dequant, DeQuantStub)
    torch.testing.assert_close(predicted_noise(pipe), predicted_noise(plain), rtol=0, atol=0)


def test_failed_calibration_leaves_the_model_plain():
    pipe = pipeline()
    expected = predicted_noise(pipe)
    with pytest.raises(ValueError, match="99x99"):
        int8_static(pipe, size=99)
    with pytest.raises(ValueError, match="at least one prompt"):
        int8_static(pipe, prompts=[])
    assert {type(m) for m in pipe.unet.modules()} == {type(m) for m in pipeline().unet.modules()}
    assert torch.equal(predicted_noise(pipe), expected)


def test_engine_and_inductor_settings_stay_as_they_were():
    from torch._inductor import config

    before = torch.backends.quantized.engine, config.coordinate_descent_tuning, config.epilogue_fusion
    int8_static(pipeline(), [f"{BLOCK}.ff"], engine="onednn")
    quantize(pipeline(), "int8_dynamic", [f"{BLOCK}.attn1.to_q"])
    assert before == (torch.backends.quantized.engine, config.coordinate_descent_tuning, config.epilogue_fusion)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_only_named_layers_are_quantized():
    pipe = pipeline()
    chosen = [f"{BLOCK}.attn1.to_q", "time_embed.0"]
    quantize(pipe, "int8_weight_only", chosen)
    assert {name for name, m in linears(pipe).items() if hasattr(m.weight, "qdata")} == set(chosen)


@pytest.mark.parametrize(
    ("scheme", "skip"), [("int8_weight_only", f"{BLOCK}.ff.net.0.proj"), ("int8_static", f"{BLOCK}.attn1")]
)
def test_filter_file_is_honoured(monkeypatch, tmp_path, scheme, skip):
    file = tmp_path / "filter.json"
    file.write_text(json.dumps({"shallow": {scheme: {"skip": [skip]}}, "another": {scheme: {"skip": [f"{BLOCK}.ff"]}}}))
    monkeypatch.setattr(quantization, "FILTER_FILE", file)
    pipe = pipeline()
    assert set(quantization.candidates(pipe.unet, scheme)) - set(quantization.default_layers(pipe, scheme)) == {skip}
    quantize(pipe, scheme, **({"steps": 1} if scheme == "int8_static" else {}))
    assert type(pipe.unet.get_submodule(skip)) in (nn.Linear, CrossAttention)
    assert skip not in pipe.unet.quantization.layers


def test_small_layers_and_the_time_embedding_are_no_candidates(monkeypatch):
    unet = pipeline().unet
    dynamic = quantization.candidates(unet, "int8_dynamic")
    assert all(".transformer_blocks." in name for name in dynamic)
    assert "time_embed.0" in quantization.candidates(unet, "int8_weight_only")
    monkeypatch.setattr(quantization, "MIN_FEATURES", 33)
    assert f"{BLOCK}.attn1.to_q" in dynamic
    assert f"{BLOCK}.attn1.to_q" not in quantization.candidates(unet, "int8_dynamic")


def test_float8_leaves_out_what_torchao_takes_for_scales_a_block():
    layers = nn.ModuleDict({"0": nn.Linear(128, 256), "1": nn.Linear(128, 128)})
    unet = nn.ModuleDict({"input": nn.ModuleDict({"transformer_blocks": layers})})
    assert quantization.candidates(unet, "float8") == ["input.transformer_blocks.0"]
    assert len(quantization.candidates(unet, "int8_dynamic")) == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals_of_devices_and_types():
    pipe = pipeline()
    with pytest.raises(ValueError, match="float8 needs an NVIDIA GPU with sm89"):
        quantize(pipe, "float8")
    with pytest.raises(ValueError, match="no int8 engine 'qnnpack'"):
        int8_static(pipe, engine="qnnpack")
    with pytest.raises(ValueError, match="this is cpu in float16"):
        int8_static(pipeline(torch.float16))
    pipe.device = torch.device("mps")
    with pytest.raises(ValueError, match="this is mps"):
        quantize(pipe, "int8_dynamic")


def test_float8_is_refused_on_older_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an older GPU")
    pipe = pipeline()
    pipe.device = torch.device("cuda")
    with pytest.raises(ValueError, match="an older GPU"):
        quantize(pipe, "float8")


def test_refusals_of_layers():
    pipe = pipeline()
    with pytest.raises(ValueError, match=r"cannot take out\.2"):
        quantize(pipe, "int8_weight_only", ["out.2"])
    with pytest.raises(ValueError, match="no layer"):
        quantize(pipe, "int8_weight_only", [])
    quantize(pipe, "int8_weight_only")
    with pytest.raises(ValueError, match="quantized already, by int8-weights"):
        int8_static(pipe)


def test_replaced_attention_is_not_taken_for_plain():
    class Other(CrossAttention):
        pass

    pipe = pipeline()
    pipe.unet.get_submodule(f"{BLOCK}.attn1").__class__ = Other
    assert f"{BLOCK}.attn1" not in quantization.candidates(pipe.unet, "int8_static")


def test_missing_torchao_says_which_line_installs_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(OptimizationError, match=r"pip install torchao==0\.18\.0"):
        quantize(pipeline(), "int8_weight_only")


def test_torchao_is_imported_only_when_chosen_and_in_silence():
    code = """
import sys
from sd.optimizations.quantization import quantize
from tests.weights import shallow_pipeline as pipeline
quantize(pipeline(), "int8_static", ["middle_block.1.transformer_blocks.0.ff"], prompts=["a cat"], steps=1)
assert not any(name.split(".")[0] == "torchao" for name in sys.modules)
quantize(pipeline(), "int8_weight_only")
assert "torchao" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weight_bytes_before_and_after(caplog):
    pipe = pipeline()
    before = weight_bytes(pipe)
    assert before == {
        name: sum(p.numel() * 4 for p in getattr(pipe, name).parameters()) for name in ("clip", "unet", "vae")
    }
    layers = [linears(pipe)[name] for name in quantization.candidates(pipe.unet, "int8_weight_only")]
    saved = sum(3 * layer.weight.numel() - 5 * layer.out_features for layer in layers)  # fp32 scale, int8 zero point
    with caplog.at_level(logging.INFO):
        quantize(pipe, "int8_weight_only")
    after = weight_bytes(pipe)
    assert after == {**before, "unet": before["unet"] - saved}
    assert f"UNet weights {before['unet'] / 1e6:.0f} MB -> {after['unet'] / 1e6:.0f} MB" in caplog.text


def test_static_weights_take_a_quarter():
    pipe = pipeline()
    name = "middle_block.1.transformer_blocks.0.ff"
    weights = sum(p.numel() for p in pipe.unet.get_submodule(name).parameters() if p.ndim == 2)
    before = weight_bytes(pipe)["unet"]
    int8_static(pipe, [name])
    saved = before - weight_bytes(pipe)["unet"]
    assert 0.9 * 3 * weights < saved < 3 * weights


# --- files ------------------------------------------------------------------------------------------------------------


@every_scheme
def test_saved_and_loaded_is_bit_identical_without_quantizing_anew(monkeypatch, tmp_path, scheme):
    pipe, loaded = pipeline(), pipeline()
    APPLY[scheme](pipe)
    save_quantized(pipe, tmp_path / "q.safetensors")
    for name in ("calibrate", "_apply_torchao", "convert", "prepare"):
        monkeypatch.setattr(quantization, name, None)
    load_quantized(loaded, tmp_path / "q.safetensors")
    assert torch.equal(latents(loaded), latents(pipe))
    assert weight_bytes(loaded) == weight_bytes(pipe)
    assert loaded.unet.quantization == pipe.unet.quantization
    assert list(tmp_path.iterdir()) == [tmp_path / "q.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_is_bit_identical(tmp_path, dtype):
    pipe, loaded = pipeline(dtype), pipeline(dtype)
    quantize(pipe, "int8_weight_only")
    save_quantized(pipe, tmp_path / "q.safetensors")
    load_quantized(loaded, tmp_path / "q.safetensors")
    assert torch.equal(predicted_noise(loaded), predicted_noise(pipe))


def test_static_file_of_the_other_engine_is_bit_identical(tmp_path):
    pipe, loaded = pipeline(), pipeline()
    int8_static(pipe, [f"{BLOCK}.ff", f"{BLOCK}.attn2"], engine="onednn")
    save_quantized(pipe, tmp_path / "q.safetensors")
    load_quantized(loaded, tmp_path / "q.safetensors")
    assert torch.equal(predicted_noise(loaded), predicted_noise(pipe))


def test_loaded_model_can_be_saved_again(tmp_path):
    pipe, loaded = pipeline(), pipeline()
    int8_static(pipe)
    save_quantized(pipe, tmp_path / "1.safetensors")
    load_quantized(loaded, tmp_path / "1.safetensors")
    save_quantized(loaded, tmp_path / "2.safetensors")
    first, second = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {first[name].dtype for name in first if name.endswith(".weight")} == {torch.int8}


def test_what_cannot_stand_beside_quantized_layers_cannot_beside_loaded_ones(saved):
    pipe = pipeline()
    load_quantized(pipe, saved)
    with pytest.raises(OptimizationError, match="int8-weights cannot be combined with int8-static"):
        optimizations.apply(pipe, ["channels-last", "int8-weights"])
    assert optimizations.apply(pipe, ["channels-last", "kv-cache"]) == ["channels-last", "kv-cache"]


def test_plain_pipeline_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="not quantized"):
        save_quantized(pipeline(), tmp_path / "q.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q.safetensors"
    pipe = pipeline()
    int8_static(pipe, [f"{BLOCK}.ff"])
    save_quantized(pipe, path)
    return path


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        ({"dtype": torch.float16}, "int8-static needs a CPU, in fp32"),
        ({"seed": 1}, "made from other weights"),
        ({"num_heads": 4}, "another configuration"),
    ],
)
def test_file_of_another_model_is_refused(saved, pipe, message):
    with pytest.raises(ValueError, match=message):
        load_quantized(pipeline(**pipe), saved)


def test_file_of_another_type_is_refused(tmp_path):
    pipe = pipeline(torch.float16)
    quantize(pipe, "int8_weight_only", ["time_embed.0"])
    save_quantized(pipe, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match=r"made in torch\.float16, and the model is in torch\.float32"):
        load_quantized(pipeline(), tmp_path / "q.safetensors")


def test_file_for_a_cpu_with_vnni_is_refused_without(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization, "has_vnni", lambda: True)
    pipe = pipeline()
    int8_static(pipe, [f"{BLOCK}.ff"])
    save_quantized(pipe, tmp_path / "q.safetensors")
    monkeypatch.setattr(quantized_files, "has_vnni", lambda: False)
    with pytest.raises(ValueError, match="would saturate"):
        load_quantized(pipeline(), tmp_path / "q.safetensors")


def rewritten(saved: Path, path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> Path:
    """The file with some metadata or tensors replaced, or left out where None."""
    with safe_open(saved, "pt") as file:
        old = file.metadata()
    merged = {**load_file(saved), **{f"{BLOCK}.ff.{name.replace('__', '.')}": t for name, t in tensors.items()}}
    save_file({name: t for name, t in merged.items() if t is not None}, path, {**old, **(metadata or {})})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": "other"}}, "no quantized weights of format"),
        ({"metadata": {"quantization": '{"scheme": "int4", "layers": []}'}}, "'int4'"),
        ({"metadata": {"quantization": "{"}}, "damaged"),
        ({"metadata": {"quantization": '{"scheme": "int8_static"}'}}, "damaged"),
        ({"metadata": {"quantization": '{"scheme": "int8_static", "layers": ["out.2"], "engine": "x86"}'}}, "out.2"),
        ({"net__2__weight": None}, "damaged"),
        ({"net__2__weight": torch.zeros(3, 3, dtype=torch.int8)}, "damaged"),
        ({"net__2__weight_scale": torch.zeros(3, dtype=torch.float64)}, "damaged"),
        ({"net__2__bias": torch.zeros(3)}, "damaged"),
        ({"quant__scale": torch.zeros(2)}, "damaged"),
    ],
)
def test_damaged_file_is_refused_and_the_model_stays_plain(monkeypatch, saved, tmp_path, changes, message):
    monkeypatch.setattr(quantized_files, "has_vnni", lambda: True)
    pipe = pipeline()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_quantized(pipe, rewritten(saved, tmp_path / "q.safetensors", **changes))
    assert torch.equal(predicted_noise(pipe), predicted_noise(pipeline()))


def test_damaged_torchao_file_is_refused(tmp_path):
    pipe = pipeline()
    quantize(pipe, "int8_weight_only", [f"{BLOCK}.attn1.to_q"])
    save_quantized(pipe, tmp_path / "q.safetensors")
    bad = {f"{BLOCK}.attn1.to_q.weight": '{"_type": "Evil", "_data": {}, "_tensor_data_names": ["qdata"]}'}
    bad["tensor_names"] = json.dumps([f"{BLOCK}.attn1.to_q.weight"])
    for attributes in ("{}", "[]", json.dumps(bad)):
        path = rewritten(tmp_path / "q.safetensors", tmp_path / "bad.safetensors", {"attributes": attributes})
        with pytest.raises(ValueError, match="damaged"):
            load_quantized(pipeline(), path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no quantized weights at"):
        load_quantized(pipeline(), tmp_path / "none.safetensors")
    torch.save({}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_quantized(pipeline(), tmp_path / "pickle.safetensors")


# --- bench/sensitivity.py ---------------------------------------------------------------------------------------------


def test_sensitivity_measures_resumes_and_writes_the_filter(monkeypatch, tmp_path):
    pipe = pipeline()
    expected = predicted_noise(pipe)
    monkeypatch.setattr(common, "load_pipeline", lambda *_: pipe)
    out, filter_file = tmp_path / "s.csv", tmp_path / "f.json"
    arguments = ["--size", "16", "--damage-size", "16", "--pairs", "1", "--weights", "tiny.ckpt"]
    arguments += ["--schemes", "int8_static", "--out", str(out), "--filter", str(filter_file)]
    layers = [f"{BLOCK}.{name}" for name in ("attn1", "ff", "attn2")]
    monkeypatch.setattr(quantization, "candidates", lambda _unet, _scheme: layers)

    assert sensitivity.main([*arguments, "--budget", "0"]) == sensitivity.UNFINISHED
    assert sensitivity.main([*arguments, "--max-damage", "0"]) == 0
    rows = common.read_csv(out)
    assert [row["layer"] for row in rows] == layers
    assert all(0 < float(row["damage"]) < 0.1 and float(row["speedup"]) > 0 for row in rows)
    assert rows[2]["inputs"] == "2x64x32 2x77x64"
    assert json.loads(filter_file.read_text())["shallow"]["int8_static"]["skip"] == layers

    monkeypatch.setattr(sensitivity.Bench, "row", None)  # everything is in the file
    assert sensitivity.main([*arguments, "--min-speedup", "0", "--max-damage", "1"]) == 0
    assert json.loads(filter_file.read_text())["shallow"]["int8_static"]["skip"] == []
    assert common.read_csv(out) == rows
    assert torch.equal(predicted_noise(pipe), expected)


def test_sensitivity_says_what_is_wrong_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "load_pipeline", lambda *_: pipeline())
    files = ["--out", str(tmp_path / "s.csv"), "--filter", str(tmp_path / "f.json")]
    assert sensitivity.main(["--schemes", "float8", "--size", "16", "--damage-size", "16", *files]) == 2
    assert capsys.readouterr().err.startswith("error: float8 needs an NVIDIA GPU")


# --- what a file is tied to -------------------------------------------------------------------------------------------


@every_scheme
@torch.no_grad()
def test_a_fine_tune_that_shares_other_layers_is_told_from_its_base(tmp_path, scheme):
    """Only one of the replaced weights differs, as after a LoRA; the last convolution is the same."""
    pipe, tuned = pipeline(), pipeline()
    APPLY[scheme](pipe)
    save_quantized(pipe, tmp_path / "q.safetensors")
    tuned.unet.get_submodule(f"{BLOCK}.ff.net.2").weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match="made from other weights"):
        load_quantized(tuned, tmp_path / "q.safetensors")
    assert torch.equal(predicted_noise(tuned), predicted_noise(tuned))
    assert "quantization" not in vars(tuned.unet)


def test_loaded_layers_are_undone_too(tmp_path):
    path = tmp_path / "plain.safetensors"
    pipeline().save(path)
    pipe = StableDiffusion.load(path, "cpu")
    plain = predicted_noise(pipe)
    int8_static(pipe)
    save_quantized(pipe, tmp_path / "q.safetensors")
    quantized = predicted_noise(pipe)
    optimizations.undo(pipe)
    assert torch.equal(predicted_noise(pipe), plain)
    load_quantized(pipe, tmp_path / "q.safetensors")
    optimizations.apply(pipe, "kv-cache")
    assert relative_error(predicted_noise(pipe), quantized) < 1e-5
    optimizations.undo(pipe)
    assert torch.equal(predicted_noise(pipe), plain)


def test_explain_tells_what_is_quantized():
    pipe = pipeline()
    int8_static(pipe)
    rows = {row.kernel: row.switches for row in pipe.explain().rows if "int8" in row.kernel}
    assert set(rows) == {"int8 projections, attention: SDPA, as PyTorch picks", "int8 products", "int8 projection"}
    assert set(rows.values()) == {("int8-static",)}
