"""Who may import whom: the table of docs/architecture.md, held against the imports of every file.

An import is of one of two kinds. At import: whatever runs when the file is imported. Lazy: within a function, for types
alone, or when the file is run as a program.
"""

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
LOOKED_AT = ("sd", "bench", "train", "notebooks", "tests")
NO_TORCH = ("sd/pictures", "sd/service", "sd/inference.py", "sd/serve.py")


# ---- the table


@dataclass(frozen=True)
class Rule:
    """What some files may import: paths of files, or of folders, which end with a slash."""

    files: tuple[str, ...]
    at_import: tuple[str, ...]
    lazily: tuple[str, ...]


def read_table(document: str) -> list[Rule]:
    """The rules of the Markdown table between the markers."""
    table = document.split("<!-- imports -->")[1].split("<!-- end -->")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("|")][2:]
    return [Rule(*(tuple(re.findall(r"`([^`]+)`", cell)) for cell in row)) for row in rows]


def covers(path: str, file: str) -> bool:
    return file.startswith(path) if path.endswith("/") else file == path


def rule_of(file: str, rules: Iterable[Rule]) -> Rule | None:
    """The rule of a file's most specific path."""
    found = [(len(path), rule) for rule in rules for path in rule.files if covers(path, file)]
    return max(found, key=lambda one: one[0])[1] if found else None


# ---- the imports


@dataclass
class Imports:
    """Of one file, the files of the repository that it imports."""

    at_import: set[str] = field(default_factory=set)
    lazily: set[str] = field(default_factory=set)


def is_lazy(test: ast.expr) -> bool:
    """`if TYPE_CHECKING`, and `if __name__ == "__main__"`."""
    return {"TYPE_CHECKING", "__name__"} & {node.id for node in ast.walk(test) if isinstance(node, ast.Name)} != set()


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """All import statements below a node, and whether they are lazy."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and is_lazy(child.test):
            for each in child.body:
                yield from statements(ast.Module([each], []), True)
            yield from statements(ast.Module(child.orelse, []), lazy)
        else:
            within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, lazy or within)


def file_of(tree: Path, module: str) -> str | None:
    """The file of a module by its dotted name, if it is one of this repository."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if (tree / name).is_file()), None)


def targets(tree: Path, file: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The files that a statement imports; of `from a import b`, that of a.b if it is one, else that of a."""
    if isinstance(node, ast.Import):
        modules = [(alias.name, "") for alias in node.names]
    else:
        package = ".".join(Path(file).parent.parts[: len(Path(file).parts) - node.level]) if node.level else ""
        base = ".".join(filter(None, (package, node.module)))
        modules = [(base, alias.name) for alias in node.names]
    for module, name in modules:
        found = file_of(tree, f"{module}.{name}") if name else None
        if found := found or file_of(tree, module):
            yield found


def python_files(tree: Path) -> list[str]:
    files = [path for folder in LOOKED_AT for path in (tree / folder).rglob("*.py")]
    return sorted(str(path.relative_to(tree)) for path in [*files, *tree.glob("*.py")])


@functools.cache
def parsed(text: str) -> list[tuple[ast.stmt, bool]]:
    return list(statements(ast.parse(text)))


def read_imports(tree: Path) -> dict[str, Imports]:
    found = {}
    for file in python_files(tree):
        found[file] = Imports()
        for node, lazy in parsed((tree / file).read_text()):
            (found[file].lazily if lazy else found[file].at_import).update(targets(tree, file, node))
    return found


# ---- what is wrong with them


def violations(imports: Mapping[str, Imports], rules: list[Rule]) -> list[str]:
    """A line for each file without a rule, and for each import that its file's rule does not have."""
    wrong = []
    for file, own in imports.items():
        rule = rule_of(file, rules)
        if rule is None:
            wrong.append(f"{file} is in no row")
            continue
        kinds = (
            ("imports", own.at_import, rule.at_import),
            ("lazily imports", own.lazily, rule.at_import + rule.lazily),
        )
        for verb, files, allowed in kinds:
            bad = [one for one in files if not any(covers(path, one) for path in allowed)]
            wrong += [f"{file} {verb} {one}" for one in sorted(bad)]
    return wrong


def run_at_import(file: str, imports: Mapping[str, Imports]) -> set[str]:
    """The files that run when this one is imported: those it names, and the packages that they are in."""
    inits = {
        str(parent / "__init__.py") for one in imports[file].at_import for parent in Path(one).parents if parent.name
    }
    own = {str(parent / "__init__.py") for parent in Path(file).parents}
    return (imports[file].at_import | (inits - own)) & imports.keys()


def circle(imports: Mapping[str, Imports]) -> list[str]:
    """Files that import each other in a circle when they are imported, or []."""
    done: set[str] = set()

    def search(file: str, way: list[str]) -> list[str]:
        if file in way:
            return [*way[way.index(file) :], file]
        if file in done:
            return []
        for other in sorted(run_at_import(file, imports)):
            if found := search(other, [*way, file]):
                return found
        done.add(file)
        return []

    return next(filter(None, (search(file, []) for file in imports)), [])


# ---- the repository


@pytest.fixture(scope="module")
def rules() -> list[Rule]:
    return read_table(DOCUMENT.read_text())


@pytest.fixture(scope="module")
def imports() -> dict[str, Imports]:
    return read_imports(ROOT)


def test_every_import_is_in_the_table(imports, rules):
    assert violations(imports, rules) == []


def test_nothing_is_imported_in_a_circle(imports):
    assert circle(imports) == []


def test_every_path_of_the_table_is_there(rules):
    paths = {path for rule in rules for path in (*rule.files, *rule.at_import, *rule.lazily)}
    assert [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")] == []


def test_every_file_has_its_line():
    """Those of sd/, in the document's tables, once; a new optimization is found by `--list-opts`, and may lack one."""
    kinds = ("*.py", "*.cpp", "*.h", "*.json", "*.html", "*.css", "*.js")
    files = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "sd").rglob(kind)}
    rooms = DOCUMENT.read_text().split("## The rooms")[1].split("### Beside")[0]
    listed = re.findall(r"^\| `(sd/[^`]+)` \| \S", rooms, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) <= files
    assert {file for file in files - set(listed) if not file.startswith("sd/optimizations/")} == set()


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_at_import(name):
    """In a process of its own, each file is imported, and torch is not."""
    files = [name] if name.endswith(".py") else [str(p.relative_to(ROOT)) for p in (ROOT / name).glob("*.py")]
    modules = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the check itself


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository's Python files."""
    folder = tmp_path_factory.mktemp("copy")
    for file in python_files(ROOT):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture
def tree(copy) -> Iterator[Path]:
    """The copy, for a test to add to; what it added is gone after it."""
    before = {file: (copy / file).read_bytes() for file in python_files(copy)}
    yield copy
    for file in python_files(copy):
        if file not in before:
            (copy / file).unlink()
        elif (copy / file).read_bytes() != before[file]:
            (copy / file).write_bytes(before[file])


def add(tree: Path, file: str, line: str) -> None:
    (tree / file).write_text((tree / file).read_text() + f"\n\n{line}\n")


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("sd/unet.py", "from sd import optimizations", "sd/unet.py imports sd/optimizations/__init__.py"),
        ("sd/unet.py", "from .optimizations.base import Patch", "sd/unet.py imports sd/optimizations/base.py"),
        ("sd/unet.py", "from . import samplers", "sd/unet.py imports sd/samplers.py"),
        ("sd/samplers.py", "import sd.unet", "sd/samplers.py imports sd/unet.py"),
        ("sd/pipeline.py", "import sd.optimizations", "sd/pipeline.py imports sd/optimizations/__init__.py"),
        ("sd/pipeline.py", "class A:\n    from bench import common", "sd/pipeline.py imports bench/common.py"),
        (
            "sd/ddpm.py",
            "if TYPE_CHECKING:\n    from sd.unet import UNet",
            "sd/ddpm.py lazily imports sd/unet.py",
        ),
        (
            "sd/kernels/native.py",
            "def f():\n    from ..clip import CLIP",
            "sd/kernels/native.py lazily imports sd/clip.py",
        ),
        (
            "sd/optimizations/deepcache.py",
            "from sd.optimizations.tiling import tiled",
            "sd/optimizations/deepcache.py imports sd/optimizations/tiling.py",
        ),
        ("sd/pictures/plan.py", "import sd.pipeline", "sd/pictures/plan.py imports sd/pipeline.py"),
        (
            "bench/common.py",
            "try:\n    import tests.conftest\nexcept ImportError:\n    pass",
            "bench/common.py imports tests/conftest.py",
        ),
        ("sd/vae.py", "from train.data import x", "sd/vae.py imports train/data.py"),
    ],
)
def test_a_forbidden_import_is_found(tree, rules, file, line, found):
    add(tree, file, line)
    assert violations(read_imports(tree), rules) == [found]


def test_a_file_without_a_row_is_found(tree, rules):
    (tree / "sd" / "extra.py").write_text("import os\n")
    assert violations(read_imports(tree), rules) == ["sd/extra.py is in no row"]


def test_a_file_may_import_lazily_what_it_may_at_import(tree, rules):
    add(tree, "sd/unet.py", "def f():\n    from sd.config import Config")
    assert violations(read_imports(tree), rules) == []


@pytest.mark.parametrize(
    ("file", "line", "members"),
    [
        ("sd/config.py", "import sd.unet", {"sd/config.py", "sd/unet.py"}),
        ("sd/checkpoints/__init__.py", "from sd.models import build", None),
        ("sd/pipeline.py", "import sd.optimizations.gains", {"sd/pipeline.py", "sd/optimizations/__init__.py"}),
    ],
)
def test_a_circle_is_found(tree, file, line, members):
    """The last one goes through the package that Python runs before a file in it."""
    add(tree, file, line)
    found = circle(read_imports(tree))
    assert bool(found) == (members is not None)
    assert members is None or members <= set(found)


def test_a_lazy_import_makes_no_circle(tree):
    add(tree, "sd/config.py", "def f():\n    import sd.unet")
    assert circle(read_imports(tree)) == []
