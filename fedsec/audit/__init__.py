"""The audit of a trained model: what it gives away, beside what is claimed, beside what could not have been seen.

The package can be called: `fedsec.audit("runs/first")`, see `fedsec.audit.call.audit`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **words: Any) -> dict[str, Any]:
        from fedsec.audit.call import audit

        return audit(*arguments, **words)


sys.modules[__name__].__class__ = _Callable
