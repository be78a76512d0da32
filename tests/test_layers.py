"""The house rule: a module imports only from its own or a lower layer, and nothing goes in circles.

Every import counts: at the top, inside a function, for types only.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import s3loader
from s3loader import adapters

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"arguments", "errors", "types", "units", "ranges", "checksum"},
    {"config", "credentials", "options", "endpoint", "events", "ranks", "dtypes", "pages", "progress", "_boto3"},
    {"store"},
    {"fetch", "tasks"},
    {"shard"},
    {"exchange"},
    {"plan"},
    {"loader", "checkpoint"},
    {"adapters", "toolbox", "datagen", "oplog", "packing", "inspection", "bench"},
    {"testing"},
    {
        "torch",
        "tensorflow",
        "jax",
        "lightning",
        "ray",
        "s3",
        "compat",
        "webdataset",
    },  # facades over integrations/ and the toolbox
    {"cli", "__main__"},
]
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}
ADAPTERS = {
    "s3loader_torch": "torch",
    "s3loader_tensorflow": "tensorflow",
    "s3loader_keras": "tensorflow",
    "s3loader_jax": "jax",
    "s3loader_ray": "ray",
}
APART = [("loader", "checkpoint"), ("torch", "tensorflow", "jax", "ray")]
"""Of one layer, and still none imports from another."""
UP = {
    ("s3loader.store.objectstore", "s3loader.store.aio"): "made on first use of ObjectStore.aio, of the class's own verbs",
}
"""Imports that go in a circle, each with its reason; ``*`` at the end of a name matches any rest."""

PUBLIC = {
    *(
        "s3loader",
        "s3loader.adapters",
        "s3loader.checkpoint",
        "s3loader.checkpoint.dcp",
        "s3loader.exchange",
        "s3loader.loader",
    ),
    *(
        "s3loader.cli.main",
        "s3loader.compat.s3dlio",
        "s3loader.plan",
        "s3loader.shard",
        "s3loader.store",
        "s3loader.testing",
        "s3loader.testing.suite",
    ),
    *(f"s3loader.{name}" for level in (*LAYERS[:2], *LAYERS[-4:]) for name in level),
}
"""What tests import from: packages by their ``__all__``, the nouns of the lowest layers, and what stands above the core."""
INTERNAL = {
    "the order of samples is held by golden digests and laws of its functions": [
        "s3loader.plan.mixture",
        "s3loader.plan.order",
        "s3loader.plan.permutation",
    ],
    "stored formats are read and written here byte by byte": [
        "s3loader.checkpoint.format.boxes",
        "s3loader.checkpoint.format.segments",
        "s3loader.checkpoint.format.layout",
        "s3loader.checkpoint.format.records",
        "s3loader.checkpoint.protocol.merge",
        "s3loader.checkpoint.protocol.tombstones",
        "s3loader.exchange.keys",
        "s3loader.exchange.lines",
        "s3loader.fetch.safetensors",
        "s3loader.loader.quarantine",
        "s3loader.loader.urls",
        "s3loader.shard.compression",
        "s3loader.shard.foreign",
        "s3loader.shard.index",
        "s3loader.shard.samples",
        "s3loader.shard.tar",
    ],
    "answers that no server here gives are put into the parser, and into the tables of errors": [
        "s3loader.store.boto3.client",
        "s3loader.store.client_errors",
        "s3loader.store.s3.http",
        "s3loader.store.s3.xml",
        "s3loader.store.s3errors",
    ],
    "one engine, chosen by hand": [
        "s3loader.store.arguments",
        "s3loader.store.boto3.engine",
        "s3loader.store.engine_choice",
        "s3loader.store.local.files",
        "s3loader.store.obstore.client",
        "s3loader.store.obstore.engine",
        "s3loader.store.obstore.runtime",
        "s3loader.store.s3",
        "s3loader.store.s3.connection",
        "s3loader.store.s3.in_flight",
        "s3loader.store.s3.jobs",
        "s3loader.store.s3.pump",
        "s3loader.store.s3.reads",
        "s3loader.store.s3.blocking",
    ],
    "memory, threads and races inside a call; the model of the commit is replayed on its objects": [
        "s3loader.checkpoint.protocol.commit",
        "s3loader.checkpoint.protocol.roots",
        "s3loader.checkpoint.protocol.run",
        "s3loader.checkpoint.reading.targets",
        "s3loader.checkpoint.rendezvous",
        "s3loader.checkpoint.threads",
        "s3loader.checkpoint.writing.copying",
        "s3loader.checkpoint.writing.incremental",
        "s3loader.checkpoint.writing.staging",
        "s3loader.exchange.commit",
        "s3loader.fetch.cached",
        "s3loader.fetch.claims",
        "s3loader.fetch.diskcache",
        "s3loader.store.buffers",
        "s3loader.store.lost_reply",
        "s3loader.store.ordered",
        "s3loader.store.probe",
        "s3loader_torch.checkpoint_device",
        "s3loader_torch.convert",
        "s3loader_torch.shared_slots",
        "s3loader_torch.topology",
    ],
    "a limit or a table of keywords that a test must know": [
        "s3loader.shard.upload",
        "s3loader.store.parts",
        "s3loader.testing.servers",
    ],
}
"""Why -> internal modules that tests import. Tests stand on behaviour: take lines away, add none."""


def module_name(path: Path) -> str:
    for root in (ROOT, *(ROOT / "integrations").glob("*")):
        if path.is_relative_to(root) and path.relative_to(root).parts[0].startswith("s3loader"):
            parts = list(path.relative_to(root).with_suffix("").parts)
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise AssertionError(f"no package root for {path}")


def sources() -> dict[str, Path]:
    files = [*(ROOT / "s3loader").rglob("*.py"), *(ROOT / "integrations").glob("*/s3loader_*/**/*.py")]
    return {module_name(path): path for path in files}


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of ours that `path` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else str(node.module))
    return {name for name in found if name in modules}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    trail: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        trail.append(name)
        for target in sorted(graph[name]):
            if target not in number:
                visit(target)
            if target in trail:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == number[name]:
            members = trail[trail.index(name) :]
            del trail[trail.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in graph:
        if name not in number:
            visit(name)
    return found


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
            if mine is None or (target == "s3loader" and mine > LAYER_OF["checkpoint"]):
                continue  # the package root names everything, so only what stands above the core uses it
            if (
                theirs is None
                or theirs > mine
                or any({part(name), part(target)} <= {*group} for group in APART if part(name) != part(target))
            ):
                wrong.append(f"{name} (L{mine}) imports {target} (L{theirs})")
    assert not wrong, "\n".join(sorted(wrong))


def part(module: str) -> str:
    head, _, rest = module.partition(".")
    return ADAPTERS[head] if head in ADAPTERS else rest.split(".")[0]


def test_every_import_names_a_module_that_is_there() -> None:
    """One inside a function, or of a file that was moved meanwhile, would be missed only when it is run."""
    modules = {*sources()}
    gone = []
    for folder in ("s3loader", "integrations", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            if any(part.startswith(".") for part in path.relative_to(ROOT).parts):  # others' code, of the benchmarks
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    named = [str(node.module)]
                gone += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
                    for name in named
                    if name.split(".")[0].startswith("s3loader") and name not in modules
                ]
    assert not gone, "\n".join(gone)


def test_no_import_goes_in_a_circle() -> None:
    modules = sources()
    graph = {name: imports(path, set(modules)) - {name} for name, path in modules.items()}
    for source, target in UP:
        using = [name for name, targets in graph.items() if fnmatch(name, source) and target in targets]
        assert using, f"no longer needed in {Path(__file__).name}: {source} -> {target}"
        for name in using:
            graph[name].discard(target)
    found = circles(graph)
    assert not found, "\n".join(
        f"{name} -> {target}" for members in found for name in members for target in sorted(graph[name] & {*members})
    )


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}) == [
        ["d", "e"],
        ["a", "b", "c"],
    ]


def test_tests_stand_on_public_names() -> None:
    modules = {*sources()}
    used: dict[str, str] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            used |= dict.fromkeys(imports(path, modules) - PUBLIC, path.name)
    listed = {name for names in INTERNAL.values() for name in names}
    new = {name: file for name, file in used.items() if name not in listed}
    assert not new, f"use public names (s3loader, s3loader.store, ..., s3loader.testing) instead: {new}"
    assert not listed - {*used}, f"no test imports these any more, take them off INTERNAL: {sorted(listed - {*used})}"


@pytest.mark.parametrize("package", sorted(ADAPTERS))
def test_integrations_use_public_names_and_the_list_for_adapters(package: str) -> None:
    """An integration that needs another name shows that the list is not enough."""
    listed = {name for group in adapters.NAMES.values() for name in group}
    wrong = []
    for name, path in sources().items():
        if name.split(".")[0] != package:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                wrong += [f"{name}: import {n}" for n in found if n.split(".")[0] == "s3loader"]
            elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "s3loader":
                allowed = {"s3loader": {*s3loader.__all__}, "s3loader.adapters": listed}.get(str(node.module), set())
                wrong += [f"{name}: {node.module}.{n}" for n in found if n not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_list_for_adapters_is_whole() -> None:
    """Each name has a sentence, exists, is seen by type checkers, and is used by an integration or is a protocol."""
    tree = ast.parse(Path(adapters.__file__).read_text())
    typed = {
        (alias.name, str(node.module))
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    listed = {name: what for group in adapters.NAMES.values() for name, what in group.items()}
    assert typed == {(name, home) for name, (home, _) in listed.items()}
    assert sum(map(len, adapters.NAMES.values())) == len(listed)
    assert not {*listed} & {*s3loader.__all__}
    for name, (_, sentence) in listed.items():
        assert sentence.endswith(".")
        assert getattr(adapters, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adapters.no_such_name


def test_import_is_light() -> None:
    """`import s3loader` (and its list for adapters) pulls in no framework, no SDK and no command line."""
    heavy = ["torch", "tensorflow", "jax", "boto3", "botocore", "obstore", "numpy", "click", "rich", "awscrt", "asyncio"]
    code = f"import sys, s3loader, s3loader.adapters; print(*[m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_docstrings_say_the_thing() -> None:
    """`help()` must answer; "See `X`" sends the reader on."""
    found = []
    for name, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            body = getattr(node, "body", None)
            for item in body if isinstance(body, list) else ():
                text = item.value.value if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) else None
                if isinstance(text, str) and re.search(r"\b[Ss]ee `", text):
                    found.append(f"{name}:{item.lineno}: {text.strip().splitlines()[0]}")
    assert not found, "\n".join(found)
