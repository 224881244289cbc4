"""Rewards with a time limit and a check, whatever reward manager verl was told to use.

verl waits for a reward function for ever, takes NaN for a reward, and drops a sample whose reward function raised. Here each
of its reward managers gets a guarded twin, registered as `GUARDED_PREFIX` + its name: a sample whose reward takes longer than
`mxfp4.guards.reward_timeout_s`, or is no finite number, fails like one whose reward function raised, and the log has an alarm
that says which. `guards.py` ends a run of which too many samples fail.

verl calls a reward function that is no coroutine in a thread of its event loop. A sample's time begins when it is its turn for
one, and a thread that is past its time is not waited for: others take its place.

A function that holds Python's lock (a regular expression that backtracks for ever) stops the whole reward worker, time limit
included: `mxfp4.guards.stall_s` then ends the run.
"""

import asyncio
import contextlib
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

from mxfp4_rl.launch.failure import ALARM_MARK
from mxfp4_rl.settings import Settings

GUARDED_PREFIX = "mxfp4_guarded_"
AT_ONCE = min(32, (os.cpu_count() or 1) + 4)  # calls in threads: as many as an event loop has of its own
OVERDUE = 1024  # threads that may hang beside them
ALARMS = 20  # lines a reward worker prints at most: a function that always raises would fill the log


class RewardError(RuntimeError):
    """A sample has no reward; the message says why."""


def guarded(manager: type) -> type:
    """A subclass of a reward manager of verl's whose `run_single` ends in time, with a number."""

    class Guarded(manager):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            self._timeout = Settings.from_config(config.get("mxfp4")).guards.reward_timeout_s
            self._alarms = 0
            if getattr(self, "is_async_reward_score", False):
                self._turn = contextlib.nullcontext()  # coroutines take no threads
            else:
                self._turn = asyncio.Semaphore(len(getattr(self, "reward_worker", ())) or AT_ONCE)  # "remote" has processes
                self.loop.set_default_executor(ThreadPoolExecutor(AT_ONCE + OVERDUE, thread_name_prefix="reward"))

        async def run_single(self, data) -> dict:
            async with self._turn:
                return await self._timed(data)

        async def _timed(self, data) -> dict:
            source = data[-1].non_tensor_batch.get("data_source")
            began = time.monotonic()
            try:
                result = await asyncio.wait_for(super().run_single(data), self._timeout)
            except Exception as error:
                # A reward function's own time-out, of a socket say, is of the same class as ours.
                if isinstance(error, asyncio.TimeoutError) and self._timeout and time.monotonic() - began >= self._timeout:
                    self._fail(source, f"took longer than mxfp4.guards.reward_timeout_s={self._timeout:g}", None)
                self._fail(source, f"raised {type(error).__name__}: {error}", error)
            if not is_reward(result["reward_score"]):
                self._fail(source, f"returned {result['reward_score']!r}, which is no finite number", None)
            return result

        def _fail(self, source, what: str, cause: Exception | None) -> None:
            message = f"the reward function {what} (data_source {source!r})"
            self._alarms += 1
            if self._alarms <= ALARMS:
                print(f"{ALARM_MARK}{message}", flush=True)
            raise RewardError(message) from cause

    Guarded.__name__ = Guarded.__qualname__ = f"Guarded{manager.__name__}"
    return Guarded


def is_reward(value) -> bool:
    """Whether verl can train on it: a finite number, NumPy's and torch's scalars included."""
    if value is None or isinstance(value, str | bytes):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def guard_rewards(config) -> None:
    """Have a run use the guarded twin of its reward manager; a manager of the user's own stays as it is."""
    chosen = config.reward.reward_manager
    if chosen.source == "register" and GUARDED_PREFIX + chosen.name in REWARD_MANAGER:
        chosen.name = GUARDED_PREFIX + chosen.name


for _name, _manager in list(REWARD_MANAGER.items()):
    if _name == "rate_limited":  # lets samples wait for their turn, and has a time limit of its own
        continue
    register(GUARDED_PREFIX + _name)(guarded(_manager))
