"""The quantisation error of many groups of rows at once: a layer's experts, without a launch for each.

For group e with rows R_e, every part p of the error (`decomposition`) has the energy sum_{r in R_e} |p_r|^2, and a component is
that energy over sum_{r in R_e} |x_r|^2. Energies of a row are added up into its group's by index, so the number of kernels does
not grow with the number of groups; a group without rows has energy 0 and no components (NaN).
"""

from __future__ import annotations

import torch

from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.quant.decomposition import _measure, _parts, error_stats
from mxfp4_rl.quant.quantizer import passes
from mxfp4_rl.recipe import QuantRecipe

COMPONENTS = ("scale_bias", "deadzone", "grid_noise", "fallback", "rel_mse")  # the columns behind the energy of x


@torch.no_grad()
def energies_by_group(x: torch.Tensor, recipe: QuantRecipe, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Energies of x (rows, K), and of the error's parts when it is quantised along K, float64 (groups, 6).

    Columns: of x, then those of `COMPONENTS`. Stochastic rounding has a seed of its own.

    Args:
        group: int64 (rows,), of each row; `groups` for a row that counts nowhere. Where a recipe looks at several rows at
            once (tiles, NVFP4), each group is quantised by itself, one after the other.
    """
    sums = torch.zeros(groups + 1, 1 + len(COMPONENTS), dtype=torch.float64, device=x.device)
    if looks_at_other_rows(recipe):
        for one in group.unique().tolist():
            s = error_stats(x[group == one], recipe, seed=0)
            sums[one] = sums.new_tensor([s.energy, s.scale_bias, s.deadzone, s.grid_noise, s.fallback, s.error])
        return sums[:groups]
    done = 0
    for source, chunk in passes(x, recipe, -1, 0)[1]:
        m = _measure(source, chunk, recipe, torch.float64)
        parts = _parts(m)
        error = sum(parts)
        whole = m.amax.isfinite().unsqueeze(-1)  # blocks with NaN or infinity are in no sum
        energies = [torch.where(whole, t, 0.0).square().sum((-2, -1)) for t in (m.x, *parts, error)]
        sums.index_add_(0, group[done : done + len(source)], torch.stack(energies, -1))
        done += len(source)
    return sums[:groups]


def components_of(energies: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each of `COMPONENTS`, float64 (groups,), as a ratio of sums; NaN for a group without energy."""
    energy = energies[:, 0]
    ratios = energies[:, 1:] / torch.where(energy > 0, energy, torch.nan).unsqueeze(-1)
    return dict(zip(COMPONENTS, ratios.unbind(-1), strict=True))


def rows_each(most: int | None, groups: int) -> int | None:
    """Rows of each group where a layer measures `most`: few rows of an expert tell little, so 8 at least."""
    return None if most is None else max(8, most // max(1, groups))


def rows_of_groups(offsets: torch.Tensor, rows: int, most: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows to measure, at most `most` evenly spaced ones a group, and their groups, as `energies_by_group` takes them.

    Nothing is read back from the device: groups with fewer rows are filled up with some that count nowhere.

    Args:
        offsets: (groups + 1,), group e has the rows from offsets[e] to offsets[e + 1].
        rows: of the tensor. most: None for all of them.
    """
    groups = len(offsets) - 1
    if most is None or rows == 0:
        row = torch.arange(rows, device=offsets.device)
        return row, torch.searchsorted(offsets[1:].long(), row, right=True)
    counts, i = offsets.diff().long().unsqueeze(-1), torch.arange(most, device=offsets.device)
    place = offsets[:-1].long().unsqueeze(-1) + torch.where(counts > most, i * counts // most, i)
    group = torch.arange(groups, device=offsets.device).unsqueeze(-1).expand_as(place)
    return place.clamp(max=rows - 1).flatten(), torch.where(i < counts, group, groups).flatten()
