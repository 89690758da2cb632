"""One wheel for every Python: what pyproject.toml cannot say, as a free-threaded Python has no limited API."""

import sysconfig

from setuptools import setup

LIMITED = {"bdist_wheel": {"py_limited_api": "cp310"}}

setup(options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else LIMITED)
