"""Selections and heads for ONNX: our operators in plain PyTorch, with the picks unrolled.

An exported program calls `fcn_kernels::select` and `fcn_kernels::set_attention`, which ONNX does not know.
:func:`plain` writes them as operations that it knows, with numbers of sets and of rows that stay free::

    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    torch.onnx.export(plain(program), dynamo=True).save("module.onnx")
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fcn_kernels.attention.encoding import Waves
from fcn_kernels.attention.inputs import Inputs, Outputs
from fcn_kernels.selection.problem import Problem, Selected
from fcn_kernels.sets import accumulator, usable


def plain(program: ExportedProgram) -> ExportedProgram:
    """The program without our operators: each selection is its k steps, and set attention is matrix products.

    Of a selection, these go along: both metrics, quality, gamma, start, mask, lengths, `normalized`, `distinct`. Sets
    are padded, and rows take part under the same rules as everywhere. q^gamma has to stay within the rows' dtype, as
    has the square of a row's norm. Each set's queries meet the rows of all sets, which is more work than ours where
    there are many sets.

    Raises:
        NotImplementedError: the program was exported with gradients (wrap `torch.export.export` in `torch.no_grad()`),
            in `train()`, with packed sets, or with another option that is not among those above.

    Example:
        >>> from fcn_kernels import CoresetSelect
        >>> with torch.no_grad():
        ...     program = torch.export.export(CoresetSelect(3).eval(), (torch.randn(2, 20, 8),))
        >>> sum("fcn_kernels" in str(node.target) for node in plain(program).graph.nodes)
        0
    """
    table: Any = {
        torch.ops.fcn_kernels.select.default: _select,
        torch.ops.fcn_kernels.set_attention.default: _attention,
    }
    return program.run_decompositions(table)  # type: ignore[no-any-return]


def _select(*args: Any) -> Selected:
    *fields, keep, _ = args
    p = Problem(*fields)
    refused = {
        "gradients: export under torch.no_grad()": keep,
        "noise: call eval() before": p.noise is not None or p.seed is not None,
        "packed sets": p.cu_seqlens is not None,
        "a number of picks for each set": p.limits is not None,
        "anchors or min_distances": p.min_distances is not None,
        "return_min_distances or return_nearest": p.return_state,
    }
    for what, asked in refused.items():
        if asked:
            raise NotImplementedError(f"a selection for ONNX does not go with {what}")
    x = p.features.to(accumulator(p.features.dtype))  # [b, n, c]
    norms = torch.linalg.vector_norm(x, dim=-1)
    if p.euclidean:
        norms = torch.where(norms < math.inf, torch.ones_like(norms), math.nan)
    quality = norms if p.quality is None else p.quality.view(norms.shape)
    allowed = usable(norms, quality) & _takes_part(p, norms)
    first = None
    if p.start is not None:
        first = p.start.to(torch.int64)[:, None]  # [b, 1]
        in_range = (first >= 0) & (first < norms.shape[1])  # of a set without rows it may be anything
        first = torch.where(in_range, first, 0)
        allowed = allowed & in_range & allowed.gather(1, first)
    x = torch.where(allowed[..., None], x, 0)
    counts = allowed.sum(-1).clamp(max=p.k)
    weight = p.distance_scale * quality ** p.gamma.to(norms.dtype)
    open_to, least, logits = allowed, torch.full_like(norms, math.inf), quality
    picks, distances = [], []
    for step in range(p.k):
        scores = torch.where(open_to & (logits > -math.inf), logits, -math.inf)
        # a row that may be picked comes before those that may not, whatever its score
        best = torch.where(open_to & (scores == scores.amax(-1, keepdim=True)), 1, 0)
        pick = best.argmax(-1, keepdim=True) if step or first is None else first
        picks.append(pick)
        distances.append(logits.gather(1, pick) if step else torch.full_like(norms[:, :1], math.inf))
        row = x.gather(1, pick[..., None].expand(-1, -1, p.dim))
        if p.distinct:
            open_to = open_to & (torch.arange(norms.shape[1], device=norms.device) != pick)
        least = torch.minimum(least, _gaps(p, x, norms, row, pick))
        logits = least * weight
    made = torch.arange(p.k, device=counts.device) < counts[:, None]  # [b, k]
    indices = torch.where(made, torch.cat(picks, 1), -1)
    rows = p.features.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, p.dim))
    rows, reached = torch.where(made[..., None], rows, 0), torch.where(made, torch.cat(distances, 1), 0)
    return Selected(rows, reached, indices, counts, [], [])


def _takes_part(p: Problem, norms: Tensor) -> Tensor:
    if p.mask is not None:
        return p.mask.view(norms.shape)
    if p.lengths is not None:
        return torch.arange(norms.shape[1], device=norms.device) < p.lengths[:, None]
    return torch.ones_like(norms, dtype=torch.bool)


def _gaps(p: Problem, x: Tensor, norms: Tensor, row: Tensor, pick: Tensor) -> Tensor:
    """Distances without their weights, [b, n]; 0 for the pick and its duplicates."""
    if p.euclidean:
        return (x - row).square().sum(-1)
    cosine = (x * row).sum(-1) if p.normalized else (x * (row / norms.gather(1, pick)[..., None])).sum(-1) / norms
    return torch.where(cosine == cosine.gather(1, pick), 0, 1 - cosine).clamp(min=0)


def _attention(*args: Any) -> Outputs:
    p = Inputs(*args)
    if p.seed is not None:
        raise NotImplementedError("set attention for ONNX does not go with dropout: call eval() before")
    x = p.features.to(p.queries.dtype)
    norms = torch.linalg.vector_norm(x, dim=-1)
    takes_part = usable(norms, p.quality)
    x = torch.where(takes_part[:, None], x * p.quality[:, None], 0)  # [t, c]
    waves = Waves.of(x.shape[1], x.dtype, x.device)
    wave = torch.sin(torch.where(takes_part, p.quality, 1)[:, None] * waves.frequency + waves.phase)
    key = x + torch.nn.functional.layer_norm(wave, wave.shape[1:], p.encoding_weight, None, p.encoding_eps)
    number = torch.arange(x.shape[0], device=x.device)
    starts = p.offsets[:-1, None]
    own = (number >= starts) & (number < starts + p.lengths[:, None]) & takes_part  # [b, t]
    scores = torch.where(own[:, None], p.queries @ key.T, -math.inf)  # [b, h, t]
    best = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    weights = torch.exp(scores - best)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.clamp(min=1)
    return Outputs(weights @ x, weights.sum(-1), (best + total.log())[..., 0])
