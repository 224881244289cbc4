"""The HTML report of a decomposition: one file that needs no network, with every table and figure and how to read them."""

from __future__ import annotations

import base64
from html import escape

from mxfp4_rl.analysis.results import Results
from mxfp4_rl.analysis.tables import Table, all_tables
from mxfp4_rl.monitor.report import STYLE  # the look of the run report

_NUMBERS = """
table.numbers { table-layout: auto; font-size: .88em; margin: .8em 0; }
table.numbers th, table.numbers td { width: auto; padding: .2em .7em .2em 0; overflow-wrap: normal; }
table.numbers th.number, table.numbers td.number { text-align: right; white-space: nowrap; }
table.numbers td.label { overflow-wrap: anywhere; } table.numbers tr.section td { border-top: 2px solid #bbb; }
.scroll { overflow-x: auto; }
@media print { .scroll { overflow: visible; } table.numbers { font-size: .8em; } }
"""


def page_html(results: Results, figures: dict[str, bytes] | None) -> str:
    """The page.

    Args:
        figures: file name -> PNG, drawn inline; None if the user asked for none.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(results.model)}: what {escape(results.base)} does to it</title>
<style>{STYLE}{_NUMBERS}</style>
</head>
<body>
<h1>{escape(results.model)}</h1>
<p class="lead">{escape(lead(results))}</p>
{_facts_html(results)}
{"".join(_table_html(table) for table in all_tables(results))}
{_figures_html(figures)}
{_left_out_html(results)}
</body>
</html>
"""


def lead(results: Results) -> str:
    """One or two sentences on what was measured."""
    measured, broken = len(results.measured), len(results.broken)
    text = f"{measured} Linear weights, {results.total.elements:,} elements, quantised from {dtype_name(results)}"
    if results.plan.rows is not None:
        text += f", at most {results.plan.rows} evenly spaced rows of each tensor"
    text += "."
    if broken:
        text += f" {broken} more hold NaN, infinity or nothing but zeros, and are NOT in the totals."
    if results.note:
        text += f" {results.note[0].upper()}{results.note[1:].rstrip('.')}."
    return text


def dtype_name(results: Results) -> str:
    """The dtype that was quantised, as people write it."""
    return {"bfloat16": "BF16", "float32": "FP32"}[str(results.plan.dtype).removeprefix("torch.")]


def _facts_html(results: Results) -> str:
    rows = []
    for label, key in (("Measured", "date"), ("On", "device"), ("Seconds", "seconds")):
        if key in results.facts:
            rows.append((label, str(results.facts[key])))
    if "versions" in results.facts:
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in results.facts["versions"].items())))
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>\n" for label, value in rows)
    return f"<table>\n{cells}</table>" if cells else ""


def _table_html(table: Table) -> str:
    def cells(tag: str, row: list[str]) -> str:
        kinds = ("label" if index < table.labels else "number" for index in range(len(row)))
        return "".join(f'<{tag} class="{kind}">{escape(text)}</{tag}>' for kind, text in zip(kinds, row, strict=True))

    columns = [column.replace("-\n", "").replace("\n", " ") for column in table.columns]  # two lines are for terminals
    body = "".join(
        ('<tr class="section">' if index in table.sections else "<tr>") + cells("td", row) + "</tr>\n"
        for index, row in enumerate(table.rows)
    )
    return f"""<section>
<h2>{escape(table.title)}</h2>
<div class="scroll"><table class="numbers">
<thead><tr>{cells("th", columns)}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
<p>{escape(table.reading)}</p>
</section>
"""


def _figures_html(figures: dict[str, bytes] | None) -> str:
    if figures is None:
        return '<p class="absent">No figures: the command was run with --no-figures.</p>'
    from mxfp4_rl.analysis.figures import FIGURES

    parts = []
    for section in FIGURES:
        if section.file in figures:
            image = base64.b64encode(figures[section.file]).decode("ascii")
            content = (
                f'<img alt="{escape(section.title)}" src="data:image/png;base64,{image}">\n<p>{escape(section.reading)}</p>'
            )
        else:
            content = '<p class="absent">Not drawn: no weight that could be measured has an error to show.</p>'
        parts.append(f"<section>\n<h2>{escape(section.title)}</h2>\n{content}\n</section>\n")
    return "".join(parts)


def _left_out_html(results: Results) -> str:
    if not results.left_out:
        return ""
    reasons = "; ".join(f"{count} {reason}" for reason, count in results.reasons().items())
    return f'<p class="note">Tensors of the checkpoint that are not measured: {escape(reasons)}.</p>'
