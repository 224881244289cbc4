"""`mxfp4-rl export`: a trained model as a checkpoint that others serve.

`formats` says what a format stores and what it cannot carry, `experts` what files and servers call experts, `plan` which
tensors are quantised, `importance` the file of inputs' mean squares; `write` streams the tensors into sharded files,
`verify` reads them back; `command` is the command line, whose help needs no torch.
"""

FORMAT_NAMES = ("mxfp4-pack-quantized", "nvfp4-pack-quantized", "gpt-oss", "bf16")


class ExportError(ValueError):
    """The export cannot be made as asked; the message says why and what to do instead."""
