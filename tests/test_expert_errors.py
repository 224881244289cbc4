"""Each expert's own error: measured all at once as one by one, logged as few numbers, kept as a table, drawn."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.monitor import experts as table
from mxfp4_rl.monitor import panels, plots
from mxfp4_rl.monitor.components import _experts_error, collect_errors, error_metrics, pool, start_measuring
from mxfp4_rl.monitor.plots import draw_experts
from mxfp4_rl.monitor.report import write_report
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.nn import by_group
from mxfp4_rl.nn.linear import spaced_rows
from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.quant import ErrorStats, error_stats
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


@pytest.mark.parametrize("max_rows", [None, 1, 7, 64, 10**6])
@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs+of", "mxfp4+hadamard64", "mxfp4+tile", "nvfp4"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])  # the second keeps its weights transposed
def test_the_error_of_visited_experts_is_that_of_a_copy_of_their_weights(family, words, max_rows):
    recipe, dtype = QuantRecipe.parse(words), torch.bfloat16
    layer = swapped(family, ModelRecipe(weight=recipe)).projections["gate_up_proj"]
    weight, by_rows = layer.weight.detach(), not looks_at_other_rows(recipe)
    for tokens in (torch.tensor([4, 0, 0, 1, 9]), torch.tensor([0, 0, 0, 0, 7]), torch.zeros(5, dtype=torch.long), None):
        own = layer._outputs_first(weight)
        own = own if tokens is None else own[tokens > 0]
        matrices = own.flatten(0, 1).unsqueeze(0) if by_rows else own
        most = None if max_rows is None else max(1, max_rows // max(1, len(matrices)))
        expected = sum((error_stats(spaced_rows(m, most, recipe).to(dtype), recipe) for m in matrices), ErrorStats())
        assert _experts_error(layer, weight, tokens, max_rows, dtype) == expected


class LargestCopy(TorchDispatchMode):
    """The most elements of a floating-point tensor that was made, views left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and not function.is_view:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_measuring_experts_copies_no_more_than_the_rows_it_measures(family):
    layer = swapped(family, ModelRecipe()).projections["gate_up_proj"]
    with LargestCopy() as copied:
        _experts_error(layer, layer.weight.detach(), torch.ones(5, dtype=torch.long), 2, torch.bfloat16)
    assert copied.elements <= 2 * 96  # rows, of 72 elements padded to blocks


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


def test_only_the_end_of_a_table_is_read(tmp_path, monkeypatch):
    _, _, errors = measured()
    for step in range(1, 5):
        table.write_table(tmp_path, step, errors)
    with (tmp_path / table.EXPERTS_FILE).open("a") as out:
        out.write('{"step": 5, "layers": {}}\n{"step": 7, "layers": {"mod')
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    assert table.read_table(tmp_path).step == 4
    assert len(parsed) == 3  # what is torn, what is empty, what is asked for
    monkeypatch.undo()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "data": error_metrics(errors)}) + "\n")
    run, read = RunLog.load(tmp_path), []
    monkeypatch.setattr(plots, "read_table", lambda path: read.append(path) or table.read_table(path))
    assert any("overlay's experts" in note for note in draw_experts(run, run).notes) and len(read) == 1


def test_a_dense_run_has_no_table_and_no_section(tmp_path):
    table.write_table(tmp_path, 1, {"q_proj": {}})
    table.drop_past(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {"mxfp4/rel_mse": 0.1}}\n')
    assert not (tmp_path / table.EXPERTS_FILE).exists() and table.read_table(tmp_path) is None
    assert "<h2>Experts</h2>" not in write_report(tmp_path).read_text()
