"""The published numbers about MXFP4, recomputed: `python -m mxfp4_rl.paper_numbers` writes docs/paper_numbers.md.

Everything that arXiv 2605.20402 and the papers around it report and that needs no large model is measured here on synthetic
tensors with this project's own quantiser, beside the published value. Three claims do not come out as printed (macro blocks of
128 removing the scale component, the range of the gradient's scale, the temperature formula); each has an analysis with a plot.

    data, estimate                   the distributions; a mean over seeds with its standard error
    components, scale_rules, nvfp4, corrections        measurements, a section of the page each
    macro_blocks, gradient, temperature                the three analyses
    measure                          all of them, in order
    rows                             the main table: published, ours, agreement
    page, analyses, number_tables    the page; plots: its figures; markdown: its pieces
"""
