"""`mxfp4-rl decompose`: its numbers are the quantiser's, pooled as sums, and no mistake or interruption leaves a wrong file."""

import base64
import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mxfp4_rl import QuantRecipe, cli, quantize
from mxfp4_rl import decompose as split
from mxfp4_rl.analysis import command, measure, output
from mxfp4_rl.analysis.checkpoint import TensorInfo
from mxfp4_rl.analysis.measure import DeltaSums, Errors, Plan, measure_tensor
from mxfp4_rl.analysis.weights import LinearWeight
from mxfp4_rl.launch import LaunchError
from mxfp4_rl.quant import ErrorStats, error_stats, precision_sweep, scale_ratios

SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.up_proj": (200, 64), "mlp.down_proj": (64, 200)}
DEFAULTS = ["mxfp4", "mxfp4+mbs", "mxfp4+of", "mxfp4+mbs+of"]
FIGURES = ["figure1_components.png", "figure2_scale_precision.png", "figure3_scale_bias.png"]
EXACT = {"rel": 1e-9, "abs": 1e-15}  # files hold ten digits


def make_tensors(seed=0, layers=3, dtype=torch.bfloat16):
    """Weights whose energies differ by layer and type, so that a mean of ratios is not a ratio of sums."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(100, 64, generator=g).to(dtype), "model.norm.weight": torch.ones(64)}
    for layer in range(layers):
        for number, (name, shape) in enumerate(SHAPES.items()):
            power = 1 + 2 * (number == 0)  # heavy tails in q_proj
            weight = 0.02 * 3.0**layer * torch.randn(shape, generator=g) ** power
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.to(dtype)
    return tensors


def write_model(folder: Path, tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def linears(tensors):
    return {name.removesuffix(".weight"): t for name, t in tensors.items() if ".layers." in name}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.delenv("MXFP4_RL_DEBUG", raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One full run with figures: (tensors, directory, its JSON)."""
    root = tmp_path_factory.mktemp("full")
    tensors = make_tensors()
    model = write_model(root / "tiny", tensors)
    assert cli.main(["decompose", str(model), "--out", str(root / "out")]) == 0
    return tensors, root / "out", json.loads((root / "out" / "decompose.json").read_text())


def measured(*arguments, out="out"):
    """Run the command without figures; its exit code and its JSON."""
    code = cli.main(["decompose", *map(str, arguments), "--no-figures", "--out", out])
    return code, json.loads(Path(out, "decompose.json").read_text())


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_recipe(entry, stats):
    """One recipe's numbers in the JSON against an `ErrorStats`."""
    assert stats.energy > 0
    for name, value in stats.metrics().items():
        assert entry[name] == pytest.approx(value, **EXACT), name
    assert entry["shares"] == pytest.approx(stats.shares(), **EXACT)
    assert entry["partition"] == pytest.approx(stats.partition(), **EXACT)
    assert (entry["energy"], entry["error"]) == pytest.approx((stats.energy, stats.error), **EXACT)


# --- the numbers


def test_each_tensor_has_the_quantisers_own_numbers(run):
    tensors, _, data = run
    weights = linears(tensors)
    assert [t["name"] for t in data["tensors"]] and {t["name"] for t in data["tensors"]} == set(weights)
    assert list(data["recipes"]) == DEFAULTS and data["base"] == "mxfp4"
    for entry in data["tensors"]:
        x = weights[entry["name"]]
        assert entry["kind"] == entry["name"].rsplit(".", 1)[-1] and entry["elements"] == x.numel()
        for name in DEFAULTS:
            check_recipe(entry["recipes"][name], error_stats(x, QuantRecipe.parse(name)))
        sweep = precision_sweep(x)
        expected = [sweep[bits] / x.double().square().sum().item() for bits in (*range(9), None)]
        assert entry["scale_precision_rel_mse"] == pytest.approx(expected, rel=1e-7)  # energies of blocks are float32
        assert entry["scale_precision_rel_mse"][0] == pytest.approx(entry["recipes"]["mxfp4"]["rel_mse"], rel=1e-6)


def test_totals_are_ratios_of_sums(run):
    tensors, _, data = run
    weights = linears(tensors)
    for name in DEFAULTS:
        recipe = QuantRecipe.parse(name)
        check_recipe(data["total"]["recipes"][name], sum((error_stats(x, recipe) for x in weights.values()), ErrorStats()))
        for kind in ("q_proj", "down_proj"):
            pooled = sum((error_stats(x, recipe) for n, x in weights.items() if n.endswith(kind)), ErrorStats())
            check_recipe(data["types"][kind]["recipes"][name], pooled)
        layer = sum((error_stats(x, recipe) for n, x in weights.items() if ".layers.1." in n), ErrorStats())
        check_recipe(data["layers"]["1"]["recipes"][name], layer)
    ratios = [t["recipes"]["mxfp4"]["rel_mse"] for t in data["tensors"]]
    assert abs(np.mean(ratios) / data["total"]["recipes"]["mxfp4"]["rel_mse"] - 1) > 0.02  # the data tells the two apart
    assert data["total"]["tensors"] == 12 and data["total"]["elements"] == sum(x.numel() for x in weights.values())


def test_delta_histogram_and_moments_are_those_of_every_block(run):
    tensors, _, data = run
    delta = torch.cat([scale_ratios(x, QuantRecipe()) for x in linears(tensors).values()]).double()
    histogram, moments = data["delta_histogram"], data["total"]["delta"]
    assert sum(histogram["counts"]) == moments["blocks"] == delta.numel()
    edges = histogram["low"] + histogram["bin_width"] * np.arange(len(histogram["counts"]) + 1)
    assert histogram["counts"] == np.histogram(delta.numpy(), edges)[0].tolist()
    assert moments["mean"] == pytest.approx(delta.mean().item())
    assert moments["std"] == pytest.approx(delta.std(correction=0).item())
    assert moments["mean_ratio"] == pytest.approx(torch.exp2(delta).mean().item())
    by_layer = [data["layers"][index]["delta"]["blocks"] for index in ("0", "1", "2")]
    assert sum(by_layer) == delta.numel()


def test_outliers_of_delta_are_counted_in_the_bins_at_the_ends():
    sums = DeltaSums.of(torch.tensor([-9.0, -0.5, 0.0, 0.999, 7.0]))
    assert (sums.counts[0], sums.counts[-1], sums.counts.sum(), sums.blocks) == (1, 1, 5, 5)
    assert (DeltaSums() + sums).mean == pytest.approx(-0.3002)


def test_fallback_takes_its_part_off_the_deadzone(run):
    base, of = (run[2]["total"]["recipes"][name] for name in ("mxfp4", "mxfp4+of"))
    assert base["final_deadzone"] == pytest.approx(base["deadzone"]) and of["deadzone"] == pytest.approx(base["deadzone"])
    assert of["final_deadzone"] == pytest.approx(0.25 * base["deadzone"], rel=0.1)
    assert of["final_zero_fraction"] < 0.4 * base["final_zero_fraction"]


# --- streaming


def weight_of(x, axis=-1):
    return LinearWeight(TensorInfo("w.weight", tuple(x.shape), "F32", Path("w.safetensors")), "w", "w", 0, axis)


def numbers(errors: Errors):
    sums = {(name, field): value for name, stats in errors.stats.items() for field, value in vars(stats).items()}
    sums |= {("sweep", bits): energy for bits, energy in errors.sweep.items()}
    return sums | {"elements": errors.elements, "delta": errors.delta.total, "blocks": errors.delta.blocks}


RECIPES = ["mxfp4", "mxfp4+mbs-dynamic+of", "mxfp4+of+top5%", "mxfp4+tile", "mxfp4+sr", "nvfp4", "nvfp4+search"]


@pytest.mark.parametrize("base", ["mxfp4", "nvfp4"])
def test_chunks_give_the_numbers_of_the_whole(monkeypatch, base):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 300)[:, None]
    plan = Plan({name: QuantRecipe.parse(name) for name in dict.fromkeys([base, *RECIPES])})
    whole = measure_tensor(x, weight_of(x), plan)
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", 64 * 200)
    done = []
    chunked = measure_tensor(x, weight_of(x), plan, done.append)
    assert len(done) > 4 and sum(done) == x.numel()
    assert numbers(chunked.errors) == pytest.approx(numbers(whole.errors), rel=1e-9)
    assert chunked.errors.delta.counts.tolist() == whole.errors.delta.counts.tolist()
    for name, recipe in plan.recipes.items():
        assert vars(whole.errors.stats[name]) == pytest.approx(vars(error_stats(x.bfloat16(), recipe, seed=0)), rel=1e-9)


def test_any_axis_and_fused_experts_are_the_same_matrices():
    plan = Plan({name: QuantRecipe.parse(name) for name in ("mxfp4+mbs", "nvfp4")})
    experts = torch.randn(3, 96, 160, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    apart = [measure_tensor(x, weight_of(x), plan).errors for x in experts]
    summed = Errors()
    for errors in apart:
        summed.add(errors)
    for fused, axis in ((experts, -1), (experts, 2), (experts.transpose(1, 2).contiguous(), 1)):
        assert numbers(measure_tensor(fused, weight_of(fused, axis), plan).errors) == pytest.approx(numbers(summed), rel=1e-9)
    conv1d = experts[0].T.contiguous()
    assert numbers(measure_tensor(conv1d, weight_of(conv1d, 0), plan).errors) == pytest.approx(numbers(apart[0]), rel=1e-9)


def test_rows_measures_evenly_spaced_rows_of_all_matrices_and_still_finds_every_nan():
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0))
    plan = Plan({"mxfp4": QuantRecipe()}, rows=5)
    done = []
    result = measure_tensor(x, weight_of(x), plan, done.append)
    picked = x.flatten(0, 1)[torch.linspace(0, 199, 5).round().long()]
    assert result.errors.elements == 5 * 64 and sum(done) == x.numel()
    assert result.errors.stats["mxfp4"].error == pytest.approx(error_stats(picked.bfloat16()).error, rel=1e-9)
    x[2, 7, 3] = float("nan")
    result = measure_tensor(x, weight_of(x), plan)
    assert result.broken and result.nan == 1 and result.errors.elements == 0
    tiles = Plan({"mxfp4+tile": QuantRecipe(tile=True)}, rows=40)
    y = torch.randn(320, 64, generator=torch.Generator().manual_seed(0))
    assert measure_tensor(y, weight_of(y), tiles).errors.elements == 32 * 64  # whole tiles only


def test_a_value_that_bf16_cannot_hold_is_reported():
    x = torch.ones(32, 64)
    x[0, 0] = 3.4e38  # finite in float32, infinite in BF16
    assert measure_tensor(x, weight_of(x), Plan({"mxfp4": QuantRecipe()})).inf == 1
    assert not measure_tensor(x, weight_of(x), Plan({"mxfp4": QuantRecipe()}, dtype=torch.float32)).broken


@pytest.mark.parametrize("value", [6.0, 65504.0])
def test_a_model_without_any_error_is_drawn_too(tmp_path, value):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.full((64, 64), value)}
    code, data = measured(write_model(tmp_path / "m", tensors), "--dtype", "float32")
    assert code == 0 and data["total"]["recipes"]["mxfp4"]["rel_mse"] in (0.0, pytest.approx(2.4e-7, rel=0.1))


def test_a_weight_of_zeros_is_named_and_kept_out_of_the_totals(tmp_path, capsys):
    tensors = make_tensors(layers=2)
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    code, data = measured(write_model(tmp_path / "m", tensors))
    assert code == 0 and data["broken"] == ["model.layers.1.self_attn.v_proj"]
    assert re.search(r"layers\.1\.self_attn\.v_proj\s+\S+\s+0\s+0\s+yes\s+NOT in the totals", capsys.readouterr().out)
    sound = sum((error_stats(x) for n, x in linears(tensors).items() if n not in data["broken"]), ErrorStats())
    check_recipe(data["total"]["recipes"]["mxfp4"], sound)


def test_a_recipe_named_twice_is_refused():
    with pytest.raises(LaunchError, match=r"'mxfp4' and 'MXFP4\+rceil'"):
        command.parse_recipes("mxfp4,nvfp4,MXFP4+rceil")


def test_finite_values_whose_squares_overflow_are_measured(tmp_path):
    tensors = make_tensors(layers=2)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2.0**100
    code, data = measured(write_model(tmp_path / "m", tensors))
    assert code == 0 and data["broken"] == []
    scaled = next(t for t in data["tensors"] if t["name"] == "model.layers.0.mlp.up_proj")["recipes"]["mxfp4"]["rel_mse"]
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2.0**-100
    _, data = measured(write_model(tmp_path / "n", tensors))
    plain = next(t for t in data["tensors"] if t["name"] == "model.layers.0.mlp.up_proj")["recipes"]["mxfp4"]["rel_mse"]
    assert scaled == pytest.approx(plain, rel=1e-4)


# --- NaN


def test_nan_is_a_named_row_and_in_no_total(tmp_path, capsys):
    tensors = make_tensors()
    healthy = {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name}
    tensors["model.layers.1.mlp.up_proj.weight"][7, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    code, data = measured(write_model(tmp_path / "nan", tensors))
    shown = capsys.readouterr().out
    assert code == 0
    row = next(line for line in shown.splitlines() if line.startswith(" model.layers.1.mlp.up_proj"))
    assert re.search(r"200x64 +1 +2 +NOT in the totals", row)
    assert data["broken"] == ["model.layers.1.mlp.up_proj"]
    entry = next(t for t in data["tensors"] if t["name"] == "model.layers.1.mlp.up_proj")
    assert (entry["nan"], entry["inf"]) == (1, 2) and "recipes" not in entry
    _, without = measured(write_model(tmp_path / "healthy", healthy), out="healthy_out")
    assert data["total"] == without["total"] and data["types"] == without["types"] and data["layers"] == without["layers"]
    rows = read_csv(Path("out/layers.csv"))
    broken = [row for row in rows if row["name"] == "model.layers.1.mlp.up_proj"]
    assert len(broken) == 1 and broken[0]["nan"] == "1" and broken[0]["inf"] == "2" and broken[0]["rel_mse"] == ""
    assert "model.layers.1.mlp.up_proj" in Path("out/report.html").read_text()


def test_a_model_with_nothing_but_nan_gives_the_rows_and_fails(tmp_path, capsys):
    tensors = {name: torch.full_like(t, float("nan")) for name, t in make_tensors(layers=1).items()}
    assert cli.main(["decompose", str(write_model(tmp_path / "nan", tensors)), "--out", "out"]) == 1
    shown = capsys.readouterr()
    assert "every weight holds NaN" in shown.err
    assert all(name in shown.out for name in linears(tensors))
    assert not list(Path("out").glob("*.png")) and "Not drawn" in Path("out/report.html").read_text()
    assert json.loads(Path("out/decompose.json").read_text())["total"]["elements"] == 0


def test_a_model_of_zeros_is_named_weight_by_weight(tmp_path, capsys):
    tensors = {name: torch.zeros_like(t) for name, t in make_tensors(layers=1).items()}
    code, data = measured(write_model(tmp_path / "zeros", tensors))
    shown = capsys.readouterr()
    assert code == 1 and "nothing but zeros" in shown.err and all(name in shown.out for name in linears(tensors))
    assert data["total"]["elements"] == 0 and all(t["all_zero"] for t in data["tensors"])


# --- what is shown and written


def test_csv_says_what_the_json_says(run):
    _, out, data = run
    rows = read_csv(out / "layers.csv")
    assert len(rows) == len(data["tensors"]) * len(DEFAULTS)
    tensors = {t["name"]: t for t in data["tensors"]}
    for row in rows:
        numbers = tensors[row["name"]]["recipes"][row["recipe"]]
        assert row["shape"] == "x".join(map(str, tensors[row["name"]]["shape"]))
        for key, value in numbers.items():
            if isinstance(value, dict):
                assert {k: float(row[f"{key}_{k}"]) for k in value} == value
            else:
                assert float(row[key]) == value
        assert float(row["bits_per_element"]) == data["recipes"][row["recipe"]]["bits_per_element"]


def test_page_is_self_contained_and_holds_every_figure_and_table(run):
    _, out, data = run
    page = (out / "report.html").read_text()
    assert sorted(p.name for p in out.iterdir()) == sorted(["decompose.json", "layers.csv", "report.html", *FIGURES])
    images = [base64.b64decode(image) for image in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert images == [(out / name).read_bytes() for name in FIGURES]
    assert all(image.startswith(b"\x89PNG") and len(image) > 10_000 for image in images)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in ("Recipes", "What mxfp4 does, by layer type", "What each correction changes", "hurts most", "whole model"):
        assert text in page
    assert f"{data['total']['recipes']['mxfp4+of']['rel_mse']:#.4g}" in page


def test_terminal_tables_fit_and_hold_the_totals(run, capsys, tmp_path):
    tensors, _, data = run
    assert cli.main(["decompose", str(write_model(tmp_path / "m", tensors)), "--no-figures", "--out", "out"]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 118
    total = data["total"]["recipes"]["mxfp4"]
    row = next(line for line in shown.out.splitlines() if line.startswith(" whole model"))
    wanted = [total["shares"][part] for part in ("scale_bias", "deadzone", "grid_noise")]
    assert [float(value) for value in row.split()[5:8]] == pytest.approx(wanted, abs=6e-4)
    mbs = data["total"]["recipes"]["mxfp4+mbs"]["scale_bias"] / total["scale_bias"] - 1
    assert f"{100 * mbs:+.1f}%" in shown.out
    worst = max(data["tensors"], key=lambda t: t["recipes"]["mxfp4"]["rel_mse"])["name"]
    assert shown.out.split("hurts most")[1].splitlines()[4].split()[0] == worst
    assert "1 embedding" in shown.out and "4.3125" in shown.out


def test_json_goes_to_stdout_alone(tmp_path, capsys):
    model = write_model(tmp_path / "m", make_tensors(layers=1))
    assert cli.main(["decompose", str(model), "--no-figures", "--json", "--out", "out"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("out/decompose.json").read_text())


def test_compare_replaces_the_recipes(tmp_path, capsys):
    tensors = make_tensors()
    code, data = measured(write_model(tmp_path / "m", tensors), "--compare", "mxfp4+floor,nvfp4+four-over-six,mxfp4")
    shown = capsys.readouterr().out
    assert code == 0 and list(data["recipes"]) == ["mxfp4+floor", "nvfp4+four-over-six", "mxfp4"]
    assert data["base"] == "mxfp4+floor" and data["recipes"]["nvfp4+four-over-six"]["bits_per_element"] == 4.5
    for name in data["recipes"]:
        stats = sum((error_stats(x, QuantRecipe.parse(name)) for x in linears(tensors).values()), ErrorStats())
        check_recipe(data["total"]["recipes"][name], stats)
    assert "What became of the elements" in shown and "AQN" not in Path("out/report.html").read_text()
    clipped = data["total"]["recipes"]["mxfp4+floor"]["partition"]["clipping"]
    assert clipped > 0.05 and f"{clipped:.3f}" in shown


def test_layers_dtype_and_rows(tmp_path):
    tensors = make_tensors(dtype=torch.float32)
    model = write_model(tmp_path / "m", tensors)
    _, data = measured(model, "--layers", r"layers\.1\.|down_proj", "--dtype", "float32")
    names = {t["name"] for t in data["tensors"]}
    assert names == {n for n in linears(tensors) if ".1." in n or "down_proj" in n}
    assert sum("--layers" in reason for reason in data["left_out"].values()) == 12 - len(names)
    for entry in data["tensors"]:
        check_recipe(entry["recipes"]["mxfp4"], error_stats(linears(tensors)[entry["name"]]))
    _, sampled = measured(model, "--rows", "8", out="sampled")
    assert all(t["elements"] == 8 * t["shape"][-1] for t in sampled["tensors"]) and sampled["options"]["rows"] == 8
    assert "at most 8 evenly spaced rows" in Path("sampled/report.html").read_text()


def test_gguf_is_measured_after_dequantising(tmp_path):
    gguf = pytest.importorskip("gguf")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    quantised = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, data = measured("m.gguf")
    assert code == 0 and "Q8_0" in data["note"] and "Q8_0" in Path("out/report.html").read_text()
    values = torch.from_numpy(gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0).astype(np.float32))
    assert data["tensors"][0]["name"] == "model.layers.0.self_attn.q_proj"
    check_recipe(data["total"]["recipes"]["mxfp4"], error_stats(values.bfloat16()))


def test_the_default_directory_has_the_models_name(tmp_path, capsys):
    model = write_model(tmp_path / "some.model", make_tensors(layers=1))
    assert cli.main(["decompose", str(model), "--no-figures"]) == 0
    assert "runs/decompose/some.model" in capsys.readouterr().out
    assert (tmp_path / "runs/decompose/some.model/decompose.json").is_file()
    assert command.folder_name("org/name-1.5") == "org--name-1.5"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "mxfp5"], "mxfp5"),
        (["--compare", "mxfp4+msb"], "msb"),
        (["--compare", "mxfp4,,nvfp4"], "empty name"),
        (["--compare", ""], "empty name"),
        (["--rows", "0"], "--rows 0"),
        (["--layers", "("], "not a regular expression"),
        (["--layers", "nothing_like_it"], "matches none of the 4"),
        (["--revision", "main"], "is a local path"),
        (["--out", "file/below"], "is a file"),
        (["another"], "unexpected argument another; see mxfp4-rl decompose --help"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, capsys, arguments, said):
    model = write_model(tmp_path / "m", make_tensors(layers=1))
    (tmp_path / "file").write_text("")
    assert cli.main(["decompose", str(model), *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.startswith("mxfp4-rl: ") and "Traceback" not in shown.err and shown.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m"]


def test_checkpoints_that_cannot_be_read(tmp_path, capsys):
    whole = write_model(tmp_path / "whole", make_tensors(layers=1)) / "model.safetensors"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "garbage.safetensors").write_bytes(b"\x10" * 1000)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = sorted(p.name for p in tmp_path.iterdir())
    for model in ("empty", "cut.safetensors", "garbage.safetensors", "cut.gguf", "nowhere/at/all"):
        assert cli.main(["decompose", model, "--out", "out"]) == 2
        error = capsys.readouterr().err
        assert model in error and error.count("\n") == 1, error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["decompose", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("four-over-six", "mbs32-dynamic", "smollm2-135m-instruct", "--rows"))


def test_every_recipe_word_of_the_help_is_one():
    words = re.search(r"  mxfp4 .*?\nthe first one", command.EPILOG, re.S)[0]
    mx, nv = words.split("  nvfp4")
    found = re.findall(r"(?<![\w.-])(rceil|floor|ceil|even|oas|search|c7\.25|mbs[\d\w-]*|of[\d.]*|prescale|tile)(?=[,;\s])", mx)
    assert len(found) >= 15
    for word in {w.rstrip(".") for w in found} - {"of"}:
        QuantRecipe.parse(f"mxfp4+{word}")
    for word in re.findall(r"static4?|four-over-six|search|soar", nv):
        QuantRecipe.parse(f"nvfp4+{word}")
    with pytest.raises(LaunchError, match="none of"):
        command.parse_recipes("mxfp4+nothing")


# --- interruption


def test_interrupted_measurement_leaves_nothing(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "m", make_tensors())
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return error_stats(*args, **kwargs)

    monkeypatch.setattr(measure, "error_stats", interrupted)
    assert cli.main(["decompose", str(model)]) == 130
    assert len(calls) == 5 and "interrupted" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_ctrl_c(tmp_path):
    weight = torch.randn(8192, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    large = {"model.layers.0.mlp.up_proj.weight": weight}
    model = write_model(tmp_path / "m", large)
    arguments = [sys.executable, "-m", "mxfp4_rl.cli", "decompose", str(model), "--out", str(tmp_path / "out")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert "Linear weights: 1" in process.stderr.readline()  # measuring has begun, and takes seconds
        process.send_signal(signal.SIGINT)
        shown, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "interrupted\n" and shown == ""
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("moment", range(4))
def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch, moment):
    files = {"a": b"new a", "b": b"new b", "c": b"new c"}
    writes = iter(range(10))
    write_bytes = Path.write_bytes

    def write(path, content):
        if next(writes) == moment:
            write_bytes(path, content[:2])
            raise KeyboardInterrupt
        return write_bytes(path, content)

    def rename(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(output.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        output.write_files(files, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_interrupted_replacing_ends_with_all_of_the_new(tmp_path, monkeypatch):
    out = tmp_path / "out"
    output.write_files({"a": b"old a", "b": b"old b"}, out)
    replace, calls = output.os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        replace(*paths)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.write_files({"a": b"new a", "b": b"new b"}, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"a": b"new a", "b": b"new b"}


def test_a_directory_keeps_its_other_files_and_loses_stale_figures(tmp_path):
    model = write_model(tmp_path / "m", make_tensors(layers=1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert cli.main(["decompose", str(model), "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"notes.txt", "decompose.json", "layers.csv", "report.html", *FIGURES}
    assert cli.main(["decompose", str(model), "--out", str(out), "--no-figures"]) == 0
    assert {p.name for p in out.iterdir()} == {"notes.txt", "decompose.json", "layers.csv", "report.html"}
    assert "--no-figures" in (out / "report.html").read_text()


def test_the_function_keeps_its_name():
    """The package is called as the function that it measures with."""
    x = torch.randn(4, 64)
    assert torch.equal(split(x).total(), quantize(x).dequantize().double() - x.double())
