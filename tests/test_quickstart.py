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
        [
            *(
                sys.executable,
                "-m",
                "mxfp4_rl.cli",
                "train",
                "--config-name",
                "quickstart",
                f"mxfp4.run_dir={tmp_path / 'run'}",
            ),
            "trainer.total_training_steps=10",  # of 20: no schedule depends on it, and it is the longest test there is
        ],
        env={k: v for k, v in os.environ.items() if k not in drop},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = RunLog.load(tmp_path / "run")
    steps, reward = run.series("critic/score/mean")
    assert list(steps) == list(range(1, 11))
    first, last = quarter_means(reward)
    assert last - first >= 0.15
    (validation,) = [name for name in run.names() if name.startswith("val-core/")]
    accuracy = run.series(validation)[1]
    assert accuracy[-1] > accuracy[0]
    # A CPU's BF16 kernels round rollout and update differently, and 4-bit codes amplify it: over 20 steps the median was 0.008,
    # the largest 0.022 (alpha 0.5 and noise: 0.12 and 0.27). Alpha 1 is so near to BF16 that a trainer left
    # unquantised has 0.012 in five steps: that operands are equal is tested bit for bit elsewhere (test_engine, test_packing).
    # (Not the k3 estimate, a mean of probability ratios: one token of 370, 900 times likelier in the update, once made it 2.7.)
    divergence = run.series("rollout_corr/kl")[1]
    assert abs(np.median(divergence)) < 0.05 and np.abs(divergence).max() < 0.5
