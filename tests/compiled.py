"""The tests against the wheel, whose engines are compiled: python -m tests.compiled [what pytest is to run]

The wheel is built and unpacked in a temporary directory, and the tests are run with that before this repository's
sources. What patches the inside of an engine is skipped: compiled code cannot be changed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import corral_build

ROOT = Path(__file__).parents[1]
TESTS = ("tests/unit", "tests/scenario", "tests/golden", "tests/sim/test_dlm.py")


def build(directory: Path) -> Path:
    """The wheel of these sources, unpacked."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)], check=True)
    (wheel,) = directory.glob("*.whl")
    unpacked = directory / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(unpacked), str(wheel)], check=True)
    return unpacked


def main() -> None:
    if not corral_build.may_compile():
        raise SystemExit("the engines cannot be compiled here: see the line above")
    with tempfile.TemporaryDirectory(prefix="corral-compiled-") as directory:
        environment = os.environ | {"PYTHONPATH": str(build(Path(directory)))}
        said = "import corral; print(corral.compiled(), corral.__file__)"
        found = subprocess.check_output([sys.executable, "-c", said], env=environment, text=True).strip()
        if found != f"True {directory}/site/corral/__init__.py":
            raise SystemExit(f"that is not the compiled wheel: {found}")
        print(f"engines compiled: {found.removeprefix('True ')}", flush=True)
        pytest = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
        raise SystemExit(subprocess.run([*pytest, *(sys.argv[1:] or TESTS)], env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
