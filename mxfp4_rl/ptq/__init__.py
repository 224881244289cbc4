"""`mxfp4-rl ptq`: a model's weights in 4 bits without training, one scale rule beside the other.

    command      the arguments, the order of the work, the files
    rules        names of scale rules, and the recipes that they are
    weights      the weights of a model, quantised in place: errors and seconds
    outputs      error of each layer's output on a calibration text
    perplexity   of a text, over windows of fixed length
    soar_parts   what CJSO and DSS give, each by itself
    page         the table

Rules see the weights alone and the texts measure, but for `+inputs`: it weighs errors with the calibration text's inputs.
"""
