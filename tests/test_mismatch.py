"""The watch over the distance between trainer and rollout, and the metrics of a weight sync."""

import pytest

from mxfp4_rl.monitor.alerts import send
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.settings import Settings
from mxfp4_rl.verl_plugin.trainer import MXFP4TrainerSync, sync_metrics

W4A16 = {"activation": None}


def watched(distance, recipe=None, sigma=0.0, enable=True, **mismatch):
    """A step's `mxfp4_alerts/mismatch`, as the trainer's hooks work it out; None where there is none."""
    trainer = MXFP4TrainerSync.__new__(MXFP4TrainerSync)  # without Ray
    trainer.settings = Settings.from_config({"enable": enable, "recipe": recipe or {}, "mismatch": mismatch})
    trainer.global_steps = 3
    metrics = {"mxfp4/aqn_sigma": sigma} | ({} if distance is None else {"rollout_corr/k3_kl": distance})
    trainer._stop_at_mismatch(metrics)
    send(trainer._make_alerts().check(3, metrics), {}, 3)
    return metrics.get("mxfp4_alerts/mismatch")


@pytest.mark.parametrize(
    ("distance", "recipe", "mismatch", "alarm"),
    [
        (1e-4, W4A16, {}, 0.0),
        (0.3, W4A16, {}, 1.0),
        (0.3, {}, {}, 0.0),
        (5.0, {}, {}, 1.0),
        (0.3, {}, {"k3_kl": 0.2}, 1.0),
        (float("nan"), {}, {}, 1.0),
        (None, {}, {}, None),
        (0.05, W4A16, {"sigma": 0.01}, 0.0),
        (0.5, W4A16, {"sigma": 0.01}, 1.0),
    ],
)
def test_alarm(distance, recipe, mismatch, alarm, capsys):
    assert watched(distance, recipe, **mismatch) == alarm
    assert ("[mxfp4] alarm: step 3" in capsys.readouterr().out) == (alarm == 1.0)


def test_plain_verl_has_no_mismatch_alarm():
    assert watched(5.0, enable=False) is None


def test_the_run_can_be_made_to_stop():
    with pytest.raises(RuntimeError, match="same recipe"):
        watched(0.5, W4A16, stop=True)


@pytest.mark.parametrize("mismatch", [{"k3_kl": -1}, {"k3_kl": True}, {"stop": 1}, {"k3": 1}])
def test_wrong_limits_are_refused(mismatch):
    with pytest.raises(RecipeError, match=r"mismatch|k3"):
        Settings.from_config({"mismatch": mismatch})


def test_metrics_of_syncs():
    assert sync_metrics([{"bytes": 5, "seconds": 0.5}]) == {"mxfp4_sync/bytes": 5, "mxfp4_sync/seconds": 0.5}
    two = [{"bytes": 5, "seconds": s, "packed_bytes": 27, "packed_elements": 50} for s in (0.5, 0.25)]
    assert sync_metrics(two) == {"mxfp4_sync/bytes": 10, "mxfp4_sync/seconds": 0.5, "mxfp4_sync/fraction_of_bf16": 0.27}
