"""How long a call takes on a GPU, and what machine it was.

Times are medians of CUDA-graph replays, so that launches cost nothing, unless it says "launched": then as PyTorch issues the
kernels. Every call takes the next of several inputs, weights among them, that are together larger than the L2 cache.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Sequence

import torch
import triton

CACHE_BYTES = 120e6  # more than twice an H100's L2 cache
MOST_COPIES = 64  # 2048 x 2048 in MXFP4 codes needs 54
MOST_BYTES = 8e9
WARM_ONLY = False  # call everything once, to compile it, and time nothing


def about() -> dict[str, str]:
    """Date, device and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, no GPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def copies(size: float, held: float = 0) -> int:
    """How many inputs pass the cache, three at least; one where nothing is timed.

    Args:
        size: bytes that the fastest variant reads of an input.
        held: bytes that an input occupies, if that is much more; `MOST_BYTES` in all, as far as three inputs allow.
    """
    if WARM_ONLY or not torch.cuda.is_available():
        return 1
    return max(3, min(int(CACHE_BYTES / size) + 1, MOST_COPIES, int(MOST_BYTES / max(size, held))))


def random(*shape: int, copies: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Normal tensors."""
    return [torch.randn(*shape, device=device(), dtype=dtype) for _ in range(copies)]


def median_ms(work: Callable, inputs: Sequence[tuple], calls: int = 6, replays: int = 11) -> float:
    """Milliseconds of one `work(*input)`, the inputs taken in turn; without a GPU of a single call, to try the code."""
    if WARM_ONLY or not torch.cuda.is_available():
        return launched_ms(work, inputs)
    calls = _whole_turns(calls, inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in inputs:
            work(*x)
    torch.cuda.synchronize()
    graph, turn = torch.cuda.CUDAGraph(), itertools.cycle(inputs)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work(*next(turn))
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[replays // 2]


def launched_ms(work: Callable, inputs: Sequence[tuple], calls: int = 20) -> float:
    """Milliseconds of one `work(*input)` as Python launches it, kernels and host in whatever overlap they reach."""
    if WARM_ONLY or not torch.cuda.is_available():
        began = time.perf_counter()
        work(*inputs[0])
        return (time.perf_counter() - began) * 1e3
    calls, turn = _whole_turns(calls, inputs), itertools.cycle(inputs)
    for _ in range(len(inputs)):
        work(*next(turn))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work(*next(turn))
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3 / calls


def _whole_turns(calls: int, inputs: Sequence) -> int:
    """`calls` or more, every input equally often."""
    return len(inputs) * -(-calls // len(inputs))
