"""What pyproject.toml cannot say: the modules that mypyc compiles."""

import sys

from corral_build import extensions
from setuptools import setup

setup(ext_modules=extensions(sys.argv))
