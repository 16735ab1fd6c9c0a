"""Reading lists of names: order, presets, values, and refusals in words that somebody typed."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sd import gpus, optimizations
from sd.kernels import dots, native
from sd.optimizations import OptimizationError, catalog, registry
from sd.optimizations.registry import LARGE
from sd.optimizations.registry import _possible as possible
from tests.sparing import sparing

ROOT = Path(__file__).resolve().parents[2]


def a_pipe(device: str, dtype: torch.dtype = torch.float32, parameters: int = 10, quantized: bool = False):
    """What presets and needs look at."""
    unet = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: parameters)])
    if quantized:
        unet.quantization = SimpleNamespace(switch="int8-static")
    return SimpleNamespace(device=torch.device(device), dtype=dtype, unet=unet)


@pytest.fixture
def card(monkeypatch):
    """card((7, 5)) -> a pipeline on an NVIDIA GPU of that capability."""

    def card(capability: tuple[int, int], **options):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return a_pipe("cuda", torch.float16, **options)

    return card


def names(text: str, pipe) -> list[str]:
    return [choice.text for choice in optimizations.parse(text, pipe)]


def test_order_is_by_stage_and_then_by_name():
    keys = [(one.stage, one.name) for one in catalog().values()]
    assert keys == sorted(keys)
    assert len({one.stage for one in catalog().values()}) > 10


def test_stages_say_what_builds_on_what():
    """Each of these relations is relied on: the later one calls, packs, wraps or captures what the earlier one left."""
    stage = {name: one.stage for name, one in catalog().items()}
    before = [
        ("bf16", "int8-weights"),
        ("int8-weights", "channels-last"),
        ("int8-static", "kv-cache"),
        ("winograd", "cpu-norm"),
        ("pointwise-linear", "fused-norm"),
        ("cpu-linear", "prepacked"),
        ("fused-layernorm", "packed-qkv"),
        ("time-cache", "prepacked"),
        ("shared-halves", "compile"),
        ("compile", "cuda-graph"),
        ("cuda-graph", "guidance-interval"),
        ("guidance-interval", "loop-graph"),
        ("async-noise", "loop-graph"),
        ("loop-graph", "vae-tiling"),
    ]
    assert [pair for pair in before if stage[pair[0]] >= stage[pair[1]]] == []


@pytest.mark.parametrize(
    ("first", "second"), [("kv-cache", "packed-qkv"), ("kv-cache", "time-cache"), ("cpu-linear", "winograd")]
)
def test_within_a_stage_names_decide(first, second):
    """kv-cache takes the projections of the text before packed-qkv packs what is left."""
    assert catalog()[first].stage == catalog()[second].stage
    assert first < second


def test_parse_orders_as_the_registry_does():
    assert names("kv-cache, channels-last,attention", a_pipe("cpu")) == ["channels-last", "attention", "kv-cache"]


def test_parse_expands_presets_and_the_last_value_counts():
    pipe = a_pipe("cpu")
    assert names("none", pipe) == []
    assert names("original", pipe) == ["int8-weights", "attention"]
    assert [n for n in names("fast,deepcache=5", pipe) if n.startswith("deepcache")] == ["deepcache=5"]
    assert [n for n in names("deepcache=5,fast", pipe) if n.startswith("deepcache")] == ["deepcache=5"], "typed wins"
    assert [n for n in names("deepcache=5,deepcache=2", pipe) if n.startswith("deepcache")] == ["deepcache=2"]
    assert set(names("exact", pipe)) == set(names("fast", pipe)) - {"deepcache=3"}


@pytest.mark.parametrize("preset", ["none", "exact", "cpu", "default"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_presets_that_are_exact(preset, device, monkeypatch):
    monkeypatch.setattr(registry, "short_by_default", lambda: False)
    chosen = optimizations.parse(preset, a_pipe(device, parameters=LARGE))
    assert all(choice.optimization.exact for choice in chosen)
    assert bool(chosen) == (preset != "none" and (preset != "default" or device != "mps"))


def test_default_is_exact_for_large_models_alone(card, monkeypatch):
    monkeypatch.setattr(registry, "short_by_default", lambda: False)
    assert "winograd" in names("default", a_pipe("cpu", parameters=LARGE))
    assert names("default", a_pipe("cpu", parameters=LARGE - 1)) == []
    assert names("default", a_pipe("cpu", parameters=LARGE, quantized=True)) == []
    assert names("default", card((9, 0), parameters=LARGE)) == names("exact", card((9, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_default_on_a_cpu_with_amx_is_bf16_products(dtype, monkeypatch):
    monkeypatch.setattr(registry, "short_by_default", lambda: True)
    monkeypatch.setattr(dots, "fast", lambda: True)
    chosen = names("default", a_pipe("cpu", dtype, parameters=LARGE))
    assert (chosen[0], chosen.count("cpu-bf16")) == ("cpu-bf16", 1)
    assert {"kv-cache", "shared-halves", "keep-memory"} <= set(chosen)
    assert names("default", a_pipe("cpu", dtype, parameters=LARGE - 1)) == []
    assert "cpu-bf16" not in names("cpu", a_pipe("cpu", parameters=LARGE))
    asked = a_pipe("cpu", parameters=LARGE)
    asked.dtype_is_asked_for = True
    assert names("default", asked) == names("cpu", asked)


def test_one_line_says_which_numbers_are_multiplied(make, loaded, monkeypatch, caplog):
    if native.load() is None:
        pytest.skip(native.why_not())
    caplog.set_level("INFO", logger="sd")
    monkeypatch.setattr(registry, "LARGE", 1)
    for by_default, fast, line in (
        (True, True, "products of bf16 numbers"),
        (False, True, "--dtype bfloat16 is faster"),
        (False, False, ""),
    ):
        monkeypatch.setattr(registry, "short_by_default", lambda by_default=by_default: by_default)
        monkeypatch.setattr(dots, "fast", lambda fast=fast: fast)
        caplog.clear()
        assert ("cpu-bf16" in make("default").optimizations) is by_default
        told = [record.getMessage() for record in caplog.records if "dtype" in record.getMessage()]
        assert [line in message for message in told] == [True] * bool(line)
    monkeypatch.setattr(registry, "short_by_default", lambda: True)
    monkeypatch.setattr(dots, "fast", lambda: True)
    assert "cpu-bf16" not in loaded("default", dtype=torch.float32).optimizations
    assert "cpu-bf16" in loaded("default").optimizations


@pytest.mark.parametrize("name", native.SETS)
def test_only_amx_makes_bf16_products_the_default(name, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: object())
    monkeypatch.setattr(native, "instruction_set", lambda: name)
    assert registry.short_by_default() is (name == "amx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvcache", "is it 'kv-cache'?"),
        ("zzz", "see --list-opts"),
        ("kv-cache=3", "takes no value"),
        ("deepcache=0", "a whole number from 1 on"),
        ("deepcache=x", "a whole number from 1 on"),
        ("guidance-interval=0.6-0.2", "two fractions"),
        ("guidance-interval=0-nan", "two fractions"),
        ("attention=fast", "auto, naive"),
        ("compile=all", "blocks, unet"),
        ("winograd=-1", "gigabytes"),
    ],
)
def test_check_and_parse_refuse(text, message):
    for call in (lambda: optimizations.check(text), lambda: optimizations.parse(text, a_pipe("cpu"))):
        with pytest.raises(OptimizationError, match=message):
            call()


def test_check_takes_presets_and_lists():
    optimizations.check("exact,deepcache=3")
    optimizations.check(["default", "attention=math"])


@pytest.mark.parametrize("budget", ["much", "4", "-1", "nan", "1000"])
def test_memory_budgets_are_checked(budget):
    with pytest.raises(OptimizationError, match="the memory budget must be low"):
        optimizations.parse("default", a_pipe("cpu"), budget)


def test_memory_budget_bounds_winograd_but_what_is_typed_counts():
    pipe = a_pipe("cpu", parameters=LARGE)
    assert "winograd=0.40" in [choice.text for choice in optimizations.parse("default", pipe, "low")]
    assert "winograd=1" in [choice.text for choice in optimizations.parse("cpu,winograd=1", pipe, "low")]


# ---- what cannot run here


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cuda-graph"], "cuda-graph needs an NVIDIA GPU; this is cpu in float32"),
        (["fused-norm"], "needs an NVIDIA GPU with sm80 or newer"),
        (["float8"], "needs an NVIDIA GPU with sm89"),
        (["naive", "attention"], "naive cannot be combined with attention"),
        (["packed-qkv", "int8-weights"], "packed-qkv cannot be combined with int8-weights"),
        (["cpu-attention", "attention"], "cannot be combined with"),
        (["cpu-attention", "naive"], "cannot be combined"),
        (["attention=efficient"], "clip.encoder.layers.0.self_attn, whose head size is 64"),
        (["prepacked"], "prepacked finds nothing left to do"),
        (["page-out"], "page-out needs a CPU, and weights that are mapped"),
    ],
)
def test_apply_refuses_what_was_typed_and_leaves_the_pipeline_plain(make, names, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pipe = make()
    before = [type(m) for m in pipe.unet.modules()]
    with pytest.raises(OptimizationError, match=message):
        optimizations.apply(pipe, ["channels-last", *names])
    assert [type(m) for m in pipe.unet.modules()] == before
    assert pipe.optimizations == []
    assert not {"sample", "record"} & set(vars(pipe))
    optimizations.apply(pipe, "kv-cache")


def test_apply_once_a_pipeline(make):
    pipe = make("kv-cache")
    with pytest.raises(OptimizationError, match="optimized already: kv-cache"):
        optimizations.apply(pipe, ["time-cache"])


def test_apply_returns_what_it_applied_in_order(make):
    assert make("deepcache=2", "channels-last").optimizations == ["channels-last", "deepcache=2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", sparing(["exact", "cpu", "fast"], lambda preset: preset == "exact"))
def test_presets_leave_out_what_needs_another_dtype(loaded, preset, dtype, caplog, monkeypatch):
    monkeypatch.setattr(dots, "fast", lambda: False)  # where it is, cpu-bf16 takes any
    caplog.set_level("INFO", logger="sd")
    pipe = loaded(preset, dtype=dtype)
    assert {"kv-cache", "shared-halves"} <= set(pipe.optimizations)
    assert not {"winograd", "cpu-linear"} & set(pipe.optimizations)
    lines = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert len(lines) == 1
    assert "winograd (needs a CPU, in fp32; this is cpu in" in lines[0]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_exact_on_older_cards_leaves_out_what_needs_newer_ones(card, capability):
    """On Modal `--gpu T4` must not start a container to fail."""
    pipe = card(capability)
    kept, left_out = possible(optimizations.parse("exact", pipe), pipe)
    fused = {"fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample", "split-conv"}
    assert {choice.name for choice in kept} >= {"attention", "channels-last", "kv-cache", "cuda-graph"}
    assert {choice.name for choice, _ in left_out} == (fused if capability < (8, 0) else set())


def test_exact_on_apples_devices_needs_nothing_that_is_not_there():
    pipe = a_pipe("mps", torch.float16)
    kept, left_out = possible(optimizations.parse("exact", pipe), pipe)
    assert kept
    assert not left_out


def test_a_preset_gives_way_to_what_was_typed(make, caplog):
    caplog.set_level("INFO", logger="sd")
    pipe = make("cpu", "attention=math")
    assert "attention=math" in pipe.optimizations
    assert "cpu-attention" not in pipe.optimizations
    assert "cpu-attention (cannot be combined with attention)" in caplog.text


def test_a_preset_leaves_out_what_finds_nothing_and_says_so(make, caplog):
    caplog.set_level("INFO", logger="sd")
    assert "page-out" not in make("cpu").optimizations, "these weights are not mapped"
    assert "cpu leaves out page-out (needs a CPU, and weights that are mapped" in caplog.text


def test_what_nobody_named_is_not_talked_about(make, monkeypatch, caplog):
    caplog.set_level("INFO", logger="sd")
    monkeypatch.setattr(registry, "LARGE", 1)
    assert "winograd" in make("default").optimizations
    assert "leaves out" not in caplog.text


def test_without_a_compiler_nothing_claims_to_be_on(make, monkeypatch, caplog):
    caplog.set_level("INFO", logger="sd")
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler (apt-get install g++)")
    assert not {"cpu-linear", "cpu-attention", "cpu-norm"} & set(make("cpu").optimizations)
    assert "apt-get install g++" in caplog.text
    with pytest.raises(OptimizationError, match="cpu-linear needs a CPU, in fp32, and a C"):
        make("cpu-linear")


def test_names_of_a_default_can_be_applied_by_name(make, monkeypatch):
    monkeypatch.setattr(registry, "LARGE", 1)
    pipe = make()
    names = optimizations.default(pipe, "low")
    assert "winograd=0.40" in names
    assert set(optimizations.apply(pipe, names)) <= set(names.split(","))


# ---- registration


def test_conflicts_name_optimizations():
    assert {other for one in catalog().values() for other in one.conflicts} <= set(catalog())


@pytest.mark.parametrize("name", catalog())
def test_docstrings_tell_what_to_expect(name):
    one = catalog()[name]
    assert ("Exact" in one.doc) == one.exact
    assert ("Approximate" in one.doc) != one.exact
    assert "Helps:" in one.doc
    assert "Hurts:" in one.doc
    assert one.summary
    assert bool(one.hint) == (one.value is not None)


def test_every_value_has_a_default_and_a_reader():
    for one in catalog().values():
        arguments = list(inspect.signature(one.function).parameters.values())[1:]
        assert all(argument.default is not inspect.Parameter.empty for argument in arguments), one.name


def test_a_new_file_is_found_without_a_list(tmp_path):
    """What a person adds: one file in the folder."""
    package = tmp_path / "sd"
    shutil.copytree(ROOT / "sd", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "optimizations" / "mirror.py").write_text(
        "from sd.optimizations.base import Patch, Stage, optimization\n\n\n"
        "@optimization('mirror', stage=Stage.MEMORY, exact=False, summary='left is right')\n"
        "def mirror(patch: Patch) -> None:\n"
        "    patch.around('decode', lambda decode: lambda latents: decode(latents).flip(-1))\n"
    )
    code = "from sd import optimizations; print(optimizations.catalog()['mirror'].summary)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "left is right"


def test_the_import_is_light():
    code = "import sys; from sd import optimizations; optimizations.catalog()"
    heavy = "{'triton', 'torchao', 'torch._inductor', 'torch._dynamo'}"
    code += f"; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("capability", [gpus.NONE, (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_what_a_device_can_run_is_known_from_its_name(card, monkeypatch, capability):
    """Whoever rents a GPU is told what the container would say: each need is asked for a pipeline on such a device."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name)  # Triton is there, and a compiler
    monkeypatch.setattr("shutil.which", lambda name: name)
    pipe = card(capability) if capability != gpus.NONE else a_pipe("cpu")
    here = set(catalog()) - ({"page-out", "cpu-bf16", "cpu-int8", "prepacked"} if capability == gpus.NONE else set())
    runs = {name for name in here if not catalog()[name].needs.why_not(pipe)}
    assert runs == {name for name in here if gpus.enough(name, capability)}
    assert set(gpus.LEAST) | gpus.OF_CPUS <= set(catalog())


def test_what_is_lacking_says_what_it_needs():
    assert gpus.lacking("exact,deepcache=2", (7, 5)) == {}  # of a preset, the rest is drawn with
    assert gpus.lacking("bf16, winograd=0.5", (7, 5)) == {
        "bf16": "an NVIDIA GPU with sm80 or newer",
        "winograd": "a CPU",
    }
    assert gpus.lacking("float8", (8, 6)) == {"float8": "an NVIDIA GPU with sm89 or newer"}
    assert gpus.lacking("cuda-graph,bf16", gpus.NONE) == {"cuda-graph": "an NVIDIA GPU"}
