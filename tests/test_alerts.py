"""Alerts: when they begin and end, what is told and where, and what the configuration may say."""

import itertools
import math
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfp4_rl.launch.progress import alarm_of
from mxfp4_rl.monitor.alerts import WATCHED, Alert, Alerts, describe, is_inside, send
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.settings import AlertSettings, Settings

numbers = st.floats(-10, 10)
values = st.lists(st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60)
ends = st.one_of(st.none(), numbers)
bands = st.tuples(ends, ends).filter(lambda band: None in band or band[0] <= band[1])
calms = st.integers(1, 6)


def changes(series, band, calm):
    """(position, "begins" or "ends") of every change."""
    alert = Alert(calm)
    told = ((i, alert.observe(value, band)) for i, value in enumerate(series))
    return [(i, change) for i, change in told if change]


@given(values, bands, calms)
def test_messages_alternate_and_start_with_an_alarm(series, band, calm):
    told = [change for _, change in changes(series, band, calm)]
    assert told == ["begins", "ends"] * (len(told) // 2) + ["begins"] * (len(told) % 2)


@given(values, bands, calms)
def test_the_first_value_outside_begins_an_alert_and_nothing_else_does(series, band, calm):
    outside = [i for i, value in enumerate(series) if not is_inside(value, band)]
    told = changes(series, band, calm)
    assert [i for i, _ in told[:1]] == outside[:1]
    assert all((change == "begins") == (i in outside) for i, change in told)


@given(values, bands, calms)
def test_an_alert_ends_after_calm_values_inside_and_not_before(series, band, calm):
    active, inside_for = False, 0
    expected = []
    for i, value in enumerate(series):  # the definition, written down again
        inside_for = inside_for + 1 if is_inside(value, band) else 0
        if not active and inside_for == 0:
            active = True
            expected.append((i, "begins"))
        elif active and inside_for == calm:
            active = False
            expected.append((i, "ends"))
    assert changes(series, band, calm) == expected


@given(values, bands, calms)
def test_no_flapping(series, band, calm):
    alarms = [i for i, change in changes(series, band, calm) if change == "begins"]
    assert all(later - earlier > calm for earlier, later in itertools.pairwise(alarms))
    assert len(alarms) <= math.ceil(len(series) / (calm + 1))


@given(bands, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_outside_of_every_band(band, value):
    assert not is_inside(value, band)


@given(numbers, bands)
def test_inside_is_between_the_ends(value, band):
    low, high = band
    assert is_inside(value, band) == ((low is None or low <= value) and (high is None or value <= high))


def test_a_run_tells_of_an_alert_once_and_of_its_end_once():
    alerts = Alerts({"entropy": (0.1, 3.0)}, calm=2)
    entropies = [1.0, 0.05, 0.05, 0.2, 0.05, 0.2, None, 0.2, 0.2]
    told, states = [], []
    for step, entropy in enumerate(entropies, start=1):
        metrics = {} if entropy is None else {"actor/entropy": entropy}
        told += alerts.check(step, metrics)
        states.append(metrics.get("mxfp4_alerts/entropy"))
    assert states == [0, 1, 1, 1, 1, 1, None, 0, 0]
    assert [(message.name, message.over) for message in told] == [("entropy", False), ("entropy", True)]
    assert told[0].text.startswith("step 2: entropy: actor/entropy is 0.05, its band is 0.1 to 3 (")
    assert told[1].text == "step 8: entropy: actor/entropy is 0.2, in its band again (0.1 to 3)"


def test_steps_without_signal_are_counted_in_a_row():
    alerts = Alerts({"no_signal": (None, 2)}, calm=1)
    told = {}
    for step, spread in enumerate([0, 0, 1, 0, 0, 0, 0, 1], start=1):
        metrics = {"critic/advantages/max": 0.5 * spread, "critic/advantages/min": -0.5 * spread}
        told |= {(step, message.over): metrics["training/steps_without_signal"] for message in alerts.check(step, metrics)}
    assert told == {(6, False): 3, (8, True): 0}


def test_the_band_of_the_mismatch_may_change_from_step_to_step():
    alerts = Alerts({"mismatch": lambda metrics: (None, metrics["limit"])}, calm=1)
    assert not alerts.check(1, {"rollout_corr/k3_kl": 0.5, "limit": 1.0})
    assert alerts.check(2, {"rollout_corr/k3_kl": 0.5, "limit": 0.4})


class Recorder:
    """Stands for wandb and for TensorBoard's adapter."""

    def __init__(self, error=None):
        self.error, self.calls, self.writer = error, [], self

    def alert(self, **kwargs):
        if self.error:
            raise self.error
        self.calls.append(kwargs)

    def add_text(self, *args):
        self.calls.append(args)


def test_every_channel_is_told(capsys):
    wandb, tensorboard = Recorder(), Recorder()
    alerts = Alerts({"grad_norm": (None, None)}, calm=1)
    for step, value in [(1, math.nan), (2, 1.0)]:
        send(
            alerts.check(step, {"actor/grad_norm": value}), {"wandb": wandb, "tensorboard": tensorboard, "console": None}, step
        )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": step")[0] for line in lines] == ["[mxfp4] alarm", "[mxfp4] alarm over"]
    assert all(alarm_of(f"\x1b[36m(TaskRunnerV1 pid=9)\x1b[0m {line}") == line for line in lines)
    assert [call["level"] for call in wandb.calls] == ["WARN", "INFO"]
    assert all(len(call["title"]) < 64 for call in wandb.calls)
    assert [call[0] for call in tensorboard.calls] == ["mxfp4_alerts/messages"] * 2


def test_a_service_that_fails_does_not_end_the_run(capsys):
    message = types.SimpleNamespace(name="entropy", text="low", over=False, console_line="[mxfp4] alarm: low")
    send([message], {"wandb": Recorder(ConnectionError("no route"))}, 1)
    output = capsys.readouterr().out
    assert output == "[mxfp4] alarm: low\n[mxfp4] warning: an alert was not delivered: ConnectionError: no route\n"


def test_titles_fit_into_what_wandb_takes():
    assert all(len(f"{name}: back in its band") < 64 for name in WATCHED)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"entropi": [0, 1]}, "did you mean 'entropy'"),
        ({"entropy": 0.1}, r"entropy=0.1 must be a band \[low, high\]"),
        ({"entropy": [0.1]}, r"must be a band"),
        ({"entropy": [3, 1]}, "wrong way round"),
        ({"grad_norm": [None, "high"]}, "'high'"),
        ({"grad_norm": [True, None]}, "True"),
        ({"grad_norm": [math.nan, None]}, "nan"),
        ({"calm": 0}, "calm=0"),
        ({"calm": 1.5}, "calm=1.5"),
        ([1], "block of keys"),
    ],
)
def test_mistakes_in_the_configuration(block, expected):
    with pytest.raises(RecipeError, match=expected):
        Settings.from_config({"alerts": block})


def test_null_switches_an_alert_off_and_the_rest_keeps_its_default():
    alerts = Settings.from_config({"alerts": {"entropy": None, "grad_norm": [0, 5]}}).alerts
    assert alerts.bands() == {k: v for k, v in AlertSettings().bands().items() if k != "entropy"} | {"grad_norm": (0, 5)}
    assert set(AlertSettings().bands()) | {"mismatch"} == set(WATCHED)


def test_bands_in_words():
    found = [describe(band) for band in [(None, None), (None, 2), (1, None), (1, 2)]]
    assert found == ["finite", "at most 2", "at least 1", "1 to 2"]
