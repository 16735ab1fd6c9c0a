"""The C++ kernels against float64, over sizes that are no whole tiles or vectors; how they are built and kept."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import cpu_builds, cpu_profile
from sd.kernels import native
from tests.sparing import sparing

ROOT = Path(__file__).resolve().parent.parent.parent
BOUND = 1e-5
no_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")
quick = settings(max_examples=25, deadline=None)
sides = st.integers(1, 23)
few = st.integers(1, 40)
G = {  # the kernels' transforms by m, as in Lavin and Gray
    2: torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], dtype=torch.float64),
    4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64)
    / 24,
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    assert reference.dtype == torch.float64
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


# ---- arithmetic


def native_conv(x: Tensor, weight: Tensor, m: int, *more: Tensor | None, upsampled: bool = False) -> Tensor:
    kernel = native.winograd_kernel(weight, G[m], upsampled)
    return native.winograd(x, kernel, weight.shape[0], *more, upsampled=upsampled, m=m)


@no_compiler
@pytest.mark.parametrize("m", [2, 4])
@given(sides, sides, st.integers(1, 12), few, st.integers(1, 3), st.booleans(), st.booleans())
@quick
def test_winograd_at_any_size(m, height, width, vectors, c_out, batch, upsampled, channels_last):
    channels = native.vector() * vectors
    x, weight = numbers(batch, channels, height, width), numbers(c_out, channels, 3, 3, seed=1)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    shift = numbers(batch, c_out, seed=2)
    residual = numbers(batch, c_out, height << upsampled, width << upsampled, seed=3)
    large = F.interpolate(x, scale_factor=2.0) if upsampled else x
    expected = F.conv2d(large.double(), weight.double(), padding=1) + shift[:, :, None, None].double() + residual
    assert error(native_conv(x, weight, m, shift, residual, upsampled=upsampled), expected) < BOUND


@no_compiler
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(("c_in", "c_out", "side"), [(320, 320, 16), (2560, 48, 8), (1280, 1280, 8), (128, 3, 65)])
def test_winograd_on_the_models_layers(m, c_in, c_out, side):
    x, weight = numbers(1, c_in, side, side), numbers(c_out, c_in, 3, 3, seed=1)
    assert error(native_conv(x, weight, m), F.conv2d(x.double(), weight.double(), padding=1)) < BOUND


@no_compiler
@given(st.integers(1, 900), st.integers(1, 1000), st.integers(1, 70), st.booleans(), st.booleans())
@quick
def test_linear(rows, k, n, with_bias, with_residual):
    x, weight = numbers(rows, k), numbers(n, k, seed=1)
    bias = numbers(n, seed=2) if with_bias else None
    residual = numbers(rows, n, seed=3) if with_residual else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = expected if residual is None else expected + residual.double()
    assert error(native.linear(x, weight, bias, residual), expected) < 2e-6


@no_compiler
def test_linear_reads_rows_apart_and_weights_in_any_layout():
    x, weight = numbers(50, 4, 96)[:, 1, :64], numbers(64, 24, seed=1).t()
    assert error(native.linear(x, weight), x.double() @ weight.double().t()) < 2e-6


@no_compiler
@given(st.integers(1, 900), st.integers(1, 400), st.integers(1, 20))
@quick
def test_geglu(rows, k, panels):
    columns = native.panel() * panels
    x, weight, bias = numbers(rows, k), numbers(columns, k, seed=1) * k**-0.5, numbers(columns, seed=2)
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    assert error(native.geglu(x, weight, bias), value * F.gelu(gate)) < 5e-6


@no_compiler
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), st.integers(1, 3))
@quick
def test_patches(batch, channels, height, width, stride):
    x = numbers(batch, channels, height, width)
    patches = native.patches(x, stride)
    assert torch.equal(patches.flatten(1, 2), F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2))


@no_compiler
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 120), st.integers(1, 600), st.integers(1, 90))
@quick
def test_attention(batch, heads, queries, keys, size):
    q, k, v = (numbers(batch, n, heads, size, seed=n).transpose(1, 2) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(native.attention(q, k, v), expected) < 5e-6


@no_compiler
@pytest.mark.parametrize("size", [40, 80, 160, 512])
@pytest.mark.parametrize("scale", [1, 30])
def test_attention_of_sharp_scores(size, scale):
    q, k, v = (numbers(1, 2, 130, size, seed=s) for s in range(3))
    q = q * scale
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(native.attention(q, k, v), expected) < BOUND


@no_compiler
@given(st.integers(1, 2), st.integers(1, 8), sides, sides, st.sampled_from([1, 4, 8]), st.booleans())
@quick
def test_group_norm(batch, vectors, height, width, groups, silu):
    channels = native.vector() * vectors
    x, weight, bias = numbers(batch, channels, height, width) * 3 + 20, numbers(channels), numbers(channels, seed=1)
    flat = x.double().reshape(batch, groups, -1)
    scale = 1 / (flat.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    gain = weight.double()[:, None, None]
    expected = ((flat - flat.mean(-1, keepdim=True)) * scale).view(x.shape) * gain + bias.double()[:, None, None]
    expected = F.silu(expected) if silu else expected
    # x * factor + summand: factor and summand are rounded, and cancel where the variance is small beside the mean.
    rounding = 2**-23 * ((flat * scale).view(x.shape) * gain).norm() / expected.norm()
    assert error(native.group_norm(x, groups, weight, bias, 1e-6, silu), expected) < BOUND + 1.1 * rounding


@no_compiler
@given(st.integers(1, 70), st.integers(1, 200))
@quick
def test_layer_norm(rows, vectors):
    channels = native.vector() * vectors
    x, weight, bias = numbers(rows, channels) * 2 + 5, numbers(channels), numbers(channels, seed=1)
    expected = F.layer_norm(x.double(), (channels,), weight.double(), bias.double())
    assert error(native.layer_norm(x, weight, bias, 1e-5), expected) < 2e-6


@no_compiler
def test_nan_stays_nan():
    x, weight = numbers(1, 8, 8, 8), numbers(8, 8, 3, 3)
    x[0, 0, 3, 3] = float("nan")
    assert native_conv(x, weight, 4).isnan().any()
    assert native.group_norm(x, 4, weight[0, :, 0, 0], weight[1, :, 0, 0], 1e-5, True).isnan().any()


# ---- what is refused


@no_compiler
@pytest.mark.parametrize(
    "call",
    [
        lambda: native.linear(numbers(4, 6), numbers(8, 7)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6), numbers(7)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6), None, numbers(5, 8)),
        lambda: native.geglu(numbers(4, 6), numbers(native.panel() + 2, 6), numbers(native.panel() + 2)),
        lambda: native.attention(numbers(1, 2, 4, 8), numbers(1, 1, 4, 8), numbers(1, 1, 4, 8)),
        lambda: native.attention(numbers(1, 2, 4, 8), numbers(1, 2, 4, 8), numbers(1, 2, 5, 8)),
        lambda: native_conv(numbers(1, native.vector() + 1, 8, 8), numbers(8, native.vector() + 1, 3, 3), 4),
        lambda: native_conv(numbers(1, 16, 8, 8), numbers(8, 8, 3, 3), 4),
        lambda: native_conv(numbers(1, 8, 8, 8), numbers(8, 8, 3, 3), 4, numbers(2, 8)),
        lambda: native_conv(numbers(1, 8, 8, 8), numbers(8, 8, 3, 3), 4, None, numbers(1, 8, 8, 9)),
        lambda: native.winograd_kernel(numbers(8, 8, 1, 1), G[4], False),
        lambda: native.group_norm(numbers(1, native.vector() + 1, 4, 4), 1, numbers(9), numbers(9), 1e-5),
        lambda: native.group_norm(numbers(1, 16, 4, 4), 3, numbers(16), numbers(16), 1e-5),
        lambda: native.layer_norm(numbers(3, 16), numbers(8), numbers(16), 1e-5),
    ],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    assert "\n" not in str(caught.value)


@no_compiler
@pytest.mark.parametrize(
    "call",
    [
        lambda: native.linear(numbers(4, 6).double(), numbers(8, 6)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6).half()),
        lambda: native.linear(numbers(4, 6), torch.empty(8, 6, device="meta")),
        lambda: native.linear(numbers(0, 6), numbers(8, 6)),
        lambda: native.winograd_kernel(numbers(8, 8, 3, 3), G[4].float(), False),
    ],
)
def test_what_is_no_memory_of_fp32(call):
    with pytest.raises(ctypes.ArgumentError):
        call()


def test_types_are_those_of_the_sources():
    kinds = {"int64_t": native._L, "int": native._I, "float": native._F, "const int64_t*": native._S}
    kinds |= {"const float*": native._P, "float*": native._P, "const double*": native._Double}
    declared = {}
    for source in native.SOURCES.glob("*.cpp"):
        for name, arguments in re.findall(r"EXPORT void (\w+)\(([^)]*)\)", source.read_text()):
            declared[name] = tuple(kinds[argument.rsplit(None, 1)[0]] for argument in re.split(r",\s*", arguments))
    assert declared == native.SIGNATURES


@no_compiler
def test_sizes():
    assert native.vector() > 0
    assert native.panel() % native.vector() == 0


# ---- building


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Iterator[Path]:
    """The kernels as in a new process, with an empty cache folder."""
    monkeypatch.setenv("SD_CACHE", str(tmp_path / "cache"))
    native.attempt.cache_clear()
    yield tmp_path / "cache"
    native.attempt.cache_clear()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A build, to be copied."""
    if not native.compiler():
        pytest.skip("there is no C++ compiler")
    return native._compile(native.compiler(), tmp_path_factory.mktemp("build"))


@pytest.fixture
def compiler(library, monkeypatch, tmp_path) -> Path:
    """In place of the compiler, a script that copies what `made` beside it is, at once, and counts its libraries."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    shutil.copy(library, folder / "made")
    script = folder / "g++"
    script.write_text(
        f"""#!/bin/sh
for word; do
    case $word in
        -shared) echo >> {folder}/count; shared=1;;
    esac
    last=$word
done
[ -z "$shared" ] || cp {folder}/made "$last"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return folder


def builds(compiler: Path) -> int:
    return (compiler / "count").read_text().count("\n") if (compiler / "count").exists() else 0


PROGRAM = """
import torch
from sd.kernels import native
assert native.load() is not None, native.why_not()
assert native.why_not() == ""
x, weight = torch.ones(5, 7), torch.ones(3, 7)
assert torch.equal(native.linear(x, weight), torch.full((5, 3), 7.0))
"""


def start(program: str = PROGRAM) -> subprocess.Popen:
    """A process of its own, since a library that is not whole may end it by a signal."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def succeed(process: subprocess.Popen) -> None:
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output


@no_compiler
def test_build_once(fresh, caplog):
    with caplog.at_level(logging.INFO):
        assert native.load() is not None
        native.attempt.cache_clear()
        assert native.load() is not None
    assert caplog.text.count("built the CPU kernels") == 1
    (kept,) = fresh.iterdir()
    (fresh / "file").touch()
    assert kept.suffix == ".so"
    assert kept.stat().st_mode & 0o444 == (fresh / "file").stat().st_mode & 0o444
    assert native.why_not() == ""


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda path: cut(path, 0),
    "half of it": lambda path: cut(path, path.stat().st_size // 2),
    "all but a byte": lambda path: cut(path, path.stat().st_size - 1),
    "a bit": flip,
    "another name": lambda path: path.rename(path.with_name(f"{path.name[:-8]}00000.so")),
    "no digest": lambda path: path.rename(path.with_name(f"{path.name[:24]}-.so")),
}


@pytest.mark.parametrize("damage", sparing(DAMAGE, lambda damage: damage == "half of it"))
def test_a_damaged_library_is_built_again(fresh, compiler, damage):
    assert native.load() is not None, native.why_not()
    (kept,) = fresh.iterdir()
    whole, name = kept.read_bytes(), kept.name
    kept.unlink()  # this process has mapped it
    kept.write_bytes(whole)
    DAMAGE[damage](kept)
    succeed(start())
    assert builds(compiler) == 2
    assert [(path.name, path.read_bytes()) for path in fresh.iterdir()] == [(name, whole)]
    native.attempt.cache_clear()
    assert native.load() is not None
    assert builds(compiler) == 2


def test_a_library_that_is_damaged_again(fresh, compiler, monkeypatch):
    keep = native._keep

    def lose(made: Path, key: str) -> None:
        keep(made, key)
        for path in fresh.iterdir():
            cut(path, 1000)

    monkeypatch.setattr(native, "_keep", lose)
    assert native.load() is None
    assert "does not read back" in native.why_not()
    assert builds(compiler) == 1


def test_a_library_that_does_not_load(fresh, compiler):
    (compiler / "made").write_text("no library")
    assert native.load() is None
    assert "cannot be loaded" in native.why_not()
    assert "\n" not in native.why_not()


def test_many_processes_at_once(fresh, compiler):
    for process in [start() for _ in range(3)]:
        succeed(process)
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so"


def without_compiler(monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")


def test_no_compiler(fresh, monkeypatch, caplog):
    without_compiler(monkeypatch)
    assert native.load() is None
    assert native.why_not() == "no C++ compiler (apt-get install g++)"
    assert not caplog.text
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native.linear(numbers(4, 6), numbers(8, 6))


@no_compiler
def test_sources_that_do_not_compile(fresh, monkeypatch, tmp_path):
    shutil.copytree(native.SOURCES, tmp_path / "cpp")
    (tmp_path / "cpp" / "norms.cpp").write_text("#error no such instructions\n")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpp")
    assert native.load() is None
    assert "no such instructions" in native.why_not()
    assert "\n" not in native.why_not()
    assert not fresh.exists()


def built_for_this_process_alone(compiler: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert native.load() is not None, native.why_not()
    assert "cannot write to the cache folder" in caplog.text
    assert builds(compiler) == 1
    assert torch.equal(native.linear(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))


def test_a_cache_folder_that_is_a_file(fresh, compiler, caplog):
    fresh.write_text("")
    built_for_this_process_alone(compiler, caplog)


def test_a_read_only_cache_folder(fresh, compiler, read_only_disk, monkeypatch, caplog):
    monkeypatch.setenv("SD_CACHE", str(read_only_disk))
    built_for_this_process_alone(compiler, caplog)


def test_a_full_disk(fresh, compiler, small_disk, monkeypatch, caplog):
    monkeypatch.setenv("SD_CACHE", str(small_disk))
    built_for_this_process_alone(compiler, caplog)
    assert not list(small_disk.iterdir())


def test_the_key_is_of_all_that_it_is_made_from(compiler, monkeypatch, tmp_path):
    shutil.copytree(native.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpp")
    script = compiler / "g++"
    keys = [native._key(str(script))]
    for source in sorted((tmp_path / "cpp").iterdir()):
        source.write_text(source.read_text() + "\n")
        keys.append(native._key(str(script)))
    (tmp_path / "cpp" / "more.h").write_text("")
    keys.append(native._key(str(script)))
    monkeypatch.setenv("SD_CXXFLAGS", "-g")
    keys.append(native._key(str(script)))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O2"))
    keys.append(native._key(str(script)))
    script.write_text("#!/bin/sh\necho version 13\n")
    keys.append(native._key(str(script)))
    monkeypatch.setattr(native, "_cpu", lambda: ["flags: another"])
    keys.append(native._key(str(script)))
    monkeypatch.setattr(native, "_openmp", lambda: ["-lomp"])
    keys.append(native._key(str(script)))
    assert len(set(keys)) == len(keys) == 6 + 1 + 8
    assert native._key(str(script)) == keys[-1]


# ---- the benchmarks of the kernels


@no_compiler
def test_profile_counts_the_operations_of_the_direct_way(monkeypatch):
    monkeypatch.setattr(native, "_call", native._call)
    clock = cpu_profile.Clock()
    native.linear(numbers(6, 16), numbers(32, 16))
    native.attention(*(numbers(1, 2, 24, 8) for _ in range(3)))
    native_conv(numbers(1, 8, 8, 8), numbers(16, 8, 3, 3), 4)
    assert clock.flops["sd_linear 6 x 16 x 32"] == 2 * 6 * 16 * 32
    assert clock.flops["sd_attention 24 x 24, heads of 8"] == 4 * 2 * 24 * 24 * 8
    assert clock.flops["sd_winograd F(4x4) at 8x8"] == 2 * 9 * 8 * 8 * 8 * 16
    assert set(clock.calls.values()) == {1}


@no_compiler
def test_a_build_beside_another(monkeypatch):
    monkeypatch.setattr(native, "load", native.load)  # is put back afterwards
    builds = [cpu_builds.build(native.SOURCES)] * 2
    for case in (cpu_builds.linear(6, 16, 32), cpu_builds.attention(24, 24, 8), cpu_builds.convolution(4, 8, 8, 16)):
        row = cpu_builds.compare(builds, case, rounds=3)
        assert row["kernel"] == case.label
        assert float(row["speed-up"].split()[0]) > 0


def test_sources_that_cannot_be_built(fresh, tmp_path, capsys):
    for name, source in (("other", "no C++"), ("empty", None), ("missing", None)):
        if name != "missing":
            (tmp_path / name).mkdir()
        if source:
            (tmp_path / name / "kernels.cpp").write_text(source)
        assert cpu_builds.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")
