"""Starts the processes of a service, keeps them running and stops them in order."""

from pagewire.supervisor.child import Child, ChildFailed, ChildRefused, ProcessSpec, Report, describe
from pagewire.supervisor.ranks import ranks_of
from pagewire.supervisor.service import Supervisor

__all__ = [
    "Child",
    "ChildFailed",
    "ChildRefused",
    "ProcessSpec",
    "Report",
    "Supervisor",
    "describe",
    "ranks_of",
]
