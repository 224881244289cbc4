"""Which metrics belong together: sections of panels, the same in a wandb workspace and in TensorBoard's custom scalars.

A panel is a title and regular expressions; it draws every metric of the run that one of them matches whole. The sections are
given here once; the panels of single layers follow from the metrics' names, a panel for each component and projection with
a line a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mxfp4_rl.monitor.run_log import LAYER_COMPONENTS, LAYER_PREFIX, parse_layer_name


@dataclass(frozen=True)
class Panel:
    """A chart: its title and the metrics in it, as regular expressions that match a whole name."""

    title: str
    patterns: tuple[str, ...]

    @cached_property
    def _compiled(self) -> re.Pattern:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.patterns))

    def metrics(self, names: Iterable[str]) -> list[str]:
        """The metrics among `names` that the panel draws, sorted."""
        return sorted(name for name in names if self._compiled.fullmatch(name))


@dataclass(frozen=True)
class Section:
    """A group of panels."""

    title: str
    panels: tuple[Panel, ...]


_PARTS = "(scale_bias|deadzone|final_deadzone|grid_noise|fallback|rel_mse)"
_COMPONENT = f"({'|'.join(LAYER_COMPONENTS)})"
_OPERAND = "mxfp4/((activation|grad)/)?"
VALIDATION = Panel("validation", (r"val-core/.*/mean@\d+",))
TRAINING = Section(
    "training",
    (
        Panel("reward", ("critic/score/(mean|max|min)",)),
        VALIDATION,
        Panel("entropy", ("actor/entropy",)),
        Panel("gradient norm", ("actor/grad_norm",)),
        Panel("loss", ("actor/(loss|pg_loss|kl_loss)",)),
        Panel("clipped by PPO", ("actor/pg_clipfrac(_lower)?", "actor/ppo_kl")),
        Panel("length of answers", ("response_length/(mean|max|min)",)),
        Panel("answers cut off, aborted", ("response_length/clip_ratio", "response/aborted_ratio")),
        Panel("learning rate", ("actor/lr",)),
    ),
)
COMPONENTS = Section(
    "error components",
    (
        Panel("weights", (f"mxfp4/{_PARTS}",)),
        Panel("activations", (f"mxfp4/activation/{_PARTS}",)),
        Panel("gradients", (f"mxfp4/grad/{_PARTS}",)),
        Panel("shares of the weights' error", ("mxfp4_share/[a-z_]+",)),
        Panel("shares of the activations' error", ("mxfp4_share/activation/[a-z_]+",)),
        Panel("shares of the gradients' error", ("mxfp4_share/grad/[a-z_]+",)),
        Panel("fraction that rounds to zero", (_OPERAND + "(deadzone|zero|final_zero)_fraction",)),
        Panel("cosines of the components", (_OPERAND + "cos_[a-z_]+",)),
        Panel("mean of the scales' error", (_OPERAND + "delta_mean",)),
        Panel("slope of quantised on exact", (_OPERAND + "slope",)),
        Panel("exploration noise", ("mxfp4/aqn_sigma",)),
    ),
)
EXPERTS = Section(
    "experts",
    (
        Panel("tokens of the busiest expert over the mean", ("mxfp4_experts/imbalance_(mean|max)",)),
        Panel("experts without tokens", ("mxfp4_experts/without_tokens",)),
        Panel("weights of an expert", (f"mxfp4_experts/{_COMPONENT}_(min|mean|max)",)),
        Panel("activations of an expert", (f"mxfp4_experts/activation/{_COMPONENT}_(min|mean|max)",)),
        Panel("tokens of an expert, by layer", (rf"{LAYER_PREFIX}.*/tokens_(min|mean|max|none|imbalance)",)),
        Panel("same experts in trainer and rollout", ("mxfp4/router_(agreement|overlap)",)),
    ),
)
MISMATCH = Section(
    "rollout mismatch",
    (
        Panel("KL of rollout and trainer", ("rollout_corr/(kl|k3_kl)",)),
        Panel("token probabilities", ("training/rollout_probs_diff_(mean|std)",)),
        Panel("largest difference of a token", ("training/rollout_probs_diff_max",)),
        Panel("correlation", ("training/rollout_actor_probs_pearson_corr",)),
        Panel("importance weights", ("rollout_corr/rollout_is_(mean|min|max|std)",)),
        Panel("effective sample size", ("rollout_corr/rollout_is_eff_sample_size",)),
        Panel("perplexity", ("rollout_corr/(training|rollout)_ppl",)),
        Panel("chi-squared", ("rollout_corr/chi2_(token|seq)",)),
    ),
)
KERNELS = Section(
    "kernels and time",
    (
        Panel("seconds of a step", (r"timing_s/(step|gen|old_log_prob|ref|update_actor|update_weights|mxfp4_monitor|adv)",)),
        Panel("validation, checkpoint", ("timing_s/(testing|save_checkpoint)",)),
        Panel("milliseconds a token", ("timing_per_token_ms/.*",)),
        Panel("weight sync: seconds", ("mxfp4_sync/seconds",)),
        Panel("weight sync: bytes", ("mxfp4_sync/bytes",)),
        Panel("weight sync: fraction of BF16", ("mxfp4_sync/fraction_of_bf16",)),
        Panel("tokens a second", ("perf/throughput",)),
        Panel("model FLOPs utilisation", ("perf/mfu/.*",)),
        Panel("memory, GB", ("actor/perf/.*_gb",)),
    ),
)
ALERTS = Section(
    "alerts",
    (
        Panel("out of its band", ("mxfp4_alerts/.*",)),
        Panel("steps without a signal", ("training/steps_without_signal",)),
        Panel("failed samples, updates that came to nothing", ("mxfp4_guards/.*",)),
    ),
)


def sections(names: Iterable[str], also: Sequence[Panel] = ()) -> list[Section]:
    """The sections with the panels that draw any metric of `names`; a section without panels is left out.

    Args:
        also: panels to keep though no metric of theirs is there yet.
    """
    names = list(names)
    found = []
    for section in (TRAINING, COMPONENTS, _per_layer(names), EXPERTS, MISMATCH, KERNELS, ALERTS):
        panels = tuple(panel for panel in section.panels if panel in also or panel.metrics(names))
        if panels:
            found.append(Section(section.title, panels))
    return found


def _per_layer(names: Iterable[str]) -> Section:
    projections = set()
    for name in names:
        place = parse_layer_name(name.removeprefix(LAYER_PREFIX).rpartition("/")[0]) if name.startswith(LAYER_PREFIX) else None
        if place is not None:
            projections.add(place[1][-1])
    return Section(
        "per layer",
        tuple(
            Panel(f"{projection}: {component}", (rf"{LAYER_PREFIX}.*\.{re.escape(projection)}(\.weight)?/{component}",))
            for component in reversed(LAYER_COMPONENTS)
            for projection in sorted(projections)
        ),
    )
