"""Alerts: a message when a metric leaves its band, and one when it is back; never one a step.

A band is [low, high], an open end is null, and a value that is not finite is outside of every band. An alert begins with
the first value outside and is over after `calm` values inside in a row, so a metric that wavers about its limit is told of
once. Steps that do not log the metric change nothing. State is a float a step, `mxfp4_alerts/<name>`, 1 while the alert
lasts: whatever reads the run's metrics (wandb, TensorBoard, metrics.jsonl, the live page) sees the same alerts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "mxfp4_alerts/"
ALARM_MARK = "[mxfp4] alarm: "  # the launcher shows lines with these two marks to whoever waits for the run
OVER_MARK = "[mxfp4] alarm over: "
MISMATCH = "mismatch"
NO_SIGNAL = "no_signal"
# Name of an alert -> the metric that it watches and what a value outside of the band means.
WATCHED = {
    "deadzone_fraction": (
        "mxfp4/deadzone_fraction",
        "many weights round to zero: outliers stretch the blocks' scales; see macro_block, fallback_alpha",
    ),
    "entropy": ("actor/entropy", "near zero exploration is over, a steep rise means that the policy falls apart"),
    "grad_norm": ("actor/grad_norm", "the update is broken, or about to be; see the loss and the learning rate"),
    "response_clip": (
        "response_length/clip_ratio",
        "this part of the answers was cut off at data.max_response_length",
    ),
    NO_SIGNAL: (
        "training/steps_without_signal",
        "so many steps in a row all answers of each prompt had the same reward: nothing to learn from",
    ),
    MISMATCH: (
        "rollout_corr/k3_kl",
        "the rollout's probabilities are far from the trainer's: are both quantised by the same recipe, and are the "
        "weights in sync? See mxfp4.mismatch",
    ),
}

Band = tuple[float | None, float | None]


def is_inside(value: float, band: Band) -> bool:
    """Whether a value is finite and within the band, its ends included."""
    low, high = band
    return math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)


def describe(band: Band) -> str:
    """The band in words."""
    low, high = band
    if low is None and high is None:
        return "finite"
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


class Alert:
    """The state of one alert.

    Args:
        calm: values inside the band, in a row, after which the alert is over.
    """

    def __init__(self, calm: int):
        self.calm = calm
        self.active = False
        self._inside_for = 0

    def observe(self, value: float, band: Band) -> str | None:
        """Take a value. "begins" or "ends" if that changes the state, else None."""
        if not is_inside(value, band):
            self._inside_for = 0
            begins, self.active = not self.active, True
            return "begins" if begins else None
        self._inside_for += 1
        if self.active and self._inside_for >= self.calm:
            self.active = False
            return "ends"
        return None


@dataclass(frozen=True)
class Message:
    """What is told of an alert.

    Attributes:
        name: of the alert, as in the configuration.
        text: one line, with the step, the value, the band and what to make of it.
        over: the metric is back inside its band.
    """

    name: str
    text: str
    over: bool

    @property
    def console_line(self) -> str:
        return (OVER_MARK if self.over else ALARM_MARK) + self.text


class Alerts:
    """The alerts of a run.

    Args:
        bands: name (of WATCHED) -> its band, or a function from a step's metrics to its band.
        calm: see `Alert`.
    """

    def __init__(self, bands: Mapping[str, Band | Callable[[Mapping[str, float]], Band]], calm: int):
        self.bands = dict(bands)
        self._alerts = {name: Alert(calm) for name in self.bands}
        self._without_signal = 0

    def check(self, step: int, metrics: dict[str, float]) -> list[Message]:
        """Take a step's metrics, add `mxfp4_alerts/*` to them, and return what there is to tell."""
        self._count_steps_without_signal(metrics)
        messages = []
        for name, alert in self._alerts.items():
            metric, meaning = WATCHED[name]
            if metric not in metrics:
                continue
            value, band = float(metrics[metric]), self.bands[name]
            band = band(metrics) if callable(band) else band
            change = alert.observe(value, band)
            metrics[PREFIX + name] = float(alert.active)
            if change == "begins":
                text = f"step {step}: {name}: {metric} is {value:.4g}, its band is {describe(band)} ({meaning})"
                messages.append(Message(name, text, over=False))
            elif change == "ends":
                text = f"step {step}: {name}: {metric} is {value:.4g}, in its band again ({describe(band)})"
                messages.append(Message(name, text, over=True))
        return messages

    def _count_steps_without_signal(self, metrics: dict[str, float]) -> None:
        high, low = metrics.get("critic/advantages/max"), metrics.get("critic/advantages/min")
        if NO_SIGNAL in self.bands and high is not None and low is not None:
            self._without_signal = self._without_signal + 1 if high == low else 0
            metrics[WATCHED[NO_SIGNAL][0]] = self._without_signal


def send(messages: list[Message], backends: Mapping[str, object], step: int) -> None:
    """Tell: a line on the console each, wandb's alert and a text in TensorBoard where they log this run.

    Args:
        backends: name -> logger, as verl's Tracking has them.
    """
    for message in messages:
        print(message.console_line, flush=True)
        try:
            if "wandb" in backends:
                title = f"{message.name}: {'back in its band' if message.over else 'out of its band'}"
                level = "INFO" if message.over else "WARN"
                # wandb drops an alert that has the last one's title and comes within this many seconds; 0 means its default.
                backends["wandb"].alert(title=title, text=message.text, level=level, wait_duration=1)
            if "tensorboard" in backends:
                backends["tensorboard"].writer.add_text(PREFIX + "messages", message.text, step)
        except Exception as error:  # a service that cannot be reached must not end the run
            print(f"[mxfp4] warning: an alert was not delivered: {type(error).__name__}: {error}", flush=True)
