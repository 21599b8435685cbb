"""Whoever imports this waits for another of vLLM's processes asleep.

vLLM asks for a second without a pause whether there is news, which is right where each process has a core of its own. On two
cores the one that asks takes its turn from the one that works: of the tests of two workers a third of the seconds.
"""

import time

from vllm.distributed.device_communicators import shm_broadcast

shm_broadcast.sched_yield = lambda: time.sleep(0.0005)


class Patience:
    """For vLLM's `worker_extension_cls`, so that workers import this, too."""
