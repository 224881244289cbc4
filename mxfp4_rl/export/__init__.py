"""`mxfp4-rl export`: a trained model as a checkpoint that others serve.

`formats` says what a format stores and what it cannot carry, `write` streams the tensors into sharded files, `verify` reads
them back, `command` is the command line.
"""
