"""The benchmark runs from end to end, on tiny shapes: every section, every variant, every file it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.common import GPU  # isort: skip  (skips this file where kernels cannot run)

ROOT = Path(__file__).parents[2]


def test_every_section_ends_in_tables_json_and_a_roofline(tmp_path):
    command = [sys.executable, ROOT / "kernels" / "benchmarks" / "gpu.py", "--tiny", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"date", "device", "torch", "triton", "python"} <= results.keys()
    failed = {row["variant"] for row in results["rows"] if "error" in row}
    # What only a GPU can multiply; everything else ran.
    assert failed <= (set() if GPU else {"W4A4, fast", "W4A4, torch._scaled_grouped_mm"}), failed
    sections = {row["section"] for row in results["rows"]}
    for beginning in (
        "Bandwidth",
        "Forward product",
        "Forward with",
        "Step of a layer",
        "Decode",
        "Grouped forward",
        "Grouped wgrad",
    ):
        assert any(section.startswith(beginning) for section in sections), beginning
    tables = (tmp_path / "results.md").read_text()
    assert all(section in tables for section in sections) and results["device"] in tables
    assert (tmp_path / "roofline.png").stat().st_size > 20_000
