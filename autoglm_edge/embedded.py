"""Files that come with the package: the pocket checkpoint and a screenshot to try it on.

In: nothing. Out: paths. The pocket model has the architecture of the 9B model at a thousandth of its size and
can operate the synthetic phone screens it was trained on; nothing else should be expected of it.
"""

from __future__ import annotations

from pathlib import Path

from autoglm_edge.errors import EdgeError

POCKET_NAME = "pocket"
"""Stands for the embedded checkpoint wherever a model can be named."""
SCREENSHOT_NAME = "screenshot.png"


def pocket_path() -> Path:
    """Folder of the embedded checkpoint.

    Raises:
        EdgeError: the package was installed without its data.
    """
    folder = Path(__file__).resolve().with_name(POCKET_NAME)
    if not (folder / "config.json").is_file():
        raise EdgeError(f"the embedded pocket model is not at {folder}; reinstall autoglm-edge")
    return folder


def sample_screenshot() -> Path:
    """A synthetic phone screen, PNG, that the pocket model can operate.

    Raises:
        EdgeError: the package was installed without its data.
    """
    path = pocket_path() / SCREENSHOT_NAME
    if not path.is_file():
        raise EdgeError(f"the embedded screenshot is not at {path}; reinstall autoglm-edge")
    return path
