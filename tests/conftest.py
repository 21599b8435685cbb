"""Shared settings: no network, quiet transformers, one thread (small models are slower with two that wait for each other)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)
