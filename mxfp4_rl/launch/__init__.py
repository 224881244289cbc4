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

Nothing here imports torch, Ray or verl at the top level: a mistake on the command line is answered in a second.
"""


class LaunchError(Exception):
    """A run that cannot start; the message names the value that is wrong and the fix."""
