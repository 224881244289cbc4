"""Each expert's own error: measured all at once as one by one, logged as few numbers, kept as a table, drawn."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.monitor import experts as table
from mxfp4_rl.monitor import panels
from mxfp4_rl.monitor.components import collect_errors, error_metrics, pool, start_measuring
from mxfp4_rl.monitor.plots import draw_experts
from mxfp4_rl.monitor.report import write_report
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.nn import by_group
from mxfp4_rl.quant import error_stats
from tests.test_experts import FAMILIES, routed, swapped

PARTS = by_group.COMPONENTS


@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs+of", "mxfp4+mbs32+of1", "mxfp4+sr", "nvfp4", "mxfp4+of+top10%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_at_once_are_each_group_by_itself(words, dtype):
    recipe, bounds = QuantRecipe.parse(words), [0, 7, 7, 8, 40]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(44, 96, generator=generator) * torch.rand(44, 1, generator=generator)).to(dtype)
    row, group = by_group.rows_of_groups(torch.tensor(bounds, dtype=torch.int32), len(x), None)
    parts = by_group.components_of(by_group.energies_by_group(x[row], recipe, group, 4))
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        expected = error_stats(x[first:last], recipe, seed=0).metrics()
        for part in PARTS:
            if first == last:
                assert parts[part][e].isnan()
            elif words != "mxfp4+sr":  # whose draws are numbered by the row
                assert parts[part][e].item() == pytest.approx(expected[part], rel=1e-5, abs=1e-12), (part, e)


def test_broken_blocks_are_in_no_sum():
    x = torch.randn(4, 64)
    clean = by_group.energies_by_group(torch.cat((x[:, :32], torch.zeros(4, 32)), 1), QuantRecipe(), torch.zeros(4).long(), 1)
    x[:, 40] = torch.nan
    broken = by_group.energies_by_group(x, QuantRecipe(), torch.zeros(4).long(), 1)
    torch.testing.assert_close(broken, clean)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_sample_has_rows_of_its_own_group_only(most):
    bounds = torch.tensor([0, 2, 2, 12, 17], dtype=torch.int32)
    row, group = by_group.rows_of_groups(bounds, 20, most)
    for e, (first, last) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        own = row[group == e].tolist()
        assert len(own) == len(set(own)) == min(most, last - first) and all(first <= r < last for r in own)
    assert by_group.rows_of_groups(torch.zeros(3, dtype=torch.int32), 0, most)[0].numel() == 0


def measured(words="mxfp4", family="GptOss", index=((3, 0),) * 6, max_rows=None):
    recipe = QuantRecipe.parse(words)
    experts, (x, _, weights) = swapped(family, ModelRecipe(weight=recipe, activation=recipe)), routed(len(index))
    start_measuring(model := nn.ModuleDict({"experts": experts}), max_rows)
    experts(x, torch.tensor(index), weights).sum().backward()
    return experts, x, collect_errors(model, max_rows, torch.float32)


@pytest.mark.parametrize("family", FAMILIES[::3])
@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs+of", "nvfp4"])
def test_every_expert_has_the_error_of_its_matrix_and_of_its_tokens(family, words):
    recipe = QuantRecipe.parse(words)
    experts, x, errors = measured(words, family, ((3, 0), (3, 1), (0, 3)))
    sums = errors["experts.gate_up_proj"] if "experts.gate_up_proj" in errors else errors["layer.experts.gate_up_proj"]
    weights = by_group.components_of(sums["experts/weight"])
    activations = by_group.components_of(sums["experts/activation"])
    projection = experts.projections["gate_up_proj"]
    for e, tokens in enumerate(([0, 2], [1], [], [0, 1, 2], [])):
        matrix = projection._outputs_first(projection.weight.detach())[e]
        assert weights["rel_mse"][e].item() == pytest.approx(error_stats(matrix, recipe).metrics()["rel_mse"], rel=1e-5)
        if tokens:
            expected = error_stats(x.detach()[tokens], recipe).metrics()
            for part in PARTS:
                assert activations[part][e].item() == pytest.approx(expected[part], rel=1e-5, abs=1e-12)
        else:
            assert activations["rel_mse"][e].isnan()


def test_experts_without_tokens_are_in_no_mean():
    _, _, errors = measured()
    name = next(n for n in errors if n.endswith("gate_up_proj"))
    own = by_group.components_of(errors[name]["experts/weight"])["rel_mse"]
    down = by_group.components_of(errors[name.replace("gate_up", "down")]["experts/weight"])["rel_mse"]
    with_tokens = torch.cat((own[[0, 3]], down[[0, 3]]))
    metrics = error_metrics(pool([errors, errors]))
    assert metrics["mxfp4_experts/rel_mse_min"] == pytest.approx(with_tokens.min().item())
    assert metrics["mxfp4_experts/rel_mse_mean"] == pytest.approx(with_tokens.mean().item())
    assert metrics["mxfp4_experts/rel_mse_max"] == pytest.approx(with_tokens.max().item())
    assert metrics["mxfp4_experts/without_tokens"] == 6  # three in each of two projections
    assert metrics["mxfp4_experts/imbalance_max"] == pytest.approx(6 / (12 / 5))
    assert all(np.isfinite(v) for v in metrics.values())
    assert sum(name.startswith("mxfp4_experts/") for name in metrics) == 3 + 2 * 5 * 3  # whatever the number of experts


def test_a_step_without_any_tokens_divides_by_nothing():
    _, _, errors = measured(index=((5, 5),) * 3)  # 5 stands for none
    metrics = error_metrics(errors)
    assert metrics["mxfp4_experts/imbalance_max"] == 0 and "mxfp4_experts/rel_mse_mean" not in metrics
    assert all(np.isfinite(v) for v in metrics.values())


def test_every_metric_has_a_panel():
    names = [name.replace("layer.", "model.layers.0.mlp.") for name in error_metrics(measured()[2])]
    names = [name for name in names if name.startswith(("mxfp4_experts/", "mxfp4_layers/"))]
    names += ["mxfp4/router_agreement", "mxfp4/router_overlap"]
    drawn = [name for section in panels.sections(names) for panel in section.panels for name in panel.metrics(names)]
    assert sorted(drawn) == sorted(names)


def test_the_table_is_written_read_drawn_and_cut(tmp_path):
    _, _, errors = measured()
    errors = {f"model.layers.{n}.mlp.{name.removeprefix('layer.')}": sums for n in (0, 1) for name, sums in errors.items()}
    for step in (1, 3, 5):
        table.write_table(tmp_path, step, errors)
    with (tmp_path / table.EXPERTS_FILE).open("a") as out:
        out.write('{"step": 7, "layers": {"mod')
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 5, "data": error_metrics(errors)}) + "\n")
    found = table.read_table(tmp_path)
    assert found.step == 5 and found.tokens.tolist() == [[6, 0, 0, 6, 0]] * 2
    assert found.components["weight", "deadzone"].shape == (2, 5)
    assert np.isnan(found.components["activation", "rel_mse"][:, 1]).all()
    assert table.read_table(tmp_path, "down_proj").layers[1] == "model.layers.1.mlp.experts.down_proj"
    assert draw_experts(RunLog.load(tmp_path)).figure is not None
    page = write_report(tmp_path)
    assert (page.parent / "experts.png").is_file() and "<h2>Experts</h2>" in page.read_text()
    table.drop_past(tmp_path, 4)
    assert table.read_table(tmp_path).step == 3


def test_a_dense_run_has_no_table_and_no_section(tmp_path):
    table.write_table(tmp_path, 1, {"q_proj": {}})
    table.drop_past(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {"mxfp4/rel_mse": 0.1}}\n')
    assert not (tmp_path / table.EXPERTS_FILE).exists() and table.read_table(tmp_path) is None
    assert "<h2>Experts</h2>" not in write_report(tmp_path).read_text()
