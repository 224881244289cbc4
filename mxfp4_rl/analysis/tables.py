"""The tables of a decomposition: built once as text, shown on a terminal and in the HTML report.

Each comes with two sentences on how to read it. Cells are plain ASCII, so that they survive any terminal, pipe and log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mxfp4_rl.analysis.measure import Errors, TensorErrors
from mxfp4_rl.analysis.results import Results, change, metric, partition, rel_mse, share

WHOLE_MODEL = "whole model"
_ABSENT = "n/a"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: headings, perhaps of two lines; the first `labels` columns are text, the others numbers.
        rows: cells, of as many columns each.
        sections: rows before which a line is drawn.
        reading: how to read it, two sentences.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    reading: str
    labels: int = 1
    sections: set[int] = field(default_factory=set)


def all_tables(results: Results) -> list[Table]:
    """The tables that these results fill, in the order in which one reads them."""
    tables = []
    if results.measured:
        tables += [recipes_table(results), types_table(results)]
        if len(results.recipes) > 1:
            tables.append(changes_table(results))
        if results.compared or partition(results.total, results.base, "clipping") > 0:
            tables.append(partition_table(results))
        if results.worst():
            tables.append(worst_table(results))
    if results.broken:
        tables.append(broken_table(results))
    return tables


def recipes_table(results: Results) -> Table:
    """What each recipe costs and what it leaves, over the whole model."""
    rows = []
    for name, recipe in results.recipes.items():
        error = rel_mse(results.total, name)
        decibel = f"{-10 * math.log10(error):.2f}" if error > 0 else _ABSENT
        against = "" if name == results.base else _percent(change(results.total, name, results.base, "rel_mse"))
        rows.append([name, recipe.describe(), f"{recipe.bits_per_element:.5g}", _number(error), against, decibel])
    return Table(
        "Recipes",
        ["recipe", "what it does", "bits/element", "rel MSE", f"vs {results.base}", "SNR dB"],
        rows,
        "Relative MSE is the energy of what is lost over the energy of the weights, pooled over all that were measured; "
        "SNR is the same in decibels. Bits per element count scales, macro-block factors and second passes: a recipe that "
        "spends more should lose less.",
        labels=2,
    )


def types_table(results: Results) -> Table:
    """The base recipe's error by layer type, and over the whole model."""
    groups = {**results.by_type, WHOLE_MODEL: results.total}
    rows = [
        [kind, str(errors.tensors), _count(errors.elements), *_parts(errors, results.base)] for kind, errors in groups.items()
    ]
    return Table(
        f"What {results.base} does, by layer type",
        ["layer type", "tensors", "elements", *_PART_COLUMNS],
        rows,
        "S, D and G are the energies of scale bias, deadzone and grid noise over the energy of the first pass's error; their "
        "sum exceeds 1 because scale bias and grid noise cancel in part, which cos(S,G) measures. Deadzone is the fraction of "
        "elements too small for a scale that fits the block exactly, zeros the fraction that really becomes 0, mean delta how "
        "many octaves scales lie above that fit.",
        sections={len(rows) - 1},
    )


def changes_table(results: Results) -> Table:
    """What each further recipe changes in each of the base recipe's numbers."""
    base = results.base
    rows, sections = [], set()
    for kind, errors in {**results.by_type, WHOLE_MODEL: results.total}.items():
        sections.add(len(rows))
        for name in results.recipes:
            if name == base:
                continue
            first_pass = [_percent(change(errors, name, base, part)) for part in ("scale_bias", "deadzone", "grid_noise")]
            first_pass += [_signed(metric(errors, name, "cos_scale_grid"))]
            first_pass += [_fraction(metric(errors, name, "deadzone_fraction")), _signed(metric(errors, name, "delta_mean"))]
            final = [_percent(change(errors, name, base, "final_deadzone"))]
            final += [_fraction(metric(errors, name, "final_zero_fraction")), _percent(change(errors, name, base, "rel_mse"))]
            rows.append([kind if len(rows) in sections else "", name, *first_pass, *final])
    reading = (
        f"Percentages are changes of energies against {base}; the columns up to mean delta describe the first pass, which "
        "macro blocks (MBS) and scale rules correct, the last three the final result: its error on the deadzone's elements, "
        "its zeros, its whole error. An outlier fallback (OF) leaves the first pass as it is and then takes the same part, "
        "alpha, off each of its errors."
    )
    if not results.compared:
        reading += " AQN has no row: it is noise for exploration, and corrects no part of this error."
    columns = ["layer type", "recipe", "scale\nbias", "dead-\nzone", "grid\nnoise", "cos\n(S,G)", "dead\nfraction"]
    columns += ["mean\ndelta", "lost in\ndeadzone", "zeros\nleft", "rel\nMSE"]
    title = "What the other recipes change" if results.compared else "What each correction changes"
    return Table(title, columns, rows, reading, labels=2, sections=sections - {0})


def partition_table(results: Results) -> Table:
    """The rule-agnostic split of each recipe's first pass."""
    parts = ("deadzone", "clipping", "grid_noise")
    rows = [[name, *(_share(partition(results.total, name, part)) for part in parts)] for name in results.recipes]
    return Table(
        "What became of the elements",
        ["recipe", "became 0", "clipped", "rounded"],
        rows,
        "Every element became 0, was clipped at the largest magnitude, or was rounded to a neighbour, with the scale that was "
        "really used, so that the three shares sum to 1 for any scale rule and format. Compare recipes by it where scales may "
        "clip: S, D and G assume that they never do.",
    )


def worst_table(results: Results) -> Table:
    """The layers with the largest relative MSE."""
    others = [name for name in results.recipes if name != results.base]
    best = min(others, key=lambda name: _or_infinity(rel_mse(results.total, name)), default=None)
    rows = []
    for tensor in results.worst():
        row = [tensor.weight.name, _shape(tensor), *_parts(tensor.errors, results.base, short=True)]
        rows.append(row + ([_number(rel_mse(tensor.errors, best))] if best else []))
    columns = ["layer", "shape", "S", "D", "G", "zeros", "rel MSE"] + ([f"{best}"] if best else [])
    after = f" The last column is what {best}, the best of the others, leaves of it." if best else ""
    return Table(
        f"The {len(rows)} layers that {results.base} hurts most"
        if len(rows) > 1
        else f"The layer that {results.base} hurts most",
        columns,
        rows,
        "The weights with the largest relative MSE, worst first. A layer far above the whole model's value is the place for a "
        f"stronger recipe or an exemption (recipe overrides and exclude); one close to it needs neither.{after}",
        labels=2,
    )


def broken_table(results: Results) -> Table:
    """Weights with NaN or infinite elements, or with nothing but zeros."""
    rows = [
        [t.weight.name, _shape(t), f"{t.nan:,}", f"{t.inf:,}", "yes" if t.all_zero else "", "NOT in the totals"]
        for t in results.broken
    ]
    return Table(
        "Weights that cannot be measured",
        ["layer", "shape", "NaN", "Inf", "all zero", "measured"],
        rows,
        "NaN and infinity cannot be quantised, and zeros have no error: these are NOT in the totals above. Find out where the "
        "checkpoint broke before you train from it.",
        labels=2,
    )


def print_tables(results: Results, console) -> None:
    """Print the tables to a rich console."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in all_tables(results):
        shown = RichTable(
            title=Text(table.title),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for index, column in enumerate(table.columns):
            text = index < table.labels
            justify = "left" if text else "right"
            shown.add_column(Text(column), justify=justify, vertical="bottom", no_wrap=not text, overflow="fold")
        for index, row in enumerate(table.rows):
            if index in table.sections:
                shown.add_section()
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)


_PART_COLUMNS = ["S", "D", "G", "cos(S,G)", "deadzone", "zeros", "mean delta", "rel MSE"]


def _parts(errors: Errors, recipe: str, short: bool = False) -> list[str]:
    shares = [_share(share(errors, recipe, part)) for part in ("scale_bias", "deadzone", "grid_noise")]
    zeros, error = _fraction(metric(errors, recipe, "zero_fraction")), _number(rel_mse(errors, recipe))
    if short:
        return [*shares, zeros, error]
    cosine, delta = (_signed(metric(errors, recipe, name)) for name in ("cos_scale_grid", "delta_mean"))
    return [*shares, cosine, _fraction(metric(errors, recipe, "deadzone_fraction")), zeros, delta, error]


def _shape(tensor: TensorErrors) -> str:
    return "x".join(str(size) for size in tensor.weight.info.shape)


def _number(value: float) -> str:
    return f"{value:#.4g}" if math.isfinite(value) else _ABSENT


def _share(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else _ABSENT


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else _ABSENT


def _fraction(value: float) -> str:
    return f"{100 * value:.2f}%" if math.isfinite(value) else _ABSENT


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}%" if math.isfinite(value) else _ABSENT


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _count(elements: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if elements >= size:
            return f"{elements / size:.1f} {unit}"
    return str(elements)
