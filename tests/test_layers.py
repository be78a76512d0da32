"""The house rule: a module imports only from its own or a lower layer, and nothing goes in circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"errors", "types", "units", "ranges", "checksum"},
    {"config", "credentials", "endpoint", "events", "_boto3"},
    {"store"},
    {"transfer"},
    {"shard", "exchange"},
    {"plan", "loader", "checkpoint"},
    {"testing"},
    {"torch", "tensorflow", "jax", "lightning"},  # facades over integrations/
    {"cli", "__main__"},
]
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}
ADAPTERS = {"s3loader_torch": "torch", "s3loader_tensorflow": "tensorflow", "s3loader_jax": "jax"}


def module_name(path: Path) -> str:
    for root in (ROOT, *(ROOT / "integrations").glob("*")):
        if path.is_relative_to(root) and path.relative_to(root).parts[0].startswith("s3loader"):
            parts = list(path.relative_to(root).with_suffix("").parts)
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise AssertionError(f"no package root for {path}")


def sources() -> dict[str, Path]:
    files = [*(ROOT / "s3loader").rglob("*.py"), *(ROOT / "integrations").glob("*/s3loader_*/**/*.py")]
    return {module_name(path): path for path in files}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, modules: set[str], *, top_level_only: bool = False) -> set[str]:
    """Modules of ours that `path` imports, at any depth, types-only imports left out."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(path.read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.stmt) and is_type_checking(node):
            queue.extend(node.orelse)  # type: ignore[attr-defined]
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else str(node.module))
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        queue.extend(ast.iter_child_nodes(node))
    return {name for name in found if name in modules}


def layer(module: str) -> int | None:
    head, _, rest = module.partition(".")
    if head in ADAPTERS:
        return LAYER_OF[ADAPTERS[head]]
    if not rest:
        return None  # the package root: a table of contents, which may name everything
    return LAYER_OF[rest.split(".")[0]]


def test_every_module_has_a_layer() -> None:
    homeless = [name for name in sources() if name.startswith("s3loader.") and name.split(".")[1] not in LAYER_OF]
    assert not homeless, f"give these a layer in {Path(__file__).name} and in ARCHITECTURE.md: {homeless}"


def test_imports_go_down() -> None:
    modules = sources()
    wrong = []
    for name, path in modules.items():
        mine = layer(name)
        for target in imports(path, set(modules)):
            theirs = layer(target)
            if mine is not None and (theirs is None or theirs > mine):
                wrong.append(f"{name} (L{mine}) imports {target} (L{theirs})")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_cycles() -> None:
    modules = sources()
    graph = {name: imports(path, set(modules), top_level_only=True) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("package", sorted(ADAPTERS))
def test_adapters_use_only_the_public_api(package: str) -> None:
    """An adapter that needs a private name shows that the public API is not enough."""
    private = []
    for name, path in sources().items():
        if name.split(".")[0] != package:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("s3loader."):
                private += [f"{name}: {node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
                if any(part.startswith("_") for part in node.module.split(".")):
                    private.append(f"{name}: {node.module}")
    assert not private


def test_import_is_light() -> None:
    """`import s3loader` pulls in no framework, no SDK and no command line."""
    heavy = ["torch", "tensorflow", "jax", "boto3", "botocore", "obstore", "numpy", "click", "rich", "awscrt", "asyncio"]
    code = f"import sys, s3loader; print(*[m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
