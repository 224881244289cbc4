"""The socket that weights travel through from the trainer to vLLM's workers, told apart between runs on one machine.

verl 0.9.1 names it by Ray's job id, in /tmp. Ray counts jobs anew in each cluster, so every run that starts its own has job
01000000: of two runs on a machine, on other GPUs too, one's engine takes the other's weights. Ray's session is another one
in each cluster and the same on all its nodes.
"""

import hashlib

import ray


def run_id() -> str:
    """Of this run among all runs of all Ray clusters: 16 hexadecimal digits, as a socket's path may have 107 characters."""
    context = ray.get_runtime_context()
    return hashlib.sha256(f"{context.get_session_name()} {context.get_job_id()}".encode()).hexdigest()[:16]
