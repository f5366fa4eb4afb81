"""Our own packages, whatever a folder of the user's is called.

Three of them have common names: `engine`, `scheduler` and `frontend`. Python looks for a module in the
directory of a script, or the current one, before it looks where packages are installed. So processes that we
start do not look there, and a process of the user's that embeds the engine gets ours by their place.
"""

from __future__ import annotations

import os
import site
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NAMES = ("engine", "frontend", "scheduler")


def use_own_packages() -> None:
    """Has this process import our packages and no others of their names, wherever else it looks first.

    Raises:
        ImportError: another module of such a name is imported already.
    """
    for name in _NAMES:
        source = ROOT / name / "__init__.py"
        loaded = sys.modules.get(name)
        if loaded is not None:
            if Path(getattr(loaded, "__file__", None) or "").resolve() != source:
                raise ImportError(
                    f"pagewire has a package named {name!r}, and another module of that name is imported "
                    f"already: {loaded!r}. Rename that one, or use pagewire's Client instead of LLM",
                    name=name,
                )
            continue
        spec = spec_from_file_location(name, source, submodule_search_locations=[str(source.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)


def python_command(module: str) -> list[str]:
    """Runs one of our modules in a process of its own, which looks for modules in no current directory.
    It needs `python_path` in its environment."""
    return [sys.executable, "-P", "-m", module]


def python_path() -> dict[str, str]:
    """What the environment of such a process needs, for it to find a checkout that is not installed."""
    installed = (*site.getsitepackages(), site.getusersitepackages())
    if str(ROOT) in map(os.path.realpath, installed):
        return {}
    others = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{others}" if others else str(ROOT)}
