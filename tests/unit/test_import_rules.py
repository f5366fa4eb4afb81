"""Who may import whom: the layout rules of docs/architecture.md, read from the source and tried for real."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pagewire", "frontend", "scheduler", "engine")

STUBS = ("pagewire.admin", "pagewire.inference", "pagewire.scheduler", "pagewire.triton", "pagewire.worker")
GROUND = (
    *("pagewire.base", "pagewire.telemetry", "pagewire.wire", "pagewire.hub", "pagewire.structured"),
    *STUBS,
)
ROOF = (
    *(
        "pagewire",
        "pagewire.offline",
        "pagewire.on_ray",
        "pagewire.cli",
        "pagewire.supervisor",
        "pagewire.bench",
    ),
    "pagewire.export",
)

# What each part may import of ours besides itself. A module belongs to the longest name that it is under.
# Nothing is exempt: a module under none of the names fails.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # The ground: what everything stands on.
    "pagewire.base": (),
    "pagewire.telemetry": ("pagewire.base",),
    **dict.fromkeys(STUBS, STUBS),
    "pagewire.wire": ("pagewire.base", *STUBS),
    "pagewire.hub": ("pagewire.base", "pagewire.wire"),
    "pagewire.structured": ("pagewire.base", "pagewire.wire", "pagewire.hub"),
    # The three kinds of process.
    "frontend": GROUND,
    "scheduler": (*GROUND, "engine.dispatch", "scheduler.blocks", "scheduler.policy"),
    "engine": GROUND,
    # Inside the scheduler: `scheduler` itself is the core and its data, which know nothing of processes.
    "scheduler.blocks": ("pagewire.wire", "scheduler.request", "scheduler.rows"),
    "scheduler.policy": (
        *("pagewire.base", "engine.dispatch", "scheduler.blocks"),
        *("scheduler.request", "scheduler.step"),
    ),
    "scheduler.masks": (*GROUND, "engine.dispatch", "scheduler.request", "scheduler.step"),
    "scheduler.workers": ("pagewire.base", "engine.dispatch", "scheduler.core", "scheduler.masks"),
    "scheduler.serve": (*GROUND, "engine.dispatch", "scheduler"),
    "scheduler.__main__": ("pagewire.base", "pagewire.telemetry", "scheduler.config", "scheduler.serve"),
    # Inside the engine, from the ground up.
    "engine.config": ("pagewire.base", "engine.speculation"),
    "engine.speculation": ("pagewire.base",),
    "engine.dispatch": ("pagewire.worker",),
    "engine.kernels": (),
    "engine.attention": (),
    "engine.sampling": ("engine.dispatch",),
    "engine.step": ("engine.attention", "engine.dispatch", "engine.sampling"),
    "engine.quant": ("pagewire.base", "pagewire.hub", "engine.layers"),
    "engine.parallel": ("pagewire.base",),
    "engine.layers": ("engine.attention", "engine.parallel"),
    "engine.models": ("pagewire.base", "pagewire.hub", "engine.attention", "engine.layers", "engine.quant"),
    "engine.platform": (
        *("pagewire.base", "engine.config", "engine.dispatch"),
        *("engine.attention", "engine.layers", "engine.models", "engine.parallel", "engine.quant"),
        "engine.step",
    ),
    "engine.loader": (
        *("pagewire.base", "pagewire.hub", "engine.layers", "engine.models", "engine.platform"),
        "engine.quant",
    ),
    "engine.lora": (
        *("pagewire.base", "pagewire.hub", "engine.layers", "engine.loader", "engine.models"),
        *("engine.platform", "engine.quant", "engine.config", "engine.dispatch", "engine.step"),
    ),
    "engine.cpu": (
        *("pagewire.base", "engine.config", "engine.dispatch", "engine.attention", "engine.sampling"),
        *("engine.step", "engine.layers", "engine.lora", "engine.models", "engine.platform", "engine.quant"),
        "engine.speculation",
    ),
    "engine.cuda": (
        *("pagewire.base", "engine.config", "engine.dispatch", "engine.kernels", "engine.attention"),
        *("engine.sampling", "engine.step", "engine.layers", "engine.models", "engine.platform"),
        *("engine.lora", "engine.parallel", "engine.quant", "engine.speculation"),
    ),
    "engine.null": (
        *("pagewire.base", "pagewire.hub", "engine.config", "engine.dispatch"),
        *("engine.step", "engine.models"),
    ),
    "engine.warmup": (
        *("pagewire.base", "pagewire.hub", "engine.config", "engine.kernels", "engine.attention"),
        *("engine.step", "engine.layers", "engine.models", "engine.platform", "engine.loader", "engine.cuda"),
        *("engine.lora", "engine.parallel", "engine.quant"),
    ),
    "engine.worker": (
        *("pagewire.base", "pagewire.telemetry", "pagewire.hub"),
        *("engine.config", "engine.dispatch", "engine.models"),
        *("engine.step", "engine.platform", "engine.loader", "engine.cpu", "engine.cuda", "engine.null"),
        *("engine.layers", "engine.lora", "engine.parallel", "engine.warmup"),
    ),
    "engine.__main__": ("pagewire.base", "engine.config", "engine.worker"),
    # The roof: what people import and type, which starts or embeds the three.
    **dict.fromkeys(ROOF, PACKAGES),
}
WITHOUT_TORCH = ("frontend", "scheduler", "engine.dispatch", "engine.null")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    """Every module of a package and its subpackages, by name."""
    return {module_name(path): path for path in (ROOT / package.replace(".", "/")).rglob("*.py")}


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of what a file imports, anywhere in it."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@cache
def part_of(module: str) -> str:
    """The part that a module belongs to."""
    return max((part for part in MAY_IMPORT if within(module, (part,))), key=len)


@cache
def may_import(part: str, imported: str) -> bool:
    """Whether what is imported belongs to the part itself or one that it may import. A name that is allowed
    whole covers all that lies under it."""
    return part_of(imported) == part or within(imported, MAY_IMPORT[part])


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    offences = [
        f"{name} imports {imported}"
        for package in PACKAGES
        for name, path in modules(package).items()
        if part_of(name) == part
        for imported in imports(path)
        if within(imported, PACKAGES) and not may_import(part, imported)
    ]
    assert offences == []


def test_no_part_may_import_what_may_import_it() -> None:
    """The ground is below the three, and they below the roof."""
    for part in GROUND:
        assert not any(
            within(name, ("engine", "scheduler", "frontend", *ROOF[1:])) for name in MAY_IMPORT[part]
        )
    for part, allowed in MAY_IMPORT.items():
        if part not in ROOF:
            assert not any(name in ROOF for name in allowed), part


def imported_modules() -> dict[str, set[str]]:
    """Which of our modules each of them imports, those for types alone included."""
    everything = {name: path for package in PACKAGES for name, path in modules(package).items()}

    def longest(imported: str) -> str:
        while imported and imported not in everything:
            imported = imported.rpartition(".")[0]
        return imported

    return {
        name: {longest(imported) for imported in imports(path)} - {"", name}
        for name, path in everything.items()
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imported_modules()
    while leaves := [name for name, needed in graph.items() if not needed]:
        for leaf in leaves:
            del graph[leaf]
        for needed in graph.values():
            needed.difference_update(leaves)
    assert graph == {}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_a_package_without_torch_does_not_name_it(package: str) -> None:
    offences = [
        f"{name} imports {imported}"
        for name, path in modules(package).items()
        for imported in imports(path)
        if within(imported, ("torch", "triton"))
    ]
    assert offences == []


def loaded_by(*names: str) -> set[str]:
    """The modules a fresh interpreter has loaded after importing these."""
    program = f"import sys, {', '.join(names)}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_a_process_without_torch_never_loads_it(package: str) -> None:
    names = [name for name in modules(package) if not name.endswith("__main__")]
    loaded = loaded_by(*names)
    assert "torch" not in loaded
    others = set(PACKAGES) - {package.partition(".")[0], "pagewire", *(["engine"] * (package == "scheduler"))}
    assert not others & loaded


def test_a_worker_with_the_null_engine_never_loads_torch() -> None:
    assert "torch" not in loaded_by("engine.worker.cli", "engine.worker.loop", "engine.null.build")


def test_a_process_that_is_started_for_a_service_loads_no_library_for_command_lines() -> None:
    assert not {"typer", "pagewire.cli"} & loaded_by(
        "engine.__main__", "frontend.__main__", "frontend.server"
    )


def test_the_command_line_loads_nothing_heavy_before_a_command_needs_it() -> None:
    heavy = {"torch", "grpc", "numpy", "transformers", "tokenizers", "huggingface_hub", "gguf", "aiohttp"}
    assert not heavy & loaded_by("pagewire.cli.main")


def test_the_rules_name_what_exists() -> None:
    """A renamed part must not slip out of the rules unnoticed."""
    existing = set().union(*(modules(package) for package in PACKAGES))
    named = {*MAY_IMPORT, *WITHOUT_TORCH, *(name for names in MAY_IMPORT.values() for name in names)}
    assert named <= existing
