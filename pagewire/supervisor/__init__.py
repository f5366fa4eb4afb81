"""Starts the processes of a service, keeps them running and stops them in order."""

from pagewire.supervisor.child import Child, ChildFailed, ProcessSpec, Report, describe
from pagewire.supervisor.service import Supervisor

__all__ = ["Child", "ChildFailed", "ProcessSpec", "Report", "Supervisor", "describe"]
