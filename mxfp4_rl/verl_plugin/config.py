"""How the `mxfp4:` block reaches verl's training engine: an engine config with one more field, chosen by `_target_`."""

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPEngineConfig


@dataclass
class MXFP4EngineConfig(FSDPEngineConfig):
    """verl's FSDP engine config plus `mxfp4`, the block that `mxfp4_rl.settings.Settings` reads."""

    mxfp4: dict[str, Any] = field(default_factory=dict)
