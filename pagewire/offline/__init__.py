"""The engine inside a Python process: `LLM`."""

from pagewire.base.own_packages import use_own_packages

use_own_packages()
