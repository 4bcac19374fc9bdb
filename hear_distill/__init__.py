"""Distil HeAR into a small student. `from hear_distill import Student` works, lazily: the package itself is empty."""

from typing import Any

_WHERE = {"Student": "student", "StudentConfig": "student", "MelPcen": "frontend", "load_student": "student"}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Import the module behind `name` at its first use: a process that only moves bytes should not load torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
