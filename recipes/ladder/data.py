"""Prompts, rewards and tensors of a ladder run.

A task is two parquet files in verl's schema and a reward function: one of `mxfp4_rl.tasks`, or the user's. The rows of a step
are a function of (seed, step), so a run that goes on needs no memory of what it has seen.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pyarrow.parquet
import torch

from mxfp4_rl.tasks.data import resolve_task
from recipes.ladder.options import Options


class Data:
    """The training and validation rows, each with its prompt's token ids under "ids"."""

    def __init__(self, options: Options, tokenizer, work: Path):
        task, self.name = dict(options.task), options.task.get("name")
        if "name" in task:
            train, val, module, function = resolve_task(task.pop("name"), work / "tasks", **task)
        else:
            train, val, (module, function) = task["train"], task["val"], task["reward"].split(":")
        self.reward = getattr(importlib.import_module(module), function)
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.train, self.val = (pyarrow.parquet.read_table(p).to_pylist() for p in (train, val))
        self.val = self.val[: options.validation]
        self.name = self.name or self.val[0]["data_source"]  # the task's, of which sources may be parts
        for row in self.train + self.val:
            text = tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, tokenize=False)
            row["ids"] = self.ids_of(text)

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def step_rows(self, step: int, count: int, seed: int) -> list[dict]:
        """The training rows of a step: each epoch has an order of its own, and a step may cross into the next."""
        orders, rows, size = {}, [], len(self.train)
        for i in range((step - 1) * count, step * count):
            epoch = i // size
            if epoch not in orders:
                generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
                orders[epoch] = torch.randperm(size, generator=generator).tolist()
            rows.append(self.train[orders[epoch][i % size]])
        return rows

    def score(self, row: dict, tokens: list[int]) -> float:
        """The reward of a response."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        truth = row["reward_model"]["ground_truth"]
        score = self.reward(row["data_source"], text, truth, extra_info=row.get("extra_info"))
        return float(score["score"] if isinstance(score, dict) else score)

    def tensors(self, prompts: list[list[int]], responses: list[list[int]], device) -> dict[str, torch.Tensor]:
        """Sequences padded on the right: a query of padding then still sees keys, without which attention's gradient is NaN.

        Returns:
            "ids", "seen" (the attention mask) and "response" (bool), over prompt and response; "mask", of the response's tokens
            alone, in columns from its first one.
        """
        width = max(len(p) + len(r) for p, r in zip(prompts, responses))
        ids = torch.full((len(prompts), width), self.pad_id)
        seen, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        mask = torch.zeros(len(prompts), max(map(len, responses)))
        for i, (p, r) in enumerate(zip(prompts, responses)):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            seen[i, : len(p) + len(r)] = 1
            response[i, len(p) : len(p) + len(r)] = True
            mask[i, : len(r)] = 1
        batch = {"ids": ids, "seen": seen, "response": response, "mask": mask}
        return {k: v.to(device) for k, v in batch.items()}
