"""planc: a compiler for inference plans. `compile` a model with a plan, `load` an artifact, `generate`.

Names are resolved on first use, so that running an artifact never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc._load import load
    from planc.compiler.compile import compile  # noqa: A004 - the public name
    from planc.compiler.plan import Plan
    from planc.runtime.errors import PlancError
    from planc.runtime.executable import Executable, Generation
    from planc.runtime.filler import Filled, Filler
    from planc.runtime.vision import Classifier, ImageSpec, Prediction

    __version__: str

_HOMES = {
    "compile": "planc.compiler.compile",
    "load": "planc._load",
    "Plan": "planc.compiler.plan",
    "Classifier": "planc.runtime.vision",
    "ImageSpec": "planc.runtime.vision",
    "Prediction": "planc.runtime.vision",
    "Executable": "planc.runtime.executable",
    "Generation": "planc.runtime.executable",
    "Filled": "planc.runtime.filler",
    "Filler": "planc.runtime.filler",
    "PlancError": "planc.runtime.errors",
}

__all__ = [
    "Classifier",
    "Executable",
    "Filled",
    "Filler",
    "Generation",
    "ImageSpec",
    "Plan",
    "PlancError",
    "Prediction",
    "__version__",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from planc.runtime.contract import version_of

        value: Any = version_of("planc") or "0+uninstalled"
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'planc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
