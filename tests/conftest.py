"""Shapes and dtypes of the annotations are checked while the tests run. Files that take long come first."""

import contextlib
import os
from collections import Counter

# a program of a robot compiles in half of the CPU seconds; of those that are optimised, LLVM's first level is enough
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

install_import_hook(["envs", "shared", "algorithms"], "beartype.beartype")


def pytest_collection_modifyitems(items):
    # else one of the processes is left with minutes of them at the end
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -item.path.stat().st_size, item.path))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder in which all processes of this session keep compiled programs; it begins empty."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"


@pytest.fixture(scope="session")
def cache(compiled):
    """Environment variables by which scripts share compiled programs, where nothing hangs on compiling anew."""
    return {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile(request):
    """Programs that run for a moment are compiled with few optimisations, in half the time.

    Modules whose programs run for long say OPTIMISED.
    """
    jax.config.update("jax_disable_most_optimizations", not hasattr(request.module, "OPTIMISED"))


@pytest.fixture(scope="session")
def optimisations():
    """A context in which programs are compiled with them."""

    @contextlib.contextmanager
    def optimisations():
        jax.config.update("jax_disable_most_optimizations", False)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", True)

    return optimisations


@pytest.fixture
def optimised(optimisations):
    """One test whose program runs for long, in a module of others."""
    with optimisations():
        yield


@pytest.fixture(scope="session", autouse=True)
def share_compiled(compiled):
    """The tests' own processes share theirs too: two tests often compile the same program."""
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()  # else a program compiled while the tests were collected decides that there is none
