"""What pruning did, for people who run a server: counters on /metrics, and a line in the log now and then.

The counts come from a worker, the page /metrics from the server's front. prometheus_client joins the two where the
variable PROMETHEUS_MULTIPROC_DIR names a folder, which `adafv serve` sees to; without it there is the log alone.
"""

import logging
import time
from functools import cache

from prometheus_client import Counter, Gauge

SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger("vllm.adafv")  # a child of vLLM's, so that its lines look and go like vLLM's


class _Counters:
    """What /metrics shows.

    Made by the first worker, not on import: the front imports this module too, and would show zeros for ever where the
    processes' counters are not joined.
    """

    def __init__(self) -> None:
        self.images = Counter("adafv:images", "Images pruned; those in vLLM's own caches are not pruned again.")
        self.without_words = Counter(
            "adafv:images_without_words", "Images pruned without text, as no word of their prompt counts."
        )
        self.tower_runs = Counter("adafv:tower_runs", "Images that went through the vision tower.")
        self.tower_cache_hits = Counter("adafv:tower_cache_hits", "Images taken from the cache of encoded images.")
        self.tokens_before = Counter("adafv:visual_tokens_before", "Visual tokens that the images would have had.")
        self.tokens_kept = Counter("adafv:visual_tokens_kept", "Visual tokens that the language model read.")
        self.cache_bytes = Gauge(
            "adafv:tower_cache_bytes", "Size of the cache of encoded images.", multiprocess_mode="livesum"
        )


_counters = cache(_Counters)
"""One set per process, whose registry takes no name twice."""


class Meter:
    """Counts in one worker; of several that hold the same images (tensor parallelism), only the first counts."""

    def __init__(self, counts: bool, capacity: int) -> None:
        self._counters = _counters() if counts else None
        self._capacity = capacity
        self._images = self._hits = self._before = self._kept = self._without_words = 0
        self._said = -SECONDS_BETWEEN_LINES

    def pruned(self, before: int, kept: int, without_text: str | None = None) -> None:
        """One image lost tokens, or was to keep all.

        Args:
            without_text: the method that chose in place of the server's, as no word of the prompt counts.
        """
        self._images, self._before, self._kept = self._images + 1, self._before + before, self._kept + kept
        if self._counters:
            self._counters.images.inc()
            self._counters.tokens_before.inc(before)
            self._counters.tokens_kept.inc(kept)
            if without_text is not None:
                self._count_without_words(without_text)

    def _count_without_words(self, method: str) -> None:
        assert self._counters is not None
        self._counters.without_words.inc()
        self._without_words += 1
        if self._without_words == 1:  # of the others, the counter and the line below tell how many
            logger.warning(
                "adafv: no word of a prompt counts for its image, so %s alone chooses the tokens of this image and of every "
                "further one that comes without words; ask a question about the image to have it looked at",
                method,
            )

    def encoded(self, runs: int, hits: int) -> None:
        """So many images go through the tower, and so many are taken from the cache."""
        self._hits += hits
        if self._counters:
            self._counters.tower_runs.inc(runs)
            self._counters.tower_cache_hits.inc(hits)

    def say(self, cached_images: int, cached_bytes: int) -> None:
        """Show the cache in /metrics, and all of it in the log, unless there was a line just now."""
        if self._counters is None:
            return
        self._counters.cache_bytes.set(cached_bytes)
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        logger.info(
            "adafv: %d images, %d of %d visual tokens kept; encoded before: %d (%.0f %%); tower cache: %d images, "
            "%.1f of %.1f MiB; without words: %d",
            self._images,
            self._kept,
            self._before,
            self._hits,
            100 * self._hits / max(1, self._images),
            cached_images,
            cached_bytes / 2**20,
            self._capacity / 2**20,
            self._without_words,
        )
