"""All measurements, in the order of the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mxfp4_rl.paper_numbers import components, corrections, gradient, macro_blocks, nvfp4, scale_rules, temperature
from mxfp4_rl.paper_numbers.data import Size


@dataclass
class Results:
    """The measurements, a section each, and how they were made: sizes, seconds."""

    components: components.Components
    scale_rules: scale_rules.ScaleRules
    nvfp4: nvfp4.NVFP4Numbers
    corrections: corrections.Corrections
    macro_blocks: macro_blocks.MacroBlocks
    gradient: gradient.Gradient
    temperature: temperature.Temperature
    size: Size
    seconds: float = 0.0


SECTIONS = (components, scale_rules, nvfp4, corrections, macro_blocks, gradient, temperature)


def measure_all(size: Size, say: Callable[[str], None] = lambda line: None) -> Results:
    """Run every section; `say` gets a line when one is done."""
    start = last = time.perf_counter()
    found = {}
    for section in SECTIONS:
        name = section.__name__.rpartition(".")[2]
        found[name] = section.measure(size)
        now = time.perf_counter()
        say(f"{name.replace('_', ' ')}: {now - last:.1f} s")
        last = now
    return Results(**found, size=size, seconds=last - start)
