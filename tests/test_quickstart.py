"""The quickstart learns: what a newcomer's first run promises, on the real model."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mxfp4_rl.monitor.report import quarter_means
from mxfp4_rl.monitor.run_log import RunLog


@pytest.mark.slow
def test_quickstart_raises_reward_and_validation(tmp_path):
    drop = ("RAY_ADDRESS", "WANDB_MODE", "WANDB_API_KEY", "TENSORBOARD_DIR", "WANDB_DIR")
    result = subprocess.run(
        [sys.executable, "-m", "mxfp4_rl.cli", "train", "--config-name", "quickstart", f"mxfp4.run_dir={tmp_path / 'run'}"],
        env={k: v for k, v in os.environ.items() if k not in drop},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = RunLog.load(tmp_path / "run")
    steps, reward = run.series("critic/score/mean")
    assert list(steps) == list(range(1, 21))
    first, last = quarter_means(reward)
    assert last - first >= 0.15
    (validation,) = [name for name in run.names() if name.startswith("val-core/")]
    accuracy = run.series(validation)[1]
    assert accuracy[-1] > accuracy[0]
    # A laptop's BF16 kernels round differently in rollout and update, and 4-bit codes amplify it: a step's KL is 0.1 to 0.3.
    # On this model a trainer in BF16 beside a rollout in MXFP4 reads 0.23 before any training, one without the corrections
    # 1.4. (Not the k3 estimate, the mean of a ratio: one token of 400 that the trainer finds 900 times likelier made it 2.7.)
    divergence = run.series("rollout_corr/kl")[1]
    assert np.median(divergence) < 0.2 and max(divergence) < 1.0
