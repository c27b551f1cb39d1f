"""Builds corral: setuptools, with the engines compiled into the wheel by mypyc.

A wheel carries the .py files and, where a C compiler is, the compiled modules beside them, which Python prefers.
Without one, or with CORRAL_PURE=1, it is a wheel of pure Python: the same code, slower. An editable install is always
pure: what is edited is what runs, and developing needs no compiler.

These are the hooks of pyproject.toml's `build-backend` (PEP 517); what they add to setuptools' own is what a compiled
wheel needs while it is built. `setup.py` asks here for the modules.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks passed on as they are)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# Plain slotted classes and ints, run for each lock. What is msgspec's (the messages) is in C already, and what waits
# for sockets and disks would gain nothing. Compiled code takes no stand-in for a class of ours: what tests hand
# stand-ins to stays as it is.
COMPILED = (
    "corral/base/engine.py",
    "corral/dlm/engine.py",
    "corral/dlm/events.py",
    "corral/dlm/extent.py",
    "corral/dlm/master.py",
    "corral/dlm/modes.py",
    "corral/dlm/operations.py",
    "corral/dlm/orphans.py",
    "corral/dlm/queries.py",
    "corral/dlm/recovery.py",
    "corral/dlm/requests.py",
    "corral/dlm/resource.py",
    "corral/dlm/solo.py",
    "corral/dlm/space.py",
    "corral/dlm/tables.py",
    "corral/providers/local.py",
    "corral/providers/locks.py",
    "corral/providers/page.py",
)

# mypyc checks types before it compiles, so it must see what the modules import.
COMPILER = ["mypy>=1.11", "msgspec>=0.18.6"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    required: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    return required + (COMPILER if may_compile() else [])


def extensions(arguments: list[str]) -> list[Extension]:
    """What `setup.py` is to compile for these arguments: for a wheel the engines, else nothing."""
    return compiled("src") if "bdist_wheel" in arguments and may_compile() else []


def compiled(source: str, *more: str) -> list[Extension]:
    """The compiled modules below the directory `source`, and `more` files."""
    from mypyc.build import mypycify

    files = [f"{source}/{module}" for module in COMPILED]
    # Not with the strictness of our own checks: a newer mypy may find more, which is no reason to build nothing.
    found: list[Extension] = mypycify(["--config-file=", *files, *more], opt_level="3", debug_level="0")
    return found


def may_compile() -> bool:
    """Unless that is not wanted (CORRAL_PURE=1) or there is no C compiler that finds Python's headers."""
    if os.environ.get("CORRAL_PURE", "0") not in ("", "0"):
        return False
    command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "probe.c"
        program.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        try:
            done = subprocess.run([*command, include, "-c", str(program), "-o", f"{program}.o"], capture_output=True)
        except OSError:
            return _pure(f"{command[0]} is not there")
    return done.returncode == 0 or _pure(f"{command[0]} does not find Python.h")


def _pure(reason: str) -> bool:
    sys.stderr.write(f"corral is built in pure Python: {reason}\n")
    return False
