from setuptools import setup

setup(cffi_modules=["emu/_uffd_build.py:ffibuilder"])
