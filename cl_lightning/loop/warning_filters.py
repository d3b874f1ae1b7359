"""Filters for warnings of Lightning that every run causes and that do not apply to a stream."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # teachers and frozen parts are in eval mode
    r"You're resuming from a checkpoint .* your dataloader is not resumable",  # the loop gives the loader its step
    r"Total length of `\w+` across ranks is zero",  # there are no validation samples, or none for this process
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # tasks may be small
    r"Checkpoint directory .* exists and is not empty",  # each phase is a fit of its own
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # by Lightning itself
)
"""Patterns at the start of the messages; the command line and the tests ignore them everywhere."""


@contextmanager
def ignore_lightning_warnings() -> Iterator[None]:
    """Ignore these warnings inside the context, for any filters outside; all other warnings are not affected."""
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message)
        yield
