"""Eight host devices and the compilation cache, set before JAX starts."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # thousands of small programs add up

import jax
import pytest

_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")  # with a cache of its own: one may read what another half wrote
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], _worker))

TESTS_PER_CACHE = 100
"""After so many tests a worker drops what it has compiled: with gigabytes of programs everything gets slow."""

_run = 0


def pytest_runtest_teardown():
    """Counts tests; programs that are needed again come from the compilation cache on disk."""
    global _run
    _run += 1
    if _run % TESTS_PER_CACHE == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compile_quickly():
    """For tests in which compiling is what takes time, not running."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
