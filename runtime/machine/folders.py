"""Where this user's caches lie.

In: the environment. Out: a path, which need not exist. Knows nothing of what is kept there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from autoglm_edge.errors import DeviceError

CACHE_VARIABLE = "AUTOGLM_EDGE_CACHE"
_NAME = "autoglm-edge"


def cache_folder() -> Path:
    """The folder named by AUTOGLM_EDGE_CACHE, or `autoglm-edge` in the system's place for caches.

    That place is XDG_CACHE_HOME or ~/.cache; on macOS ~/Library/Caches, on Windows LOCALAPPDATA.

    Raises:
        DeviceError: this user has no home folder.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    place = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(place).is_absolute():  # the XDG specification has relative ones ignored
        return Path(place) / _NAME
    try:
        home = Path.home()
    except RuntimeError as error:
        raise DeviceError(f"this user has no home folder for caches; set {CACHE_VARIABLE} to one") from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / _NAME
