"""A small GRPO loop in one process: the ladder's instrument. `python recipes/ladder/grpo.py FOLDER` runs FOLDER/config.json.

One model object samples and learns, so rollout and trainer multiply by the same quantised operands. A step is

    noise on the norms (AQN) -> sample `prompts` x `samples` responses -> noise off -> reward, advantages within a group
    -> loss = -sum_t w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) / tokens,  w_t = min(p_trainer / p_rollout, cap)
    -> clipped AdamW step of FP32 masters -> the BF16 weights are written again from them

which is what verl's FSDP2 actor with BF16 compute does: BF16 gradients of micro-batches are summed in FP32, and each weight
is quantised once an optimiser step. Data order and samples are functions of (seed, step), not of the rung: rungs of one seed
are paired. A run that is cut off goes on from `state.pt`, to the bit on a CPU with as many threads. Metrics have verl's names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

import torch
from filelock import FileLock, Timeout
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mxfp4_rl import ModelRecipe, convert
from mxfp4_rl.generation import Sampling, generate
from mxfp4_rl.monitor import experts, routing
from mxfp4_rl.monitor.components import collect_errors, error_metrics, start_measuring
from mxfp4_rl.nn import MXFP4Experts, MXFP4Linear
from mxfp4_rl.noise import AQNSchedule, noise_targets
from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model
from recipes.ladder.data import Data
from recipes.ladder.options import MORE_TO_DO, Options, free_reply, keep_steps, record_session, write_atomically
from recipes.ladder.w8a8 import convert_to_w8a8
from recipes.upcycle.upcycle import write_mixture

DTYPE = torch.bfloat16
_AFTER_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_ROUTED = 16  # sequences of a measured step whose experts are compared
_SHOWN = ("critic/score/mean", "actor/entropy", "rollout_corr/k3_kl", "actor/grad_norm", "timing_s/step")


@contextmanager
def unquantised(model: nn.Module):
    """Plain layers for a while; what the quantised ones keep stays theirs."""
    layers = [(m, type(m)) for m in model.modules() if isinstance(m, MXFP4Linear | MXFP4Experts)]
    for layer, own in layers:
        layer.__class__ = own.family if isinstance(layer, MXFP4Experts) else nn.Linear
    try:
        yield
    finally:
        for layer, own in layers:
            layer.__class__ = own


class Run:
    """One rung with one seed, as FOLDER/config.json says: `Run(folder).go()`. Setting `stop` ends it after a step."""

    def __init__(self, folder: str | Path, stop: threading.Event | None = None):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.began = float(os.environ.get("LADDER_BEGAN", time.time()))  # the imports are this run's time too
        self.folder, self.stop, self.step = Path(folder), stop or threading.Event(), 0
        config = json.loads((self.folder / "config.json").read_text())
        self.options, self.seed, work = Options.from_dict(config["options"]), config["seed"], Path(config["work"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(self.seed)  # stochastic rounding draws from it, nothing else does
        path = _checkpoint(self.options, work, self.stop)
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.data = Data(self.options, tokenizer, work)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(self.device).eval()
        scaled = [k for k in _AFTER_LOGITS if getattr(self.model.config, k, None) not in (None, 1.0)]
        if scaled:
            raise ValueError(f"{path}: {scaled[0]} changes the logits after the last layer, which this loop does not")
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        self.stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        # The optimiser sees FP32 masters; a hook moves each BF16 gradient there as soon as it is complete.
        self.names, self.weights = zip(*self.model.named_parameters(), strict=True)
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.weights]
        for p, master in zip(self.weights, self.masters):
            p.register_post_accumulate_grad_hook(lambda p, master=master: _move_gradient(p, master))
        self._warm_up(work)
        recipe, aqn = config["recipe"], config["aqn"]
        report = convert(self.model, ModelRecipe.from_dict(recipe)) if recipe is not None else None
        layers = len(report.converted) if report else convert_to_w8a8(self.model) if config["fp8"] else 0
        self.quantised, self.has_components = layers > 0, report is not None  # the components are of 4-bit recipes
        steps = self.options.steps
        self.noise = AQNSchedule(total_steps=steps, **{"seed": self.seed, **aqn}) if aqn is not None else None
        self.noise_targets = noise_targets(self.model) if self.noise else []
        self._new_optimiser(self.options.lr)
        self.machine = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "jobs": int(os.environ.get("LADDER_JOBS", 1)), "layers_quantised": layers,
            "backends": report.backends(self.device) if report else "", "git": os.environ.get("LADDER_REVISION", "unknown"),
        }  # fmt: skip

    def _new_optimiser(self, lr: float) -> None:
        self.optimiser = torch.optim.AdamW(self.masters, lr=lr, weight_decay=self.options.weight_decay)

    def _warm_up(self, work: Path) -> None:
        """The shared supervised phase on the training answers, or its result where another run has made it.

        `untrained` is the model's accuracy before it, in BF16, with room for a whole sentence.
        """
        o, data = self.options, self.data
        self.untrained = None
        if o.warmup_steps == 0:
            return
        key = json.dumps(
            [o.model, o.upcycle, o.task, o.warmup_steps, o.warmup_lr, o.warmup_batch, o.weight_decay, o.max_grad_norm]
        )
        file = work / "warmup" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone_with(file, self.stop):  # whoever comes first trains, the others wait
            if not file.is_file():
                score = fmean(self.validate(free_reply(o))) if o.validate_every else None
                self._new_optimiser(o.warmup_lr)
                for step in range(1, o.warmup_steps + 1):
                    if self.stop.is_set():
                        raise InterruptedError
                    rows = data.step_rows(step, o.warmup_batch, seed=0)
                    answers = [[*data.ids_of(r["reward_model"]["ground_truth"]), data.tokenizer.eos_token_id] for r in rows]
                    batch = data.tensors([r["ids"] for r in rows], answers, self.device)
                    for micro in torch.arange(len(rows)).split(o.micro_batch):
                        logp, _ = self._log_probs(batch, micro)
                        (-(logp * batch["mask"][micro]).sum() / batch["mask"].sum()).backward()
                    self._optimise()
                made = {"untrained": score, "masters": [m.detach().cpu() for m in self.masters]}
                write_atomically(file, lambda part: torch.save(made, part))
            made = torch.load(file)
            self.untrained = made["untrained"]
            self._set_masters(made["masters"])

    @torch.no_grad()
    def _set_masters(self, values: list[torch.Tensor] | None = None) -> None:
        """Write the BF16 weights from the masters, after filling these with `values`."""
        for i, (p, master) in enumerate(zip(self.weights, self.masters)):
            if values is not None:
                master.copy_(values[i])
            p.copy_(master)  # raises the weight's version: its layer quantises it again

    def _optimise(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.masters, self.options.max_grad_norm).item()
        if math.isfinite(norm):  # as verl: a step whose gradient is not finite is left out
            self.optimiser.step()
            self._set_masters()
        self.optimiser.zero_grad()
        return norm

    @contextmanager
    @torch.no_grad()
    def noisy(self, finished: int):
        """AQN of the step after `finished` ones on the norms' weights, in the rollout only; yields sigma."""
        parameters = dict(zip(self.names, self.weights))
        clean = {name: parameters[name].detach().clone() for name in self.noise_targets}
        try:
            for name, weight in clean.items():
                parameters[name].copy_(self.noise.noisy(name, weight, finished))
            yield self.noise.sigma(finished) if self.noise else 0.0
        finally:
            for name, weight in clean.items():
                parameters[name].copy_(weight)

    def _sample(self, prompts: list[list[int]], seeds: list[int], temperature: float, tokens: int):
        """(tokens, their log-probs) of a response each."""
        out, o, sampling = [], self.options, Sampling(temperature=temperature)
        for part in (slice(i, i + o.rollout_batch) for i in range(0, len(prompts), o.rollout_batch)):
            limits = [tokens] * len(prompts[part])
            out += generate(self.model, prompts[part], limits, seeds[part], sampling, self.stop_ids, self.data.pad_id)
        return out

    def rollout(self, step: int) -> tuple[dict, dict]:
        """Sample and score the step's groups; returns the batch and its metrics."""
        o = self.options
        rows = [row for row in self.data.step_rows(step, o.prompts, self.seed) for _ in range(o.samples)]
        with self.noisy(step - 1) as sigma:
            keys = [f"{self.seed}/{step}/{i}".encode() for i in range(len(rows))]
            seeds = [int.from_bytes(hashlib.blake2b(k, digest_size=8).digest(), "little") >> 1 for k in keys]
            samples = self._sample([r["ids"] for r in rows], seeds, o.temperature, o.response_tokens)
        tokens = [t for t, _ in samples]
        scores = torch.tensor([self.data.score(r, t) for r, t in zip(rows, tokens)])
        groups = scores.view(-1, o.samples)
        advantages = groups - groups.mean(-1, keepdim=True)
        if o.norm_std:
            advantages = advantages / (groups.std(-1, keepdim=True) + 1e-6)
        batch = self.data.tensors([r["ids"] for r in rows], tokens, self.device)
        batch["advantage"] = advantages.flatten().to(self.device)
        logp = [torch.tensor(values) for _, values in samples]
        batch["rollout"] = nn.utils.rnn.pad_sequence(logp, batch_first=True).to(self.device)
        compared = slice(0, o.samples * _ROUTED, o.samples)  # a response of each group
        routed = {}
        if self._is_measured(step):
            routed = self._routing([r["ids"] for r in rows[compared]], tokens[compared], step - 1)
        cut = [len(t) == o.response_tokens and t[-1] not in self.stop_ids for t in tokens]
        return batch, routed | {
            "critic/score/mean": scores.mean().item(), "response_length/mean": fmean(map(len, tokens)),
            "response_length/clip_ratio": sum(cut) / len(cut), "mxfp4/aqn_sigma": sigma,
            "critic/groups_without_signal": (groups.amax(-1) == groups.amin(-1)).float().mean().item(),
        }  # fmt: skip

    def _log_probs(self, batch: dict, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response tokens and the entropy there (else 0); logits of other tokens are not computed."""
        ids, seen, mask, response = (batch[k][rows] for k in ("ids", "seen", "mask", "response"))
        width, mask = int(seen.sum(-1).max()), mask.bool()  # columns that only other rows fill are left out
        ids, response = ids[:, :width], response[:, 1:width]  # a token is predicted one column before its own
        hidden = self.model.base_model(input_ids=ids, attention_mask=seen[:, :width], use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, :-1][response])
        all_logp = (logits.float() / self.options.temperature).log_softmax(-1)
        with torch.no_grad():
            entropies = -(all_logp.exp() * all_logp).sum(-1)
        chosen = all_logp.gather(-1, ids[:, 1:][response].unsqueeze(-1)).squeeze(-1)
        logp, entropy = torch.zeros(2, *mask.shape, device=ids.device)
        return logp.masked_scatter(mask, chosen), entropy.masked_scatter(mask, entropies)

    def _backward(self, batch: dict, mini: torch.Tensor, sums: dict) -> None:
        """Gradients of a mini-batch into the masters, its metrics' sums into `sums`."""
        o, tokens = self.options, batch["mask"][mini].sum()
        for rows in mini.split(o.micro_batch):
            logp, entropy = self._log_probs(batch, rows)
            mask, advantage, rollout = batch["mask"][rows], batch["advantage"][rows, None], batch["rollout"][rows]
            # One optimiser step a rollout: the policy is its own old one. So it is in the unquantised pass, which has "weight".
            old = batch["old"][rows] if "old" in batch and "weight" not in batch else logp.detach()
            if "weight" in batch:
                weight = batch["weight"][rows]
            else:
                weight = (old - rollout).exp().clamp(max=o.is_cap)
                sums["weights"].append(weight)
            ratio = (logp - old).exp()
            clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
            loss = -(torch.minimum(ratio * advantage, clipped * advantage) * weight * mask).sum() / tokens
            loss.backward()
            log_ratio = old - rollout
            sums["actor/entropy"] += (entropy * mask).sum()
            sums["rollout_corr/kl"] += -(log_ratio * mask).sum()
            sums["rollout_corr/k3_kl"] += ((log_ratio.exp() - 1 - log_ratio) * mask).sum()
            sums["actor/pg_clipfrac"] += ((clipped * advantage < ratio * advantage) * mask).sum()
            sums["tokens"] += mask.sum()

    def update(self, batch: dict, step: int) -> dict[str, float]:
        """The optimiser steps of one rollout; on a measured step also the errors, and the gradient without quantiser."""
        o, sums, norms, metrics = self.options, defaultdict(float), [], {}
        sums["weights"] = []
        everything = torch.arange(len(batch["ids"]), device=self.device)
        if o.mini_batches > 1:
            with torch.no_grad():
                batch["old"] = torch.cat([self._log_probs(batch, rows)[0] for rows in everything.split(o.micro_batch)])
        measured = self.quantised and self._is_measured(step)
        for mini in everything.chunk(o.mini_batches):
            if measured and self.has_components:
                start_measuring(self.model, o.measure_rows)
            self._backward(batch, mini, sums)
            if measured:
                if self.has_components:
                    errors = collect_errors(self.model, o.measure_rows, DTYPE)
                    metrics |= error_metrics(errors, layers=False)
                    experts.write_table(self.folder, step, errors)
                metrics |= self._against_bf16(batch, mini, sums["weights"])
                measured = False
            norms.append(self._optimise())
        tokens = sums.pop("tokens")
        del sums["weights"]
        metrics |= {name: (total / tokens).item() for name, total in sums.items()}
        return metrics | {"actor/grad_norm": sum(norms) / len(norms), "actor/lr": o.lr}

    def _is_measured(self, step: int) -> bool:
        return self.options.measure_every > 0 and (step - 1) % self.options.measure_every == 0

    def _routing(self, prompts: list[list[int]], responses: list[list[int]], finished: int) -> dict[str, float]:
        """Whether the rollout's router chose what the trainer's does, on the same tokens; {} for a dense model.

        The rollout's side has its noise, its padding and a KV cache. `ladder/router_agreement_bf16`: of the trainer and the
        same weights without a quantiser.
        """
        if not routing.routed_modules(self.model):
            return {}
        sequences = [p + r for p, r in zip(prompts, responses)]
        own = routing.choices_of(self.model, sequences, self.data.pad_id)
        with self.noisy(finished):
            rollout = routing.choices_of(self.model, sequences, self.data.pad_id, [len(p) for p in prompts])
        found = {f"mxfp4/{k}": v for k, v in routing.agreement(own, rollout).items()}
        if not self.quantised:
            return found
        with unquantised(self.model):
            plain = routing.choices_of(self.model, sequences, self.data.pad_id)
        return found | {f"ladder/{k}_bf16": v for k, v in routing.agreement(own, plain).items()}

    def _against_bf16(self, batch: dict, mini: torch.Tensor, weights: list[torch.Tensor]) -> dict[str, float]:
        """The quantised gradient's norm over that of BF16 products on the same samples and weights, and their cosine."""
        own = [m.grad for m in self.masters]
        for m in self.masters:
            m.grad = None
        with unquantised(self.model):
            self._backward({**batch, "weight": torch.cat(weights)}, mini, defaultdict(float))
        pairs = [(a, m.grad) for a, m in zip(own, self.masters) if a is not None and m.grad is not None]
        products = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs]
        dot, own_sq, plain_sq = torch.stack(products).double().sum(0).tolist()
        for m, gradient in zip(self.masters, own):
            m.grad = gradient
        if not own_sq * plain_sq > 0:  # no group had a signal
            return {}
        return {"ladder/grad_norm_ratio": (own_sq / plain_sq) ** 0.5, "ladder/grad_cosine": dot / (own_sq * plain_sq) ** 0.5}

    def validate(self, tokens: int | None = None) -> list[float]:
        """The score of every held-out problem, greedy, without noise, with replies of `tokens` (None: as in training)."""
        rows = self.data.val
        samples = self._sample([r["ids"] for r in rows], [0] * len(rows), 0.0, tokens or self.options.response_tokens)
        return [self.data.score(row, tokens) for row, (tokens, _) in zip(rows, samples)]

    def go(self) -> int:
        """Run to the end, or until told to stop; returns the exit code."""
        o, accuracy = self.options, f"val-core/{self.data.name}/acc/mean@1"
        self._resume()
        try:
            if self.step == 0 and o.validate_every and not self.stop.is_set():
                untrained = {} if self.untrained is None else {"ladder/val_untrained": self.untrained}
                self._log(0, {accuracy: fmean(self.validate()), **untrained})
            while self.step < o.steps and not self.stop.is_set():
                began, step = time.perf_counter(), self.step + 1
                batch, metrics = self.rollout(step)
                generated = time.perf_counter()
                metrics |= self.update(batch, step)
                now = time.perf_counter()
                metrics |= {"timing_s/gen": generated - began, "timing_s/update_actor": now - generated}
                metrics["timing_s/step"] = now - began
                if o.validate_every and step % o.validate_every == 0 and step < o.steps:
                    metrics[accuracy] = fmean(self.validate())
                self._log(step, metrics)
                self.step = step
                if self.stop.is_set() or step == o.steps or (o.checkpoint_every and step % o.checkpoint_every == 0):
                    self._save()
            if self.step < o.steps:
                return MORE_TO_DO
            scores = self.validate()
            with unquantised(self.model):
                plain = self.validate()
            self._log(o.steps, {accuracy: fmean(scores), "ladder/val_unquantised": fmean(plain)})
            problems, sources = zip(*((row["prompt"][-1]["content"], row["data_source"]) for row in self.data.val))
            result = {"scores": scores, "scores_unquantised": plain, "problems": problems, "sources": sources}
        except FloatingPointError as error:  # a result too: this run's training diverged
            result = {"diverged": self.step + 1, "why": str(error)}
        self._heartbeat()
        write_atomically(self.folder / "done.json", json.dumps({**result, "steps": self.step}))
        (self.folder / "state.pt").unlink(missing_ok=True)
        return 0

    def _save(self) -> None:
        state = {"step": self.step, "masters": self.masters, "optimiser": self.optimiser.state_dict()}
        state["rng"] = torch.get_rng_state()  # the CPU's: nothing draws on a GPU
        write_atomically(self.folder / "state.pt", lambda part: torch.save(state, part))

    def _resume(self) -> None:
        file = self.folder / "state.pt"
        if file.is_file():
            state = torch.load(file, map_location="cpu")
            self.step = state["step"]
            self._set_masters(state["masters"])
            self.optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["rng"])
        keep_steps(self.folder / "metrics.jsonl", self.step if file.is_file() else -1)
        experts.drop_past(self.folder, self.step if file.is_file() else -1)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"step": step, "data": metrics}) + "\n")
        self._heartbeat()
        shown = " ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in _SHOWN or "val" in k)
        print(f"step {step}: {shown}", flush=True)

    def _heartbeat(self) -> None:
        """This process's time, written at every step: a process that is killed has still told it."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        own = {"wall_s": time.time() - self.began, "cpu_s": time.process_time(), "peak_bytes": peak, "at_step": self.step}
        record_session(self.folder / "sessions.json", {"began": self.began, **self.machine, **own})


@contextmanager
def _alone_with(file: Path, stop: threading.Event):
    """While no other run makes `file`.

    Raises:
        InterruptedError: told to stop, before it was this run's turn.
    """
    lock = FileLock(f"{file}.lock")
    while not lock.is_locked:
        if stop.is_set():
            raise InterruptedError
        with suppress(Timeout):
            lock.acquire(timeout=1)
    try:
        if stop.is_set():
            raise InterruptedError
        yield
    finally:
        lock.release()


def _checkpoint(options: Options, work: Path, stop: threading.Event) -> str:
    """The folder of the model that the runs start from; a mixture is made once in the runs' folder, by whoever comes first.

    Raises:
        InterruptedError: told to stop while another run made the mixture.
    """
    if options.upcycle is None:
        return str(ensure_embedded_model()) if options.model == EMBEDDED_MODEL_NAME else options.model
    key = json.dumps([options.model, options.upcycle], sort_keys=True)
    folder = work / "mixtures" / hashlib.sha256(key.encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone_with(folder, stop):
        if not folder.is_dir():
            write_mixture(options.model, folder, **options.upcycle)
    return str(folder)


def _move_gradient(p: nn.Parameter, master: nn.Parameter) -> None:
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None


def main() -> int:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the runner, which tells its runs
    try:
        return Run(sys.argv[1], stop).go()
    except InterruptedError:  # in the warm-up
        return MORE_TO_DO


if __name__ == "__main__":
    raise SystemExit(main())
