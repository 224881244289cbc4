"""The benchmark: what it writes of made-up rows, what a failure leaves, and all of it from end to end on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.common import GPU  # isort: skip  (skips this file where kernels cannot run)

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
MODULES = ("attention", "decode", "dense", "experts", "gpu", "marlin", "quantize", "report", "shapes", "tensors", "timing")
ABOUT = {"date": "2026-01-02", "device": "NVIDIA H100 80GB HBM3", "torch": "2.9.0", "triton": "3.5.0", "python": "3.12.3"}


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, beside its siblings; their short names are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu

    yield gpu
    for name in MODULES:
        sys.modules.pop(name, None)


def rows_of(Row):
    return [
        Row("Forward product", "qkv", "BF16", 2.0, None, 2e12, 1e9, kind="dense"),
        Row("Forward product", "qkv", "W4A4", 1.25, 1.6, 2e12, 5e8, kind="dense"),
        Row("Forward product", "qkv", "W8A8", error="RuntimeError: no | such\n kernel", kind="dense"),
        Row("Forward product", "o", "W4A4", 1.0, 2.0, 2e12, 5e8, kind="dense"),
        Row("Forward with quantisation", "qkv", "W4A4", 1.5, 1.33, 2e12, 6e8),
        Row("Decode", "1 row", "W4A4", 0.01, 3.0, 1e8, 1e7, kind="decode"),
        Row("Decode", "1 row", "W4A4, time", 0.01),
        Row("Decode", "1 row", "BF16", 0.04, None, 1e8, 4e7, kind="decode"),
        Row("Step of a layer", "qkv", "mx", 3.0, 1.1, 6e12),
        Row("Bandwidth, of a copy", "copy", "TB/s", 1.0, None, 0, 2.9e9),
        Row("Bandwidth, of a copy", "codes", "mxfp4", 1.0, 0.64, 0, 2e9),
    ]


def test_tables_of_ratios_rates_times_shares_and_failures(gpu):
    tables = gpu.report.tables(rows_of(gpu.Row))
    for line in (
        "| | BF16 | W4A4 | W8A8 |",
        "| qkv | 1000 TFLOP/s | 1.60x | failed |",
        "| o |  | 2.00x |  |",
        "* qkv, W8A8: RuntimeError: no / such kernel",
        "| 1 row | 3.00x | 10.0 us | 2.5 TFLOP/s |",
        "| qkv | 1.10x |",
        "| copy | 2.90 TB/s |  |",
        "| codes |  | 64% |",
    ):
        assert line in tables.splitlines(), line
    assert gpu.Row("", "", "", error="x" * 1000).error == "x" * 200


def test_the_roofline_shows_products_alone(gpu):
    pytest.importorskip("matplotlib")
    (axes,) = gpu.report.roofline(rows_of(gpu.Row), ABOUT).axes
    points = {series.get_label(): series.get_offsets().tolist() for series in axes.collections}
    assert points == {
        "BF16, dense": [[2000.0, 1000.0]],
        "W4A4, dense": [[4000.0, 1600.0], [4000.0, 2000.0]],
        "W4A4, decode": [[10.0, 10.0]],
        "BF16, decode": [[2.5, 2.5]],
    }
    assert len(axes.lines) == len(gpu.report.PEAKS)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["BF16", "W4A4", "dense", "decode"]
    colours = {series.get_label(): tuple(series.get_facecolor()[0]) for series in axes.collections}
    assert colours["W4A4, dense"] == colours["W4A4, decode"] != colours["BF16, dense"] == colours["BF16, decode"]


def test_roofs_are_an_h100s_and_colours_never_repeat(gpu):
    pytest.importorskip("matplotlib")
    rows = [gpu.Row("", "", f"variant {i}", 1.0, None, 1e9, 1e9, kind="grouped") for i in range(50)]
    (axes,) = gpu.report.roofline(rows, {**ABOUT, "device": "NVIDIA L4"}).axes
    assert not axes.lines and "without roofs" in axes.get_title()
    assert len({tuple(series.get_facecolor()[0]) for series in axes.collections}) == 50
    (axes,) = gpu.report.roofline([], ABOUT).axes
    assert not axes.collections


def test_inputs_are_larger_than_the_cache_and_taken_equally_often(gpu, monkeypatch):
    timing = gpu.timing
    assert timing._whole_turns(6, [()] * 4) == 8 and timing._whole_turns(6, [()] * 3) == 6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size in (2048 * 2048 * 0.53, 4096 * 4097, 119e6, 120e6):
        assert timing.copies(size) * size > 120e6
    assert timing.copies(1e9) == 3 and timing.copies(1.0) == timing.MOST_COPIES
    assert timing.copies(12e6, 1e9) == 8  # gigabytes
    monkeypatch.setattr(timing, "WARM_ONLY", True)
    assert timing.copies(1e6) == 1


def test_marlin_takes_part_where_vllm_is_and_has_a_tiling(gpu, monkeypatch):
    marlin = gpu.decode.marlin
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, expected in ((True, [True, False, False]), (None, [False] * 3)):
        monkeypatch.setattr(marlin.importlib.util, "find_spec", lambda name, found=found: found)
        assert [marlin.available(*shape) for shape in ((64, 128), (48, 64), (64, 80))] == expected


def run(gpu, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", *map(str, options)])
    gpu.main()


def test_a_failing_variant_and_a_failing_section_leave_the_others(gpu, monkeypatch, tmp_path):
    def broken(*arguments):
        raise ValueError("does not\nrun here")

    def ends_early():
        yield gpu.Row("Before", "case", "variant", 1.0)
        raise MemoryError("out of it")

    dense = gpu.dense
    monkeypatch.setattr(dense, "PRODUCTS", {"W4A4": (broken, broken, broken), "W8A8": dense.PRODUCTS["W8A8"]})
    sections = {**gpu.sections(True), "steps": ends_early}
    monkeypatch.setattr(gpu, "sections", lambda tiny: sections)
    run(gpu, monkeypatch, "--only", "products", "steps", "tensors", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    errors = {(row["section"], row["variant"]): row["error"] for row in rows if "error" in row}
    assert errors == {
        ("Forward product, against BF16", "W4A4"): "ValueError: does not run here",
        ("Forward with the activation's quantisation, against BF16", "W4A4"): "ValueError: does not run here",
        ("Section steps", "the rest"): "MemoryError: out of it",
    }
    numbers = {(row["section"].split(",")[0], row["variant"]) for row in rows if row.get("ms")}
    assert {("Forward product", "BF16"), ("Forward product", "W8A8"), ("Before", "variant"), ("Bandwidth", "mxfp4")} <= numbers
    tables = (tmp_path / "results.md").read_text()
    assert "* ended early, the rest: MemoryError: out of it" in tables and "not measurements" in tables.splitlines()[0]


def test_without_bf16_there_is_no_ratio(gpu, monkeypatch):
    def only_packed(section, case, variant, ms, rival=None, *rest, **others):
        return measured(section, case, variant, (lambda: 1 / 0) if variant == "BF16" else ms, rival, *rest, **others)

    measured = gpu.report.measured
    for module in (gpu.dense, gpu.decode, gpu.attention, gpu.experts):
        monkeypatch.setattr(module, "measured", only_packed)
    for section in ("products", "steps", "decode", "attention", "experts"):
        rows = list(gpu.sections(True)[section]())
        assert any(row.ms for row in rows) and not any(row.ratio for row in rows)
        assert all(row.error.startswith("ZeroDivisionError") for row in rows if row.variant == "BF16")


def test_warming_up_prints_and_writes_nothing_but_errors(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run(gpu, monkeypatch, "--warm", "--only", "decode")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    monkeypatch.setattr(gpu, "sections", lambda tiny: {"decode": lambda: 1 / 0})
    run(gpu, monkeypatch, "--warm", "--only", "decode")
    assert capsys.readouterr().out.splitlines() == [
        "Section decode | ended early | the rest | ZeroDivisionError: division by zero"
    ]


@pytest.mark.parametrize(
    "options, interpreted, message",
    [
        (["--tiny", "--warm", "--out", "folder"], True, "--out"),
        pytest.param(["--tiny"], False, "TRITON_INTERPRET=1", marks=pytest.mark.skipif(GPU, reason="a GPU needs neither")),
        pytest.param([], True, "--tiny", marks=pytest.mark.skipif(GPU, reason="a GPU needs neither")),
    ],
)
def test_what_cannot_work_is_refused(options, interpreted, message):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "TRITON_INTERPRET": "1"}
    if not interpreted:
        del environment["TRITON_INTERPRET"]
    command = [sys.executable, BENCHMARKS / "gpu.py", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_every_section_ends_in_tables_json_and_a_roofline(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--out", tmp_path]
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
        "Decode, ",
        "Decode attention",
        "Grouped forward",
        "Grouped wgrad",
    ):
        assert any(section.startswith(beginning) for section in sections), beginning
    assert {row["kind"] for row in results["rows"] if "kind" in row} == {"dense", "decode", "grouped"}
    tables = (tmp_path / "results.md").read_text()
    assert all(section in tables for section in sections) and results["device"] in tables
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
