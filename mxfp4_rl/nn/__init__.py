"""Quantised layers, and the conversion of whole models."""

from mxfp4_rl.nn.convert import (
    ConversionReport,
    convert,
    convert_for_rollout,
    converted_layers,
    matches,
    plan,
    release_operands,
    unconvert,
)
from mxfp4_rl.nn.linear import MXFP4Linear
from mxfp4_rl.nn.packed import PackedLinear

__all__ = [
    "ConversionReport",
    "MXFP4Linear",
    "PackedLinear",
    "convert",
    "convert_for_rollout",
    "converted_layers",
    "matches",
    "plan",
    "release_operands",
    "unconvert",
]
