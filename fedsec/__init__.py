"""fedsec: what a federated medical image classifier gives away, and what it costs to stop that.

The entry points are `fedsec.run`, `fedsec.sweep`, `fedsec.audit`, `fedsec.models.build` and `fedsec.data.load`;
importing the package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "audit", "run", "sweep"]

if TYPE_CHECKING:
    from fedsec.api import run
    from fedsec.audit.call import audit
    from fedsec.grid.run import sweep


def __getattr__(name: str) -> Any:
    if name == "run":
        from fedsec.api import run

        return run
    if name == "audit":
        import importlib

        return importlib.import_module("fedsec.audit")  # a package that can be called
    if name == "sweep":
        from fedsec.grid.run import sweep

        return sweep
    raise AttributeError(f"module 'fedsec' has no attribute '{name}'")
