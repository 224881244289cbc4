"""What makes a rollout repeat to the bit: every request knows its row, and a server gets a step's requests as one wave.

Requests arrive in an order that the clock decides. A BF16 product rounds by the number of rows beside one's own, and GRPO's
sums round by their order, so three things are taken from the clock: which requests make a batch (a server waits for the
whole wave and sorts it), which seed a sample gets (by its row in the step, not by who came first), and the order of a step's
samples (by row and sample). None of them costs anything: a wave arrives within a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import torch
from verl.workers.rollout.llm_server import LLMServerClient

ROW = "priority"  # verl's name for the number that it hands from a batch's row down to the request
SAMPLE = "mxfp4_sample"  # in a sample's extra fields: which one of its row it is
_QUIET = 0.05  # seconds without a new request after which a batch starts
_LONGEST_WAIT = 0.5  # seconds a request waits for company at most
_LOST = 5.0  # seconds without a new request after which the rest of a wave counts as lost


class RowClient(LLMServerClient):
    """Tells the server of every request which row it samples; verl's own client keeps that for vLLM."""

    async def generate(self, request_id, *, priority: int = 0, **kwargs):
        return await super().generate(request_id, row=int(priority), **kwargs)


class NumberedRows:
    """verl's agent loop manager, with rows numbered and waves announced.

    Args:
        manager: verl's.
        announce: called with the number of requests before they are sent.
        samples, validation_samples: of a prompt.
    """

    def __init__(self, manager, announce: Callable[[int], Any], samples: int, validation_samples: int):
        self._manager, self._announce = manager, announce
        self._samples, self._validation_samples = samples, validation_samples
        self._step, self._sent = None, 0

    def generate_sequences(self, batch) -> None:
        """As verl's. Rows count from 1 in each step; those of a validation are negative."""
        step = batch["global_steps"]
        validates = batch["validate"] if "validate" in batch else False  # noqa: SIM401  (get gives a wrapper around it)
        samples = self._validation_samples if validates else self._samples
        if validates:
            batch[ROW] = -torch.arange(1, len(batch) + 1)
        else:
            if step != self._step:
                self._step, self._sent = step, 0
            batch[ROW] = torch.arange(1, len(batch) + 1) + self._sent
            self._sent += len(batch)
        if "__rollout_n__" in batch:
            self._announce(sum(int(n) for n in batch["__rollout_n__"]))
        else:
            self._announce(len(batch) * samples)
        self._manager.generate_sequences(batch)

    def __getattr__(self, name: str):
        return getattr(self._manager, name)


class Waiting:
    """The requests that wait in a server, and when a batch of them is due.

    Args:
        largest: requests in a batch at most.
    """

    def __init__(self, largest: int):
        self._largest = largest
        self._requests: list = []
        self._arrived = asyncio.Event()
        self._expected = 0

    def expect(self, count: int) -> None:
        """A wave of `count` requests is on its way."""
        self._expected = count

    def add(self, request) -> None:
        self._requests.append(request)
        self._arrived.set()

    async def next_batch(self) -> list:
        """Requests with the same sampling, in an order that arrival does not decide where the wave was announced."""
        await self._arrived.wait()
        await self._until_together()
        same = [r for r in self._requests if r.sampling == self._requests[0].sampling]
        batch = same[: self._largest]
        self._requests = [r for r in self._requests if r not in batch]
        if not self._requests:
            self._arrived.clear()
        return batch

    def take_all(self) -> list:
        """Every request that waits, whatever its sampling; none waits any more."""
        taken, self._requests = self._requests, []
        self._arrived.clear()
        return taken

    async def _until_together(self) -> None:
        if self._expected:
            await self._until(lambda: len(self._requests) >= self._expected, _LOST, limit=None)
            self._expected = 0
        else:
            await self._until(lambda: len(self._requests) >= self._largest, _QUIET, _LONGEST_WAIT)
        # Requests that are equal in this are each other's equals: the seeds make them the first, the second, ... sample.
        self._requests.sort(key=lambda r: (r.prompt, r.row))

    async def _until(self, enough: Callable[[], bool], quiet: float, limit: float | None) -> None:
        """Wait for enough requests, or until none has come for `quiet` seconds, at most `limit` seconds."""
        began = last = time.monotonic()
        seen = len(self._requests)
        while not enough():
            await asyncio.sleep(min(quiet, 0.01))
            now = time.monotonic()
            if len(self._requests) != seen:
                seen, last = len(self._requests), now
            if now - last >= quiet or (limit is not None and now - began >= limit):
                return
