"""The one place that imports and starts NVIDIA Warp, and that checks its device names."""

from __future__ import annotations

from types import ModuleType


def get_warp() -> ModuleType:
    """The `warp` module, initialised without its start-up and compilation prints."""
    import warp

    if hasattr(warp.config, "log_level"):
        warp.config.log_level = max(warp.config.log_level, 40)
    else:
        warp.config.quiet = True
    warp.init()
    return warp


def check_warp_device(device: str) -> str:
    """Return `device` as a string if Warp can run there.

    Raises:
        ValueError: the device is unknown, or it is a CUDA device where Warp sees none.
    """
    warp = get_warp()
    name = str(device)
    cuda = [d.alias for d in warp.get_cuda_devices()]
    known = ["cpu", *(["cuda"] if cuda else []), *cuda]
    if name not in known:
        hint = "; Warp sees no CUDA device here" if name.startswith("cuda") and not cuda else ""
        raise ValueError(f"device must be one of {known}, got {device!r}{hint}")
    return name
