"""The one place that imports and starts Warp."""

from __future__ import annotations

from types import ModuleType


def get_warp() -> ModuleType:
    """The `warp` module, initialised without its start-up print."""
    import warp

    warp.config.quiet = True
    warp.init()
    return warp
