"""Tests of adafv inside lmms-eval. They need an environment of their own (`make test-lmms`), and are skipped in any other.

Everything runs offline, on tasks that are drawn here (`drawn_tasks.py`), with the bundled model. The expected answers come
from adafv as users call it, one question at a time.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        os.environ.pop(name, None)

    from drawn_tasks import Drawn, draw

    from adafv.asking.session import Session

    @pytest.fixture(scope="session")
    def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
        """Local tasks of drawn scenes, in a folder."""
        return draw(tmp_path_factory.mktemp("tasks"))

    @pytest.fixture(scope="session")
    def session() -> Session:
        """The bundled model, loaded apart from the one that lmms-eval loads."""
        import torch

        return Session.load("bundled", "auto", torch.device("cpu"))
