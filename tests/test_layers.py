"""The layers of the code: imports point one way, and importing the package loads nothing it may not need.

    stream -> matrix -> backends -> ops -> nn -> models, continual -> memory, bench -> command line

Read from the source with ast, imports inside of functions included.
"""

import ast
from pathlib import Path

import pytest

import nmkern

PACKAGE = Path(nmkern.__file__).parent

# A module may import from its own layer and from earlier ones. ``nmkern`` itself only gathers names.
LAYERS = (
    ("stream",),
    ("matrix", "environment", "machine"),
    ("backends",),
    ("ops",),
    ("nn",),
    ("models", "continual"),
    ("memory", "bench"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {("nn", "backends"), ("models", "backends"), ("continual", "backends")}


def imported_modules(tree, module, is_package):
    """Every module that a tree imports, by its full name, in whatever place and form."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            # "from nmkern import ops" names a module, "from nmkern.ops import f" may name a function.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def breaches(source, module, is_package=False):
    """What a module imports and should not, in words."""
    layer = module.split(".")[1]
    if layer not in RANK:
        return [f"{module}: {layer} has no place in the layers; give it one"]
    found = []
    for name in sorted(set(imported_modules(ast.parse(source), module, is_package))):
        first, _, rest = name.partition(".")
        if first in ("tests", "benchmarks", "conftest", "formula"):
            found.append(f"{module} imports {name}")
        target = rest.split(".")[0]
        if first != "nmkern" or target not in RANK:
            continue
        if RANK[target] > RANK[layer]:
            found.append(f"{module} imports {name}, of a later layer")
        if (layer, target) in FORBIDDEN:
            found.append(f"{module} imports {name}: {layer} knows nothing of {target}")
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["nmkern", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if name != "nmkern":
            yield pytest.param(path, name, is_package, id=name)


@pytest.mark.parametrize(("path", "module", "is_package"), list(modules()))
def test_imports_point_one_way(path, module, is_package):
    assert breaches(path.read_text(), module, is_package) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import nmkern.nn", "nmkern.ops.x"),
        ("from nmkern import ops", "nmkern.matrix"),
        ("from nmkern import nn, stream", "nmkern.backends.cpu"),
        ("from nmkern.matrix import RandomMatrix", "nmkern.stream"),
        ("from nmkern.backends.selection import select", "nmkern.nn.x"),
        ("from nmkern.cli import main", "nmkern.models.flynet"),
        ("from ..models import flynet", "nmkern.ops.x"),
        ("from .. import models", "nmkern.ops.x"),
        ("def f():\n    from nmkern.nn import contexts", "nmkern.ops.x"),
        ("import importlib\nimportlib.import_module('nmkern.nn')", "nmkern.ops.x"),
        ("import tests.formula", "nmkern.ops.x"),
        ("from benchmarks import run", "nmkern.cli.x"),
        ("", "nmkern.somewhere"),
    ],
)
def test_a_breach_is_found(source, module):
    assert len(breaches(source, module)) >= 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch\nfrom nmkern import stream\nfrom nmkern.ops import checks", "nmkern.nn.x"),
        ("from . import records\nfrom .records import x", "nmkern.nn.x"),
        ("from nmkern.matrix import RandomMatrix", "nmkern.models.x"),
        ("from nmkern import continual", "nmkern.cli.x"),
    ],
)
def test_what_is_allowed_is_no_breach(source, module):
    assert breaches(source, module) == []


def test_the_environment_is_read_in_one_module():
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            if names & {"environ", "getenv", "environb"}:
                readers.add(path.relative_to(PACKAGE).as_posix())
    assert readers == {"environment.py"}


def test_importing_loads_no_library_that_may_not_be_needed(run_python):
    """Neither the native library, nor a compiler's package, nor what only training and figures need."""
    printed = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import nmkern\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print('_native' in open('/proc/self/maps').read())\n"
        "nmkern.RandomMatrix(2, 2, seed=0).materialize(); nmkern.models.FlyNet(8, 2, fan_in=2)\n"
        "print('_native' in open('/proc/self/maps').read())\n"
    )
    new, *native = printed.splitlines()
    assert "nmkern" in new.split()
    unwanted = {"matplotlib", "sklearn", "scipy", "rich", "triton", "safetensors", "ninja", "setuptools"}
    assert not unwanted & set(new.split())
    assert native == ["False", "False"]
