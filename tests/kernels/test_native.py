"""How the C++ kernels are built and kept, and for which instruction set."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import cpu_builds, cpu_profile
from sd.kernels import native
from tests.kernels.support import native_conv, numbers
from tests.sparing import sparing

ROOT = Path(__file__).resolve().parent.parent.parent
no_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")


def test_types_are_those_of_the_sources():
    kinds = {"int64_t": native._L, "int": native._I, "float": native._F, "const int64_t*": native._S}
    kinds |= {"const float*": native._P, "float*": native._P, "const double*": native._Double, "int64_t*": native._S}
    kinds |= {"const void*": native._Any, "void*": native._Any, "int32_t*": native._Any}
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
    """The kernels as in a new process, with an empty cache folder; of the set that is built soonest."""
    monkeypatch.setenv("SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SD_CPU_ISA", "generic")
    native.attempt.cache_clear()
    yield tmp_path / "cache"
    native.attempt.cache_clear()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A build, to be copied."""
    if not native.compiler():
        pytest.skip("there is no C++ compiler")
    with mock.patch.dict(os.environ, {"SD_CPU_ISA": "generic"}):
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
    assert builds(compiler) == 1


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
    assert not list(fresh.iterdir())


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
    monkeypatch.setenv("SD_CPU_ISA", "generic")
    keys.append(native._key(str(script)))
    assert len(set(keys)) == len(keys) == 7 + len(list(native.SOURCES.iterdir()))
    assert native._key(str(script)) == keys[-1]


# ---- instruction sets


def test_the_best_set_is_the_default(monkeypatch):
    monkeypatch.delenv("SD_CPU_ISA", raising=False)
    assert native.wanted_set() == native.sets()[-1]
    assert set(native.SETS[native.sets()[-1]].flags) <= set(native._flags())
    monkeypatch.setenv("SD_CPU_ISA", " Generic ")
    assert native.wanted_set() == "generic"


FLAGS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "amx": {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_sets_by_a_cpus_flags(monkeypatch, name):
    names = list(FLAGS)[: list(FLAGS).index(name) + 1]
    flags = frozenset().union(*(FLAGS[n] for n in names))
    monkeypatch.setattr(native, "cpu_has", lambda: flags)
    assert native.sets() == names
    for missing in FLAGS[name]:
        monkeypatch.setattr(native, "cpu_has", lambda missing=missing: flags - {missing})
        assert native.sets() == names[:-1]


@pytest.mark.parametrize("name", ["avx2", "avx512", "amx"])
def test_a_set_that_the_cpu_lacks_is_refused_and_not_built(fresh, compiler, monkeypatch, name):
    monkeypatch.setenv("SD_CPU_ISA", name)
    monkeypatch.setattr(native, "cpu_has", lambda: frozenset({"sse2"}))
    assert native.load() is None
    assert f"SD_CPU_ISA={name}" in native.why_not()
    assert "it has generic" in native.why_not()
    assert builds(compiler) == 0


def test_a_set_that_is_none(fresh, monkeypatch):
    monkeypatch.setenv("SD_CPU_ISA", "avx1024")
    assert native.load() is None
    assert "'avx1024' and must be one of generic, avx2, avx512, amx" in native.why_not()


def test_a_cpu_with_less_is_not_given_more(fresh, monkeypatch):
    """A library for fewer instructions is another file, whose flags name no more."""
    monkeypatch.delenv("SD_CPU_ISA", raising=False)
    monkeypatch.setattr(native, "cpu_has", lambda: frozenset(FLAGS["avx2"]))
    assert native.wanted_set() == "avx2"
    assert "-march=x86-64-v3" in native._flags()
    assert "-march=native" not in native._flags()


def test_tiles_that_the_system_does_not_give(fresh, compiler, monkeypatch):
    class Refused:
        def __call__(self) -> int:
            return 0

    class Locked(ctypes.CDLL):
        def __getattr__(self, name: str):
            return Refused() if name == "sd_ready" else super().__getattr__(name)

    monkeypatch.setattr(ctypes, "CDLL", Locked)
    monkeypatch.setattr(native, "REFUSED", set())
    assert native.load() is None  # SD_CPU_ISA says which, so no other is taken
    assert "SD_CPU_ISA=avx512 does without" in native.why_not()
    assert set() == native.REFUSED


@no_compiler
def test_a_set_that_the_system_refuses_gives_way_to_the_next(fresh, compiler, monkeypatch):
    asked = []

    class Choosy(ctypes.CDLL):
        def __getattr__(self, name: str):
            if name != "sd_ready":
                return super().__getattr__(name)
            asked.append(native.wanted_set())
            return Answer("avx512" in asked)

    class Answer:
        def __init__(self, granted: bool):
            self.granted = granted

        def __call__(self) -> int:
            return int(self.granted)

    monkeypatch.setattr(ctypes, "CDLL", Choosy)
    monkeypatch.setattr(native, "REFUSED", set())
    monkeypatch.setattr(native, "cpu_has", lambda: native.AVX512 | native.AMX)
    monkeypatch.delenv("SD_CPU_ISA")
    assert native.load() is not None, native.why_not()
    assert {"amx"} == native.REFUSED
    assert native.wanted_set() == "avx512"
    assert builds(compiler) == 2


# ---- the benchmarks of the kernels


@no_compiler
def test_profile_counts_the_operations_of_the_direct_way(monkeypatch):
    monkeypatch.setattr(native, "_call", native._call)
    clock = cpu_profile.Clock()
    native.linear(numbers(6, 16), numbers(32, 16))
    native.attention(*(numbers(1, 2, 24, 8) for _ in range(3)))
    native_conv(numbers(1, 16, 8, 8), numbers(16, 16, 3, 3), 4)
    assert clock.flops["sd_linear 6 x 16 x 32"] == 2 * 6 * 16 * 32
    assert clock.flops["sd_attention 24 x 24, heads of 8"] == 4 * 2 * 24 * 24 * 8
    assert clock.flops["sd_winograd F(4x4) at 8x8"] == 2 * 9 * 8 * 8 * 16 * 16
    assert set(clock.calls.values()) == {1}


@no_compiler
def test_a_build_beside_another(monkeypatch):
    monkeypatch.setattr(native, "load", native.load)  # is put back afterwards
    builds = [cpu_builds.build(native.SOURCES)] * 2
    for case in (cpu_builds.linear(6, 16, 32), cpu_builds.attention(24, 24, 8), cpu_builds.convolution(4, 8, 16, 16)):
        row = cpu_builds.compare(builds, case, rounds=3)
        assert row["kernel"] == case.label
        assert float(row["speed-up"].split()[0]) > 0


@no_compiler
def test_sources_that_lack_newer_functions(fresh, tmp_path):
    shutil.copytree(native.SOURCES, tmp_path / "old")
    for source in (tmp_path / "old").glob("dot*.cpp"):
        source.unlink()
    library = cpu_builds.build(tmp_path / "old")
    assert hasattr(library, "sd_linear")
    assert not hasattr(library, "sd_dot_product")


def test_sources_that_cannot_be_built(fresh, tmp_path, capsys):
    for name, source in (("other", "void sd_linear( is no C++"), ("empty", None), ("missing", None)):
        if name != "missing":
            (tmp_path / name).mkdir()
        if source:
            (tmp_path / name / "kernels.cpp").write_text(source)
        assert cpu_builds.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")
