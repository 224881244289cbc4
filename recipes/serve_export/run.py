"""Does vLLM serve what `mxfp4-rl export` writes as the model it stands for? `python recipes/serve_export/run.py --help`.

Each case is a model, a recipe and a packed format. It is exported packed, verified bit for bit, and dequantised to BF16. vLLM
loads each in a process of its own, all side by side, and answers the same prompts greedily; transformers answers from the BF16
export in this process meanwhile. Compared are

    operands    what vLLM's layer multiplies by, which is its product with the identity, against the BF16 export: to the bit;
                Linear layers only. Experts have no such product: that they were not compared is said, and no success is claimed
    vllm        the packed export against the BF16 export, both in vLLM
    floor       the BF16 export in vLLM against transformers: what other kernels alone do to the same weights
    transf.     the packed export in vLLM against the BF16 export in transformers

A case that fails is printed with its traceback, the others go on. `--export-only` stops before vLLM and needs no GPU.
Exit code: 0 if every case was served with the very operands; else 1, so always with gpt-oss, whose experts are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ask, tell
from compare import compare, row_text


@dataclass(frozen=True)
class Case:
    """A model of `_make`, a recipe in words, a packed format."""

    model: str
    recipe: str
    format: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.recipe}"

    def folder(self, root: Path, format: str) -> Path:
        return root / f"{self.name.replace(' ', '-')}-{format}"


CASES = (
    Case("smollm2-1152", "mxfp4", "mxfp4-pack-quantized"),
    Case("smollm2-1152", "nvfp4+four-over-six", "nvfp4-pack-quantized"),
    Case("gpt-oss", "mxfp4", "gpt-oss"),
    Case("smollm2", "mxfp4", "mxfp4-pack-quantized"),  # vLLM's Marlin has no tiling for it: what does it say?
    Case("smollm2-1152", "nvfp4+soar", "nvfp4-pack-quantized"),  # g is no power of two; not a default, it takes a minute more
)
TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time there was a small dragon who",
    "The three primary colours are",
    "In 1969, the first humans",
    "A list of fruits: apple, banana,",
    "The quick brown fox",
)
_START = time.perf_counter()


def log(words: str) -> None:
    print(f"{time.perf_counter() - _START:6.1f} s  {words}", flush=True)


def _make(name: str, root: Path) -> Path:
    from models import random_gpt_oss, widen

    from mxfp4_rl.tasks.embedded_model import ensure_embedded_model

    smollm2 = ensure_embedded_model()
    out = root / f"source-{name}"
    if name == "smollm2":
        return smollm2
    if out.exists():
        return out
    return widen(smollm2, out, 1152) if name == "smollm2-1152" else random_gpt_oss(smollm2, out)


def export(case: Case, root: Path) -> None:
    """Packed, verified bit for bit; and the same values as BF16. In this process."""
    from mxfp4_rl.cli import main as command

    source, out = _make(case.model, root), case.folder(root, case.format)  # made by the parent before
    if command(["export", str(source), str(out), "--format", case.format, "--recipe", case.recipe, "--verify"]) != 0:
        raise RuntimeError(f"the export {out.name} failed")
    _dequantised(case, source, case.folder(root, "bf16"))


def _dequantised(case: Case, source: Path, out: Path) -> None:
    """What the packed export stands for.

    `--format bf16` would give the values of training, which differ in NVFP4: there every weight has its own g, while layers
    that are served as one product share theirs.
    """
    import torch

    from mxfp4_rl.analysis.checkpoint import open_checkpoint
    from mxfp4_rl.export.formats import FORMATS
    from mxfp4_rl.export.plan import Plan
    from mxfp4_rl.export.write import write_export
    from mxfp4_rl.recipe import ModelRecipe, QuantRecipe

    recipe = ModelRecipe(weight=QuantRecipe.parse(case.recipe), activation=None)
    format = replace(FORMATS["bf16"], shares_scale=FORMATS[case.format].shares_scale)
    with open_checkpoint(str(source)) as checkpoint:
        plan = Plan(checkpoint, recipe, format, device="cuda" if torch.cuda.is_available() else "cpu")
        write_export(checkpoint, plan, out, torch.bfloat16, 5 * 10**9, lambda elements: None)


def prompts(count: int) -> list[list[int]]:
    """Token ids: arithmetic as a chat, and a few beginnings of texts."""
    from transformers import AutoTokenizer

    from mxfp4_rl.tasks.arithmetic import DEFAULT_TEMPLATE, make_problems
    from mxfp4_rl.tasks.embedded_model import ensure_embedded_model

    tokenizer = AutoTokenizer.from_pretrained(ensure_embedded_model())
    found = [tokenizer(text)["input_ids"] for text in TEXTS[:count]]
    for problem in make_problems()[0][: count - len(found)]:
        asked = DEFAULT_TEMPLATE.format(a=problem.a, op=problem.op, b=problem.b)
        found.append(
            tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )
    return found


def transformers_answers(folder: Path, asked: list[list[int]], tokens: int) -> dict:
    """Greedy replies, and margins and log-probabilities along them."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    # Without an end token, as vLLM is asked to go on after one.
    model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=device)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask)
        replies = out[:, longest:]
        mask = torch.cat([mask, torch.ones_like(replies)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(out, attention_mask=mask, position_ids=positions).logits[:, longest - 1 : -1].float()
    log_probs = logits.log_softmax(-1)
    top = log_probs.topk(2).values
    return {
        "replies": replies.tolist(),
        "margins": (top[..., 0] - top[..., 1]).tolist(),
        "forced": log_probs.gather(-1, replies.unsqueeze(-1)).squeeze(-1).tolist(),
    }


def serve(folder: Path, expected: Path, reference: Path, tokens: int, wait: float) -> dict:
    """Load `folder` in vLLM, in this process.

    Args:
        expected: the BF16 export, for the operands. reference: a file of prompts and replies, waited for up to `wait` seconds.
    """
    from mxfp4_rl.vllm_plugin import offline

    began = time.perf_counter()
    # What vLLM would choose for BF16 experts has to be compiled first, for minutes and on all cores.
    backend = {"moe_backend": "triton"} if folder == expected else {}
    llm = offline.start(
        str(folder), None, load_format="auto", enforce_eager=True, max_model_len=512, max_num_seqs=64, seed=1,
        skip_tokenizer_init=True, gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False,
        logprobs_mode="raw_logprobs", **backend,
    )  # fmt: skip
    from vllm import SamplingParams

    held = offline.model_of(llm)
    row = {"start_s": time.perf_counter() - began, "weights_mib": sum(p.nbytes for p in held.parameters()) / 2**20}
    row["methods"] = sorted({_method(m) for m in held.modules() if getattr(m, "quant_method", None) is not None})
    try:
        row["operands"] = operands(held, expected)
    except Exception:  # the replies are worth having without
        row["operands"] = traceback.format_exc()
    until = time.perf_counter() + wait
    while not reference.exists():
        if time.perf_counter() > until:
            raise TimeoutError(f"no {reference.name} after {wait:.0f} s")
        time.sleep(0.2)
    given = json.loads(reference.read_text())

    def ask_for(ids: list[list[int]], **sampling):
        options = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
        return llm.generate([{"prompt_token_ids": p} for p in ids], options, use_tqdm=False)

    outputs = [o.outputs[0] for o in ask_for(given["prompts"], max_tokens=tokens, logprobs=2)]
    row["replies"] = [list(o.token_ids) for o in outputs]
    row["margins"] = []
    for output in outputs:
        best = [sorted((own.logprob for own in step.values()), reverse=True)[:2] for step in output.logprobs]
        row["margins"].append([first - second for first, second in best])
    whole = [p + reply for p, reply in zip(given["prompts"], given["replies"], strict=True)]
    forced = ask_for(whole, max_tokens=1, prompt_logprobs=1)
    row["forced"] = [
        [step[token].logprob for step, token in zip(o.prompt_logprobs[-tokens:], ids[-tokens:], strict=True)]
        for o, ids in zip(forced, whole, strict=True)
    ]
    return row


def _method(module) -> str:
    scheme = getattr(module, "scheme", None)
    return type(module.quant_method).__name__ + (f" {type(scheme).__name__}" if scheme is not None else "")


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def operands(held, expected: Path) -> dict:
    """Linear layers of the model in vLLM times the identity, against the dequantised weights; experts are only counted."""
    import torch
    from safetensors.torch import load_file

    wanted = {name: t for file in expected.glob("*.safetensors") for name, t in load_file(file).items()}
    count = {"layers": 0, "values": 0, "differ": 0, "worst": 0.0, "worst_layer": None}
    count["experts_not_compared"] = len({name.partition(".experts.")[0] for name in wanted if ".experts." in name})
    device = next(held.parameters()).device
    for name, module in held.named_modules():
        stem, _, last = name.rpartition(".")
        names = [f"{stem}.{part}.weight" for part in _FUSED.get(last, (last,))]
        if not hasattr(module, "quant_method") or not all(own in wanted for own in names) or "proj" not in last:
            continue
        weight = torch.cat([wanted[own] for own in names]).to(device)
        eye = torch.eye(weight.shape[1], dtype=torch.bfloat16, device=device)
        got = module.quant_method.apply(module, eye).T
        count["layers"] += 1
        count["values"] += weight.numel()
        count["differ"] += int((got != weight).sum())
        far = (got.float() - weight.float()).abs().max().item() / weight.float().abs().max().item()
        if far > count["worst"]:
            count["worst"], count["worst_layer"] = far, name
    return count


def _references(cases: list[Case], root: Path, asked: list[list[int]], tokens: int) -> dict[Case, dict]:
    """transformers' answers of every case; each goes to a file for the engines, by a rename."""
    found = {}
    for case in cases:
        folder = case.folder(root, "bf16")
        try:
            found[case] = transformers_answers(folder, asked, tokens)
            part = root / f"{folder.name}.part"
            part.write_text(json.dumps({"prompts": asked, "replies": found[case]["replies"]}))
            part.rename(root / f"{folder.name}.json")
            log(f"{case.name}: transformers has answered")
        except Exception:
            print(f"{case.name}: transformers failed\n{traceback.format_exc()}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names[:-1], metavar="CASE", help=f"of {names}")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each reply")
    parser.add_argument("--seconds", type=float, default=150, help="for each engine, its start included")
    parser.add_argument("--at-once", type=int, default=10, help="engines that run side by side")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--expected", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(next(case for case in CASES if case.name == options.cases[0]), options.export)
        tell({"exported": True})
        return
    if options.serve:
        tell(serve(options.serve, options.expected, options.reference, options.tokens, options.seconds))
        return
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(_run(options, Path(folder)))


def _run(options: argparse.Namespace, root: Path) -> int:
    asked_for = [case for case in CASES if case.name in options.cases]
    for model in {case.model: None for case in asked_for}:
        _make(model, root)
    log("the models are there")

    def exported(case: Case) -> bool:
        done = ask(case.name, __file__, "--export", str(root), "--cases", case.name, seconds=options.seconds, tail=60)
        log(f"{case.name}: " + ("exported and verified" if done else "the export failed"))
        return done is not None

    with ThreadPoolExecutor(options.at_once) as pool:
        cases = [case for case, done in zip(asked_for, pool.map(exported, asked_for), strict=True) if done]
    asked = prompts(options.prompts)
    if options.export_only:
        _references(cases, root, asked, options.tokens)
        return 0 if cases == asked_for else 1
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

    def engine(job: tuple[Case, str]) -> dict | None:
        case, format = job
        bf16 = case.folder(root, "bf16")
        more = ["--expected", str(bf16), "--reference", str(root / f"{bf16.name}.json"), "--tokens", str(options.tokens)]
        more += ["--seconds", str(options.seconds)]
        served = str(case.folder(root, format))
        row = ask(f"{case.name}, {format}", __file__, "--serve", served, *more, seconds=options.seconds, tail=60)
        log(f"{case.name}, {format}: " + ("failed" if row is None else f"answered by {', '.join(row['methods'])}"))
        return row

    jobs = [(case, format) for case in cases for format in (case.format, "bf16")]
    with ThreadPoolExecutor(options.at_once) as pool:
        waiting = pool.map(engine, jobs)
        by_transformers = _references(cases, root, asked, options.tokens)
        rows = dict(zip(jobs, waiting, strict=True))
    results = []
    for case in cases:
        packed, plain, theirs = rows[case, case.format], rows[case, "bf16"], by_transformers.get(case)
        result = {**asdict(case), "packed": _about(packed), "bf16": _about(plain)}
        for name, ours, reference in (("vllm", packed, plain), ("floor", plain, theirs), ("transformers", packed, theirs)):
            result[name] = compare(ours, reference) if ours and reference else None
        results.append(result)
    print()
    for result in results:
        print(f"{result['model']} {result['recipe']}, {result['format']}:")
        print(f"  {_operands_text(result['packed'])}")
        for name, words in (
            ("vllm", "packed against BF16, both in vLLM"),
            ("floor", "BF16 in vLLM and transformers"),
            ("transformers", "packed in vLLM, BF16 in transformers"),
        ):
            if result[name]:
                print(row_text(words, result[name]))
    if options.out:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        options.out.write_text(json.dumps({"device": device, "results": results}, indent=1) + "\n")
        log(f"written: {options.out}")
    return 0 if cases == asked_for and all(_as_exported(result["packed"]) for result in results) else 1


def _operands_text(row: dict | None) -> str:
    """What is known of an engine's operands."""
    if row is None:
        return "vLLM did not serve the packed export: see above"
    seen = row["operands"]
    if not isinstance(seen, dict):
        return f"operands could not be read\n{seen}"
    told = "operands: nothing was compared"
    if seen["layers"]:
        told = f"operands: {seen['differ']} of {seen['values']} values in {seen['layers']} linear layers differ"
        told += f" (by {seen['worst']:.2g} of the largest)"
    experts = seen["experts_not_compared"]
    return told + (f"; the experts of {experts} layers were NOT compared" if experts else "")


def _as_exported(row: dict | None) -> bool:
    """Whether vLLM served the export, and its linear layers, one or more, multiply by the very values."""
    seen = row and row["operands"]
    return isinstance(seen, dict) and seen["layers"] > 0 and seen["differ"] == 0


def _about(row: dict | None) -> dict | None:
    """What is kept of an engine's answers."""
    return None if row is None else {key: row[key] for key in ("start_s", "weights_mib", "methods", "operands")}


if __name__ == "__main__":
    main()
