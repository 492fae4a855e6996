from setuptools import setup

# The two things that pyproject.toml can't say: the extension's builder, and that one abi3 wheel serves every Python.
setup(cffi_modules=["emu/_uffd_build.py:ffibuilder"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
