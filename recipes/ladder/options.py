"""What the ladder's runner, its runs and its report share: the options of a run, and how files are written. No torch in here.

A run's folder holds config.json (what it is), metrics.jsonl (every step), sessions.json (its processes and their time), and at
the end done.json (the final scores) or, while there is more to do, state.pt.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mxfp4_rl.recipe import check_keys
from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME

MORE_TO_DO = 3  # exit code of a run, or of the runner, that was told to stop and can go on


@dataclass(frozen=True)
class Options:
    """What all rungs of a ladder share.

    Args:
        model: the embedded model's name, or a checkpoint's folder.
        upcycle: make a mixture of experts out of `model` first, with these options of `recipes/upcycle`; None leaves it dense.
        task: {"name", options} of `mxfp4_rl.tasks`, or {"train", "val", "reward"}: two parquet files and "module:function".
        prompts, samples: of a step; a prompt's samples are a group. mini_batches: optimiser steps that share a rollout.
        norm_std: divide advantages by the group's standard deviation (GRPO); false is Dr.GRPO's.
        is_cap: cap of the importance weights between trainer and rollout.
        micro_batch: sequences of one forward and backward. rollout_batch: sequences that are sampled together.
        validate_every, measure_every, checkpoint_every: in steps, 0 for never. measure_rows: see `monitor.components`.
        validation: how many held-out problems; None for all.
        warmup_steps: supervised steps on the training answers in BF16, shared by all rungs; warmup_lr, warmup_batch: of them.
    """

    model: str = EMBEDDED_MODEL_NAME
    upcycle: dict | None = None
    task: dict = field(default_factory=lambda: {"name": "arithmetic"})
    steps: int = 100
    prompts: int = 32
    samples: int = 16
    response_tokens: int = 12
    mini_batches: int = 1
    micro_batch: int = 128
    rollout_batch: int = 512
    lr: float = 2e-5
    weight_decay: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.28
    norm_std: bool = True
    is_cap: float = 2.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    validate_every: int = 20
    validation: int | None = None
    measure_every: int = 10
    measure_rows: int = 64
    checkpoint_every: int = 20
    warmup_steps: int = 0
    warmup_lr: float = 2e-5
    warmup_batch: int = 64

    @classmethod
    def from_dict(cls, values: dict) -> Options:
        check_keys(values, {f.name for f in dataclasses.fields(cls)}, "options")
        options = cls(**values)
        if options.prompts % options.mini_batches:
            raise ValueError(f"prompts={options.prompts} is not a multiple of mini_batches={options.mini_batches}")
        if options.samples < 2:
            raise ValueError(f"samples={options.samples}: a group needs two or more")
        return options


def free_reply(options: Options) -> int:
    """How many tokens an untrained model may say, which has not learnt yet to give the bare number."""
    return max(48, options.response_tokens)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for half a line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def keep_steps(log: Path, last: int) -> None:
    """Drop the lines of steps after `last`, which will be done again."""
    if log.is_file():
        kept = [line for line in log.read_text().splitlines() if step_of(line) <= last]
        write_atomically(log, "".join(f"{line}\n" for line in kept))


def record_session(file: Path, session: dict) -> None:
    """Write a process's record, over its own older one: a process is known by when it began."""
    sessions = json.loads(file.read_text()) if file.is_file() else {}
    sessions[f"{session['began']:.3f}"] = session
    write_atomically(file, json.dumps(sessions, indent=1))


def write_atomically(path: Path, content: str | Callable[[Path], None]) -> None:
    """Whole or not at all, whenever the process is cut off. `content` is the text, or writes a file itself."""
    part = path.with_name(f".{path.name}.part")
    if isinstance(content, str):
        part.write_text(content)
    else:
        content(part)
    os.replace(part, path)
