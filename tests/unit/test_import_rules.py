"""Who may import whom: the layout rules of docs/architecture.md, read from the source and tried for real."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pagewire", "frontend", "scheduler", "engine")

# Which of our packages each one may import, besides itself.
ALLOWED = {
    "pagewire": (),
    "frontend": ("pagewire",),
    "scheduler": ("pagewire", "engine.dispatch"),
    "engine": ("pagewire",),
}
# The parts of pagewire that start or embed the others.
ABOVE_ALL = (
    "pagewire.bench",
    "pagewire.cli",
    "pagewire.supervisor",
    "pagewire.llm",
    "pagewire.offline_engine",
    "pagewire.offline_jobs",
    "pagewire.offline_prompts",
)
WITHOUT_TORCH = ("frontend", "scheduler", "engine.dispatch", "engine.null")
# Inside engine, from the top down: a part imports only parts after it.
ENGINE_LAYERS = ("worker", "model_runner", "models", "layers", "kernels")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    """Every module of a package and its subpackages, by name."""
    return {module_name(path): path for path in (ROOT / package.replace(".", "/")).rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
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


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = (package, *ALLOWED[package])
    offences = [
        f"{name} imports {imported}"
        for name, path in modules(package).items()
        if not within(name, ABOVE_ALL)
        for imported in imports(path)
        if within(imported, PACKAGES) and not within(imported, allowed)
    ]
    assert offences == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_a_package_without_torch_does_not_name_it(package: str) -> None:
    offences = [
        f"{name} imports {imported}"
        for name, path in modules(package).items()
        for imported in imports(path)
        if within(imported, ("torch", "triton"))
    ]
    assert offences == []


def test_inside_the_engine_imports_go_down() -> None:
    offences = [
        f"{name} imports {imported}"
        for rank, layer in enumerate(ENGINE_LAYERS)
        for name, path in modules("engine").items()
        if within(name, (f"engine.{layer}",))
        for imported in imports(path)
        if within(imported, tuple(f"engine.{above}" for above in ENGINE_LAYERS[:rank]))
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
    assert "torch" not in loaded_by("engine.cli", "engine.worker", "engine.null.build")


def test_the_command_line_loads_nothing_heavy_before_a_command_needs_it() -> None:
    heavy = {"torch", "grpc", "numpy", "transformers", "tokenizers", "huggingface_hub", "gguf", "aiohttp"}
    assert not heavy & loaded_by("pagewire.cli.main")


def test_the_rules_name_what_exists() -> None:
    """A renamed part must not slip out of the rules unnoticed."""
    existing = set().union(*(modules(package) for package in PACKAGES))
    named = {*PACKAGES, *ABOVE_ALL, *WITHOUT_TORCH, *(f"engine.{layer}" for layer in ENGINE_LAYERS)}
    assert named <= existing
