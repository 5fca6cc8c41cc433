"""Packages that only some options need: imported when asked for, missed in one line."""

from __future__ import annotations

import importlib
from typing import Any

from launch.job.world import UserError


def load(module: str) -> Any:
    """Import a module of another package.

    Raises:
        UserError: the package is missing; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise UserError(f"this needs the package {package} ({error}): pip install {package}") from error
