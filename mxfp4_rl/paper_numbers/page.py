"""The page: results to markdown and figures.

Numbers in sentences are filled in from the results; the sentences around them state what the full-size run shows, and
tests/test_paper_numbers.py holds the results to them.
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from mxfp4_rl.paper_numbers import analyses, number_tables, plots
from mxfp4_rl.paper_numbers.data import COLUMNS
from mxfp4_rl.paper_numbers.macro_blocks import LAWS
from mxfp4_rl.paper_numbers.markdown import percent, table, text
from mxfp4_rl.paper_numbers.measure import Results
from mxfp4_rl.paper_numbers.rows import rows

COMMAND = "python -m mxfp4_rl.paper_numbers"
PAGE, FIGURES = "paper_numbers.md", "paper_numbers"
_QWEN = "mxfp4+floor+b16,mxfp4+oas+b16,mxfp4+oas+mbs+b16,mxfp4+oas+mbs-dynamic+b16,nvfp4"


def write(results: Results, docs: Path) -> Path:
    """Write docs/paper_numbers.md and docs/paper_numbers/*.png; returns the page's path."""
    figures = docs / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(results).items():
        figure.savefig(figures / f"{name}.png", dpi=plots.DPI)
    page = docs / PAGE
    page.write_text(render(results), encoding="utf-8")
    return page


def draw(results: Results) -> dict[str, Figure]:
    """File name without ending -> figure."""
    return {
        "macro_blocks": plots.draw_macro_blocks(results.macro_blocks),
        "gradient": plots.draw_gradient(results.gradient),
        "temperature": plots.draw_temperature(results.temperature),
        "scale_constant": plots.draw_constant(results.scale_rules),
    }


def render(results: Results) -> str:
    """The page as markdown."""
    parts = [
        "# The published numbers, recomputed",
        *_header(results),
        "## The table",
        *_main_table(results),
        "## Three claims that do not come out",
        *analyses.macro_blocks(results.macro_blocks),
        *analyses.gradient(results.gradient),
        *analyses.temperature(results.temperature, results.size),
        "## The numbers behind the table",
        *number_tables.components(results.components),
        *number_tables.constants(results.scale_rules, results.size),
        *number_tables.scale_rules(results.scale_rules),
        *number_tables.nvfp4(results.nvfp4),
        *number_tables.corrections(results.corrections, results.size),
        *number_tables.rounding(results.scale_rules, results.corrections),
        "## What a user should take from this",
        _advice(results),
    ]
    return "\n\n".join(parts) + "\n"


def _header(r: Results) -> list[str]:
    size = r.size
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        processors = os.cpu_count()
    return [
        text(
            f"""Written by `{COMMAND}` (`make paper-numbers`) on {datetime.date.today().isoformat()} in {r.seconds:.0f} s
            on {processors} processors; Python {platform.python_version()}, torch {torch.__version__}, numpy
            {np.__version__}. Change the package `mxfp4_rl/paper_numbers`, not this page."""
        ),
        text(
            f"""Every number of ours comes from this project's reference quantiser on synthetic tensors. Seeds are fixed:
            0 to {size.seeds - 1}, and 0 to {size.constant_seeds - 1} for the absolute errors, with
            {size.rows * COLUMNS:,} elements a seed ({size.few_rows * COLUMNS:,} where many recipes are compared on the
            same elements). 0.01331(2) means 0.01331 with a standard error of 0.00002 over the seeds; ratios are formed
            within a seed. "Independent simulation" is a NumPy program written from the definitions, before this code and
            apart from it; `tests/test_paper_numbers.py` holds this code to its values."""
        ),
        text(
            """relMSE is the error's energy over the tensor's. An error under power-of-two scales depends on where a
            block's maximum lies between two powers of two, so a single sigma is a special case. "Fixed sigma": all rows
            have sigma 1. "Over an octave": every row has its own sigma, log-uniform over a factor of two, which stands
            for the rows of a trained weight."""
        ),
    ]


def _main_table(r: Results) -> list[str]:
    found = rows(r)
    cells = [
        (row.number, row.quantity, f"{row.published} ({row.source})", row.ours, f"**{row.agreement}**: {row.why}")
        for row in found
    ]
    counts = {a: sum(row.agreement == a for row in found) for a in dict.fromkeys(row.agreement for row in found)}
    return [
        text(
            f"""{len(found)} rows: {", ".join(f"{count} {agreement}" for agreement, count in counts.items())}. Sources
            are arXiv numbers where there is one; 2605.20402's values are those of its authors' summary."""
        ),
        table(("#", "quantity", "published (source)", "ours", "agreement"), cells),
        "### Row 17",
        text(
            """It needs Qwen3-8B (16.4 GB in BF16), the WikiText-2 test set, one GPU with 24 GB or more, and a perplexity
            loop around `convert(model, ModelRecipe(weight=..., activation=...))` with the recipes below (hybrid is
            dynamic for weights, static for activations). This version has no command for it and no value is given here.
            What the recipes do to the model's weights, in relMSE and not in perplexity, takes no GPU:"""
        ),
        f"```bash\nmxfp4-rl decompose Qwen/Qwen3-8B --compare {_QWEN}\n```",
    ]


def _advice(r: Results) -> str:
    octave, alpha = r.scale_rules.octave, r.corrections.alpha["gaussian", "rceil"]
    static = [r.macro_blocks.closed[law]["static", 128].value for law in LAWS]
    best = [r.macro_blocks.closed[law]["OAS + dynamic", 128].value for law in LAWS]
    return text(
        f"""The decomposition and the quantiser behind it agree with the paper's, so the shares of your own model can be
        read against its table. Take `oas` scales unless you need the parts to be orthogonal: they cost nothing and have
        {percent(1 - octave["oas"].value / octave["rceil"].value)} less squared error than rceil. MBS at 128 with static
        factors closes about half of the gap that better scales could ({percent(min(static))} to {percent(max(static))}),
        so use `oas` with dynamic factors for weights ({percent(min(best))} to {percent(max(best))}), or `macro_size: 32`
        (all of it, at 4.5 bits). OF is the strongest correction by far (a quarter of the error at alpha 0.5,
        {percent(alpha[1.0].value, 1)} at alpha 1, for twice the bits), and its alpha is to be chosen by accuracy, since
        the squared error always favours 1. Neither the gradient's norm nor the sampling temperature follows the paper's
        formulas: log the gradient norm and the entropy instead of correcting for them."""
    )
