"""Tests of adafv inside vLLM. They need an environment of their own (`make test-vllm`), and are skipped in any other.

One engine at a time lives in this process: vLLM's in-process engine is the real one, less the process boundary, so what
the workers chose can be looked at. Tests of the server start the real server.
"""

import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
if not HAVE_VLLM:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands tests out to others (pytest-xdist) collects none, so it imports nothing."""
    if HAVE_VLLM and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        _prepare()


def _prepare() -> None:
    """What engines in this process, and the processes that tests start, need; before vLLM is imported and while it is."""
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # "eager" leaves out the model alone: two small functions would be compiled by a C++ compiler, in every process.
        "TORCHDYNAMO_DISABLE": "1",
    }

    # Imports leave no garbage, and looking through them takes half a second each time. vLLM does so some ten times for an
    # engine: it freezes what is there, and undoes that when an engine ends. Here what was imported alone is frozen, for good.
    gc.disable()
    from adafv.engines.vllm import cpu_torchvision

    if cpu_torchvision.import_error() is not None:  # what `adafv serve` does for servers, for engines in this process
        cpu_torchvision.load()
        # Commands that tests start read the variable; an engine's workers, which are spawned, get this process's path.
        sys.path.insert(0, str(cpu_torchvision.FOLDER))
        folders = str(cpu_torchvision.FOLDER), os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    # An engine looks through all modules, for seconds, to put its own in the place of a few functions: once is enough.
    from vllm.platforms.cpu import CpuPlatform

    if hasattr(CpuPlatform, "register_triton_kernel_overrides"):
        register = functools.cache(CpuPlatform.register_triton_kernel_overrides)
        CpuPlatform.register_triton_kernel_overrides = staticmethod(register)

    from vllm.v1.engine import core
    from vllm.v1.worker import gpu_worker

    core.freeze_gc_heap = gpu_worker.freeze_gc_heap = lambda: None

    # vLLM asks a process of its own what a model's class can do, so as not to touch a GPU: it imports all once more, for each
    # class that this machine's cache does not know. Here the class is imported anyway. Plug-ins that register classes in
    # fresh processes: two workers, and the server.
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.unfreeze = lambda: None  # type: ignore[assignment]
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked "release" takes engines of its own, for more of what another test shows: see docs/testing.md."""
    if not os.environ.get("ADAFV_WHOLE"):
        items[:] = [item for item in items if item.get_closest_marker("release") is None]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the checkpoints that tests make."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(autouse=True, scope="module")
def _one_engine_at_a_time() -> Iterator[None]:
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
