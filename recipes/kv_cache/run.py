"""What a 4-bit KV cache costs: perplexity of a text read through it, by recipe: `python recipes/kv_cache/run.py --help`.

The text is fed in parts that end where blocks do (the sinks, then block after block), so every token is predicted from what a
decoder would have at that point: complete blocks quantised, sinks and its own block as they came. Windows of the text are
sequences of one batch. The default model is the embedded one, the default text Python's own manual as the standard library
ships it (`pydoc_data.topics`, topics in alphabetical order), which differs between Python versions: its hash is in the results.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mxfp4_rl.kv_cache import ATTENTION, KVCacheRecipe, QuantizedCache
from mxfp4_rl.kv_cache.recipe import head_channels

RULES = {"static": "static", "search": "search", "4/6": "four_over_six", "rceil": "rceil"}
VARIANTS = [  # format, rule, sinks, transform, tokens a block
    ("nvfp4", "static", 0, None, 64),
    ("nvfp4", "static", 4, None, 64),
    ("nvfp4", "static", 4, "hadamard", 64),
    ("nvfp4", "search", 0, None, 64),
    ("nvfp4", "search", 4, None, 64),
    ("nvfp4", "search", 0, "hadamard", 64),
    ("nvfp4", "search", 4, "hadamard", 64),
    ("nvfp4", "4/6", 4, "hadamard", 64),
    ("nvfp4", "static", 0, None, 16),
    ("nvfp4", "search", 4, "hadamard", 16),
    ("mxfp4", "rceil", 0, None, 64),
    ("mxfp4", "search", 4, None, 64),
    ("mxfp4", "search", 4, "hadamard", 64),
]


def text_of(path: Path | None) -> tuple[str, str]:
    """The text and what to call it."""
    if path is not None:
        return path.read_text(encoding="utf-8"), path.name
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)), f"pydoc_data.topics of Python {platform.python_version()}"


@torch.no_grad()
def losses(model, ids: torch.Tensor, first: int, block: int, cache) -> torch.Tensor:
    """Minus the log-probability of every token but the first of each window, float32 (R, L - 1)."""
    cuts = [0, *range(first, ids.shape[1], block), ids.shape[1]]
    out = []
    for a, b in itertools.pairwise(cuts):
        logits = model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits
        logp = logits[:, : ids.shape[1] - 1 - a].float().log_softmax(-1)
        out.append(-logp.gather(-1, ids[:, a + 1 : a + 1 + logp.shape[1], None]).squeeze(-1))
    return torch.cat(out, 1)


def measure(model, ids: torch.Tensor, variant: tuple | None, base: torch.Tensor | None) -> tuple[dict, torch.Tensor]:
    """One row of the table, and its losses. `variant` None is the BF16 cache; `base` are that one's losses."""
    began = time.perf_counter()
    if variant is None:
        cache, first, block = DynamicCache(config=model.config), 4, 64
        row = {"cache": "bf16"}
    else:
        format, rule, sink, transform, block = variant
        recipe = KVCacheRecipe(format, RULES[rule], block, sink, transform)
        cache, first = QuantizedCache(model.config, recipe), sink or block
        row = {"cache": f"{format} {rule}", "sinks": sink, "transform": transform, "block": block}
    loss = losses(model, ids, first, block, cache)
    row |= {"loss": loss.mean().item(), "perplexity": math.exp(loss.mean()), "seconds": round(time.perf_counter() - began, 1)}
    if base is not None:
        memory = cache.memory()
        more = (loss - base).flatten()
        row |= {
            "loss_over_bf16": more.mean().item(),
            "standard_error": (more.std() / more.numel() ** 0.5).item(),
            "mean_abs_difference": more.abs().mean().item(),
            "bits_per_value": memory.bits_per_value,
            "bytes": memory.total,
            "of_bf16": memory.total / memory.bf16,
        }
    return row, loss


def totals(config, dtype: torch.dtype) -> list[dict]:
    """Bytes of the default cache over BF16's, one sequence of each length in one layer of such a model."""
    heads, width = config.num_key_value_heads, head_channels(config)
    rows = []
    for length in (128, 512, 1024, 4096, 16384):
        for block in (16, 64):
            cache = QuantizedCache(config, KVCacheRecipe(block=block))
            cache.update(*(torch.randn(1, heads, length, width).to(dtype) for _ in range(2)), 0)
            memory = cache.memory()
            parts = {"packed": memory.packed, "sinks": memory.sinks, "open": memory.open}
            rows.append({"tokens": length, "block": block, "of_bf16": memory.total / memory.bf16, **parts})
    return rows


def won_back(rows: list[dict]) -> None:
    """Add to every row the share that it does not lose of what static NVFP4 without sinks, in blocks as long, loses."""
    bf16 = rows[0]["perplexity"]
    plain = {"cache": "nvfp4 static", "sinks": 0, "transform": None}
    static = {row["block"]: row["perplexity"] for row in rows[1:] if plain.items() <= row.items()}
    for row in rows[1:]:
        row["won_back"] = (static[row["block"]] - row["perplexity"]) / (static[row["block"]] - bf16)


def table(rows: list[dict]) -> str:
    """The rows in markdown."""
    lines = [
        "| cache | sinks | transform | block | perplexity | loss over BF16 (s.e.) | won back | bits a value | of its bytes |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| BF16 | | | | {rows[0]['perplexity']:.3f} | | | 16 | 1 |",
    ]
    for r in rows[1:]:
        lines.append(
            f"| {r['cache']} | {r['sinks']} | {r['transform'] or 'none'} | {r['block']} | {r['perplexity']:.3f} | "
            f"{r['loss_over_bf16']:.4f} ({r['standard_error']:.4f}) | {r['won_back']:.0%} | {r['bits_per_value']:.3f} | "
            f"{r['of_bf16']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def totals_table(rows: list[dict]) -> str:
    """`totals` in markdown."""
    by = {(r["tokens"], r["block"]): r for r in rows}
    blocks = sorted({r["block"] for r in rows})
    lines = [
        "| tokens | " + " | ".join(f"blocks of {b}" for b in blocks) + " |",
        "|---|" + "---|" * len(blocks),
        *(
            f"| {n} | " + " | ".join(f"{by[n, b]['of_bf16']:.3f}" for b in blocks) + " |"
            for n in sorted({r["tokens"] for r in rows})
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; the embedded SmolLM2-135M-Instruct if not given")
    parser.add_argument("--text", type=Path, help="a text file in UTF-8; Python's manual if not given")
    parser.add_argument("--windows", type=int, default=8, help="sequences of the batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--start", type=int, default=0, help="tokens of the text to leave out before them")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a folder for results.json and table.md")
    arguments = parser.parse_args()

    folder = arguments.model
    if folder is None:
        from mxfp4_rl.tasks.embedded_model import ensure_embedded_model

        folder = ensure_embedded_model()
    text, name = text_of(arguments.text)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    wanted = arguments.windows * arguments.length
    ids = ids[arguments.start : arguments.start + wanted]
    if ids.numel() < wanted:
        raise SystemExit(f"{name} has {ids.numel()} tokens from {arguments.start} on, of {wanted}: give fewer --windows")
    ids = ids.view(arguments.windows, arguments.length).to(arguments.device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).to(arguments.device).eval()
    model.set_attn_implementation(ATTENTION)

    row, base = measure(model, ids, None, None)
    rows = [row]
    print(row, flush=True)
    for variant in VARIANTS:
        rows.append(measure(model, ids, variant, base)[0])
        print(rows[-1], flush=True)
    won_back(rows)
    sizes = totals(model.config, model.dtype)
    tables = table(rows) + "\n" + totals_table(sizes)
    print(tables)
    if arguments.out:
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": folder.name,
            "dtype": arguments.dtype,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "text": name,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "windows": arguments.windows,
            "length": arguments.length,
            "start": arguments.start,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": rows,
            "totals": sizes,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "table.md").write_text(tables)


if __name__ == "__main__":
    main()
