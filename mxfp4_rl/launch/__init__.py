"""From a command line to a finished run: compose the configuration, check it, start verl, watch it, end it.

    compose    hydra's Compose API over the user's, the packaged and verl's configurations
    preflight  everything that can be known to be wrong before Ray starts, as one sentence with the fix
    inputs     the preflight's part on data and model
    run_dir    which directory a run owns; no two runs share one
    records    what a run writes down and says about itself before it starts
    run        the parent process: starts the child, follows it, ends it, reports
    child      the process that calls verl
    watch      death among the run's Ray processes, told and ended within seconds
    cluster    what a run on a shared Ray cluster needs
    processes  finding and ending every process of a run, also those that Ray detached
    progress   what is shown while the run goes on
    outcome    the report, the summary, and what went wrong
    failure    the useful lines of a failed run's log

    schema     every key's name and kind, against verl's own files and classes
    values     bounds of numbers, and names that verl's registries and sources know

Nothing here imports torch, Ray or verl at the top level: a misspelt override or recipe is answered in a second, and what only
verl's classes know in the few seconds that importing them takes.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

MIN_FREE_MEMORY = 6 * 2**30  # bytes; verl's processes alone take 3.6 GB
MIN_FREE_DISK = 2 * 2**30


class LaunchError(Exception):
    """A run that cannot start; the message names the value that is wrong and the fix."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """While verl is imported and asked: what it has to say about its optional parts is said again in the run's log."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
