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
from mxfp4_rl.nn.experts import ExpertsProjection, MXFP4Experts, PackedProjection
from mxfp4_rl.nn.linear import MXFP4Linear
from mxfp4_rl.nn.packed import PackedLinear

__all__ = [
    "ConversionReport",
    "ExpertsProjection",
    "MXFP4Experts",
    "MXFP4Linear",
    "PackedLinear",
    "PackedProjection",
    "convert",
    "convert_for_rollout",
    "converted_layers",
    "matches",
    "plan",
    "release_operands",
    "unconvert",
]
