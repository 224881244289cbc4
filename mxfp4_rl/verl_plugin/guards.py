"""What ends a run that cannot learn any more or waits without end, instead of letting it burn the night.

verl skips an update whose gradient norm is not finite and goes on, step after step; trains on whatever samples did not fail;
generates for ever where `algorithm.filter_groups` finds no group with two different rewards (its key `max_num_gen_batches` is
ignored by the V1 trainer; here it counts); and waits for ever for an actor that hangs. `Guards` counts, `StallWatch` looks at
the clock. Limits are in `mxfp4.guards`; what a guard says names the step, what was seen, and what to do.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable

from mxfp4_rl.launch.failure import ALARM_MARK, FAULT_MARK
from mxfp4_rl.settings import GuardSettings

WATCHED = ("actor/grad_norm", "actor/pg_loss", "actor/kl_loss", "actor/entropy")


class GuardError(RuntimeError):
    """The run is ended by a guard."""


class Guards:
    """The counts behind a run's guards.

    Args:
        settings: the `mxfp4.guards` block.
        batch_size: prompts of a step.
        max_gen_batches: verl's `algorithm.filter_groups.max_num_gen_batches`; 0 for no limit.
    """

    def __init__(self, settings: GuardSettings, batch_size: int, max_gen_batches: int = 0):
        self.settings, self.batch_size, self.max_gen_batches = settings, batch_size, max_gen_batches
        self._nonfinite = 0
        self._generated = batch_size

    def begin_step(self) -> None:
        """A step begins, with one batch of prompts."""
        self._generated = self.batch_size

    def refill(self, step: int, prompts: int, found: int) -> None:
        """Before `prompts` more are generated in a step that has `found` groups with two different rewards so far.

        Raises:
            GuardError: enough was tried.
        """
        batches = self._generated / self.batch_size
        self._generated += prompts
        empty = self.settings.empty_gen_batches
        advice = (
            "Are the data too easy or too hard for the model, or does the reward function always return the same? Change "
            "the data or actor_rollout_ref.rollout.n, or set algorithm.filter_groups.enable=false"
        )
        if empty is not None and found == 0 and batches >= empty:
            raise GuardError(
                f"step {step}: {batches:.0f} batches of {self.batch_size} prompts without one group that has two different "
                f"rewards (mxfp4.guards.empty_gen_batches={empty}), so dynamic sampling would go on for ever. {advice}"
            )
        if 0 < self.max_gen_batches <= batches:
            raise GuardError(
                f"step {step}: {batches:.0f} batches of {self.batch_size} prompts gave {found} of the {self.batch_size} wanted "
                "groups with two different rewards (algorithm.filter_groups.max_num_gen_batches="
                f"{self.max_gen_batches}). {advice}"
            )

    def sampled(self, step: int, sessions: int, expected: int) -> dict[str, float]:
        """Metrics of a step for which `sessions` of `expected` samples are there.

        Raises:
            GuardError: too many failed.
        """
        failed = max(0, expected - sessions)
        limit = self.settings.failed_samples
        if failed:
            text = f"step {step}: {failed} of {expected} samples failed (generation or reward)"
            if limit is not None and failed > limit * expected:
                raise GuardError(f"{text}, more than mxfp4.guards.failed_samples={limit:g} allows")
            print(f"{ALARM_MARK}{text} and the step goes on without them", flush=True)
        return {"mxfp4_guards/failed_samples": float(failed)}

    def updated(self, step: int, metrics: dict) -> None:
        """After an update: counts those that came to nothing, since their loss or gradient is not finite.

        Raises:
            GuardError: `nonfinite_steps` in a row.
        """
        broken = {name: metrics[name] for name in WATCHED if name in metrics and not math.isfinite(metrics[name])}
        self._nonfinite = self._nonfinite + 1 if broken else 0
        metrics["mxfp4_guards/nonfinite_steps"] = float(self._nonfinite)
        if not broken:
            return
        seen = ", ".join(f"{name} {value}" for name, value in broken.items())
        limit = self.settings.nonfinite_steps
        if limit is not None and self._nonfinite >= limit:
            raise GuardError(
                f"step {step}: {seen}, for {limit} steps in a row (mxfp4.guards.nonfinite_steps={limit}). verl skips such an "
                "update, so the run no longer learns: resume from a checkpoint before that with a lower "
                "actor_rollout_ref.actor.optim.lr or clip_grad, and look at rollout_corr and the rewards of the steps before"
            )
        print(f"{ALARM_MARK}step {step}: {seen}; verl skips an update whose gradient is not finite", flush=True)

    def check_weights(self, step: int, finite: Iterable[bool]) -> None:
        """Before a checkpoint, which would otherwise take the place of one that can be resumed from.

        Raises:
            GuardError: a rank's weights are not finite.
        """
        if not all(finite):
            raise GuardError(
                f"step {step}: the weights hold NaN or infinity, so no checkpoint is written: resume from the one before with "
                "a lower actor_rollout_ref.actor.optim.lr"
            )


class StallWatch:
    """Ends the process when nothing happened for `limit` seconds; `progress` says that something did.

    Args:
        limit: seconds; None watches nothing.
        count: a number that grows while a phase goes on, such as of samples that are there; read from another thread.
        end: called when the limit is over.
    """

    def __init__(self, limit: float | None, count: Callable[[], int], end: Callable[[], None] | None = None):
        self.limit, self._count = limit, count
        self._end = end or _end_process
        self._phase, self._since, self._most = "start-up", time.monotonic(), 0
        self._stopped = threading.Event()
        if limit is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def progress(self, phase: str) -> None:
        """A phase begins."""
        self._phase, self._since, self._most = phase, time.monotonic(), 0

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit / 4)):
            try:
                count = self._count()
            except RuntimeError:  # it changed while it was counted
                continue
            if count > self._most:
                self._most, self._since = count, time.monotonic()
            elif time.monotonic() - self._since > self.limit:
                print(
                    f"{FAULT_MARK}no progress for {self.limit:g} s in {self._phase} (mxfp4.guards.stall_s): an actor hangs, a "
                    "reward function holds Python's lock, or a step is longer than that; raise stall_s then",
                    flush=True,
                )
                self._end()
                return


def count_sessions(keys: Iterable[str]) -> int:
    """Samples among the keys of verl's transfer queue, which are `{uid}_{session}_{index}`."""
    return len({key.rsplit("_", 1)[0] for key in keys})


def _end_process() -> None:
    time.sleep(3)  # Ray reads what was printed from a file
    os._exit(1)
