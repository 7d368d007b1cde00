"""For tools that know no pyproject.toml; all metadata is there."""

from setuptools import setup

setup()
