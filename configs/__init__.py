"""Hydra configurations, shipped in the wheel: `mxfp4-rl train --config-name NAME`."""
