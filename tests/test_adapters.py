"""Adapters to others' farthest-point samplers: the picks that these made, their signatures, errors and return types.

The vectors were made on these inputs by torch-fps 0.6.0, torch-quickfps 2.1.0, fpsample 0.3.3, scikit-activeml 1.0.1
and the loop of anomalib 2.7.0 (on an embedding of three dimensions, which it does not project), each on a CPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fcn_kernels import coreset_select, integrations
from fcn_kernels.integrations import (
    anomalib,
    fpsample,
    patchcore,
    pointnet2,
    pytorch3d,
    scikit_activeml,
    torch_cluster,
    torch_fps,
    torch_quickfps,
)

NAN = float("nan")
ROW = torch.arange(40)
CLOUD = torch.stack([ROW * ROW * 7 % 41, ROW * 13 % 37, ROW**3 % 29], 1).float()  # whole numbers: nothing is rounded
GRID = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))  # all ties
COPIES = torch.cat([CLOUD[:6], CLOUD[:6], CLOUD[2:4]])
FROM = [(CLOUD, 12, 7), (GRID, 16, 5), (COPIES, 14, 3)]
"""Points, picks and the first of them."""
MADE = [
    [7, 0, 9, 8, 31, 32, 22, 18, 14, 20, 10, 12],
    [5, 15, 3, 12, 0, 10, 1, 2, 4, 6, 7, 8, 9, 11, 13, 14],
    [3, 0, 5, 4, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13],
]
"""By torch_fps.farthest_point_sampling and torch_quickfps.sample_idx_baseline."""
CASES = pytest.mark.parametrize(
    ("points", "k", "start", "made"), [(*given, m) for given, m in zip(FROM, MADE, strict=True)]
)

PEERS = {
    anomalib.KCenterGreedy: "embedding, sampling_ratio",
    fpsample.bucket_fps_kdline_sampling: "pc, n_samples, h, start_idx=None",
    fpsample.bucket_fps_kdtree_sampling: "pc, n_samples, start_idx=None",
    fpsample.fps_sampling: "pc, n_samples, start_idx=None",
    patchcore.ApproximateGreedyCoresetSampler: (
        "percentage, device, number_of_starting_points=10, dimension_to_project_features_to=128"
    ),
    patchcore.GreedyCoresetSampler: "percentage, device, dimension_to_project_features_to=128",
    pointnet2.furthest_point_sample: "xyz, npoint",
    pytorch3d.sample_farthest_points: "points, lengths=None, K=50, random_start_point=False",
    scikit_activeml.k_greedy_center: (
        "X, y, batch_size=1, random_state=None, missing_label=nan, mapping=None, n_new_cand=None, "
        "metric='euclidean', metric_dict=None"
    ),
    torch_cluster.fps: "src, batch=None, ratio=None, random_start=True, batch_size=None, ptr=None",
    torch_cluster.pyg_lib_fps: "src, ptr, ratio=0.5, random_start=True",
    torch_fps.farthest_point_sampling: (
        "points, valid_mask, k, *, start_idx=None, random_start=True, generator=None, precision=None, validate=True, "
        "assume_finite=False"
    ),
    torch_fps.farthest_point_sampling_with_assign: (
        "points, valid_mask, k, *, start_idx=None, random_start=True, generator=None, precision=None, validate=True, "
        "assume_finite=False"
    ),
    torch_fps.farthest_point_sampling_with_knn: (
        "points, valid_mask, k, k_neighbors, *, start_idx=None, random_start=True, generator=None, precision=None, "
        "validate=True, assume_finite=False"
    ),
    torch_quickfps.sample: "x, k, h=None, start_idx=None, mask=None, low_d=None, return_points=True",
    torch_quickfps.sample_idx: "x, k, h=None, start_idx=None, mask=None, low_d=None",
}
"""Parameters and defaults of the peers' calls."""


@pytest.mark.parametrize("call", PEERS, ids=lambda call: f"{call.__module__.rsplit('.')[-1]}.{call.__name__}")
def test_a_call_takes_what_the_peer_takes(call: Any) -> None:
    parameters = list(inspect.signature(call).parameters.values())
    extra = {anomalib.KCenterGreedy: "project", scikit_activeml.k_greedy_center: "return_utilities"}
    if call in extra:
        assert parameters.pop().name == extra[call]  # ours, and last
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(plain)) == f"({PEERS[call]})"


def test_adapters_import_nothing_of_their_peers() -> None:
    folder = Path(integrations.__file__).parent
    known = {"torch", "fcn_kernels", *sys.stdlib_module_names}
    names = {call.__module__.rsplit(".")[-1] for call in PEERS}
    assert len(names) == 9
    for name in names:
        for node in ast.parse((folder / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= known
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in known


class TestPyTorch3d:
    def test_each_cloud_has_a_number_and_a_length(self) -> None:
        clouds = torch.stack([CLOUD[:20], CLOUD[20:]])
        points, indices = pytorch3d.sample_farthest_points(clouds, torch.tensor([20, 4]), K=[3, 6])
        assert indices.dtype == torch.int64
        assert indices.shape == (2, 6)
        assert (indices[0, 3:] == -1).all()
        assert (indices[1, 4:] == -1).all()
        assert indices[1, :4].sort().values.tolist() == [0, 1, 2, 3]
        assert indices[:, 0].tolist() == [0, 0]
        assert torch.equal(points[0, :3], clouds[0, indices[0, :3]])
        assert not points[0, 3:].any()
        assert not points[1, 4:].any()
        narrow = (torch.tensor(numbers, dtype=torch.int16) for numbers in ([20, 4], [3, 6]))
        as_tensor = pytorch3d.sample_farthest_points(clouds, *narrow)
        assert torch.equal(as_tensor[1], indices)

    def test_more_than_there_are(self) -> None:
        points, indices = pytorch3d.sample_farthest_points(COPIES[None], K=30)
        assert points.shape == (1, 30, 3)
        assert indices[0, :14].sort().values.tolist() == list(range(14))  # copies too, and each once
        assert (indices[0, 14:] == -1).all()

    def test_no_points_asked_for(self) -> None:
        for none in (0, [0, 0], torch.tensor([0, 0])):
            points, indices = pytorch3d.sample_farthest_points(torch.randn(2, 9, 3), K=none)
            assert points.shape == (2, 0, 3)
            assert indices.shape == (2, 0)

    def test_a_start_that_is_not_finite(self) -> None:
        points = torch.arange(12.0).view(3, 4, 1)
        points[0, 0], points[1, :2] = NAN, torch.inf
        points[2] = NAN
        indices = pytorch3d.sample_farthest_points(points, K=3)[1]
        assert indices.tolist() == [[1, 3, 2], [2, 3, -1], [-1, -1, -1]]
        indices = pytorch3d.sample_farthest_points(points, torch.tensor([2, 2, 4]), K=3)[1]
        assert indices.tolist() == [[1, -1, -1], [-1, -1, -1], [-1, -1, -1]]

    def test_the_gradient_is_that_of_a_gather(self) -> None:
        points = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
        sampled, indices = pytorch3d.sample_farthest_points(points, K=[4, 2])
        assert sampled.dtype == torch.float32
        grad = torch.randn_like(sampled)
        (got,) = torch.autograd.grad(sampled, points, grad)
        want = torch.zeros(2, 9, 3, dtype=torch.float64)
        want[0, indices[0]] = grad[0].double()
        want[1, indices[1, :2]] = grad[1, :2].double()
        assert torch.equal(got, want)

    def test_a_random_start_is_torchs(self) -> None:
        clouds = torch.randn(50, 9, 3)
        for lengths in (None, torch.arange(50) % 9 + 1):
            starts = []
            for seed in (0, 0, 1):
                torch.manual_seed(seed)
                starts.append(pytorch3d.sample_farthest_points(clouds, lengths, 1, random_start_point=True)[1])
            assert torch.equal(starts[0], starts[1])
            assert not torch.equal(starts[0], starts[2])
            assert (starts[0][:, 0] < (9 if lengths is None else lengths)).all()

    def test_errors(self) -> None:
        clouds = torch.randn(2, 9, 3)
        with pytest.raises(ValueError, match="points and lengths must have same batch dimension"):
            pytorch3d.sample_farthest_points(clouds, torch.tensor([1, 2, 3]))
        with pytest.raises(ValueError, match="A value in lengths was too large"):
            pytorch3d.sample_farthest_points(clouds, torch.tensor([1, 10]))
        with pytest.raises(ValueError, match="K and points must have the same batch dimension"):
            pytorch3d.sample_farthest_points(clouds, K=[1, 2, 3])


class TestTorchCluster:
    def test_sets_by_batch_and_by_offsets(self) -> None:
        batch = torch.cat([torch.zeros(14), torch.full((26,), 2)]).long()
        got = torch_cluster.fps(CLOUD, batch, 0.25, random_start=False, batch_size=5)
        first = coreset_select(CLOUD[:14], 4, metric="sqeuclidean").indices
        last = coreset_select(CLOUD[14:], 7, metric="sqeuclidean").indices + 14
        assert got.dtype == torch.int64
        assert torch.equal(got, torch.cat([first, last]))
        for ptr in ([0, 14, 14, 40, 40], torch.tensor([0, 14, 14, 40, 40])):
            assert torch.equal(torch_cluster.fps(CLOUD, ratio=0.25, random_start=False, ptr=ptr), got)
        assert torch.equal(torch_cluster.pyg_lib_fps(CLOUD, torch.tensor([0, 14, 40]), 0.25, False), got)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_the_share_is_rounded_up_in_float32(self, dtype: torch.dtype) -> None:
        points = torch.arange(100.0)[:, None]
        for rows, ratio, picks, in_half in [(10, 0.1, 1, 1), (100, 0.07, 7, 8), (100, 0.3, 31, 31), (20, 0.15, 3, 4)]:
            got = torch_cluster.fps(points[:rows].to(dtype), ratio=ratio)
            assert len(got) == (in_half if dtype == torch.float16 else picks)

    def test_no_points(self) -> None:
        for options in ({}, {"ptr": [0, 0, 0]}, {"batch": torch.zeros(0, dtype=torch.int64)}):
            assert torch_cluster.fps(torch.zeros(0, 3, 2), **options).tolist() == []

    def test_the_default_is_half(self) -> None:
        assert len(torch_cluster.fps(CLOUD[:9])) == 5

    def test_a_ratio_for_each_set_and_points_of_more_dimensions(self) -> None:
        got = torch_cluster.fps(
            CLOUD.reshape(40, 3, 1), ratio=torch.tensor([0.5, 0.1]), random_start=False, ptr=[0, 10, 40]
        )
        assert len(got) == 8
        assert (got[:5] < 10).all()
        assert (got[5:] >= 10).all()

    def test_copies_are_repeated_from_the_first_row_on(self) -> None:
        got = torch_cluster.fps(COPIES[[3, 0, 1, 3, 0, 1]], ratio=1.0, random_start=False)
        assert sorted(got.tolist()[:3]) == [0, 1, 2]
        assert got.tolist()[3:] == [0, 0, 0]

    def test_random_starts_are_torchs_and_of_all_points(self) -> None:
        points, ptr = torch.randn(600, 3), list(range(0, 601, 3))
        torch.manual_seed(0)
        starts = torch_cluster.fps(points, ratio=0.1, ptr=ptr)
        torch.manual_seed(0)
        assert torch.equal(torch_cluster.fps(points, ratio=0.1, ptr=ptr), starts)
        assert torch.equal(starts // 3, torch.arange(200))
        assert (starts % 3).bincount().min() > 40

    def test_errors(self) -> None:
        for ratio in (0.0, 1.5, torch.tensor([0.5, NAN])):
            with pytest.raises(ValueError, match="ratio above 0 and up to 1"):
                torch_cluster.fps(CLOUD, ratio=ratio, ptr=[0, 5, 40])
        for batch in (torch.zeros(39).long(), ROW.flip(0)):
            with pytest.raises(ValueError, match="in ascending order"):
                torch_cluster.fps(CLOUD, batch)
        points = torch.full((6, 1), NAN)
        points[:4] = 1
        with pytest.raises(ValueError, match="expected 3 rows of set 1 to be picked, got 1: others, or the start, are"):
            torch_cluster.fps(points, ratio=1.0, random_start=False, ptr=[0, 3, 6])


class TestTorchFps:
    CLOUDS = torch.stack([CLOUD[:20], CLOUD[20:]])
    CLOUDS[1, 4, 0] = NAN
    VALID = torch.ones(2, 20, dtype=torch.bool)
    VALID[0, ::3] = False
    VALID[1, 15:] = False

    @CASES
    def test_picks(self, points: torch.Tensor, k: int, start: int, made: list[int]) -> None:
        mask = torch.ones(1, len(points), dtype=torch.bool)
        got = torch_fps.farthest_point_sampling(points[None], mask, k, start_idx=torch.tensor([start]))
        assert got.dtype == torch.int64
        assert got.tolist() == [made]

    @pytest.mark.parametrize(
        ("options", "made"),
        [
            ({"start_idx": torch.tensor([0, 4])}, [[1, 8, 17, 7, 4, 10], [0, 13, 11, 8, 6, 12]]),  # neither takes part
            ({"start_idx": torch.tensor([5, 3])}, [[5, 8, 4, 7, 1, 19], [3, 8, 11, 10, 12, 7]]),
            ({"random_start": False}, [[1, 8, 17, 7, 4, 10], [0, 13, 11, 8, 6, 12]]),
            ({"generator": 1}, [[5, 8, 4, 7, 1, 19], [11, 12, 6, 13, 0, 8]]),
        ],
    )
    def test_starts(self, options: dict[str, Any], made: list[list[int]]) -> None:
        if "generator" in options:
            options = {"generator": torch.Generator().manual_seed(1)}
        assert torch_fps.farthest_point_sampling(self.CLOUDS, self.VALID, 6, **options).tolist() == made

    def test_neighbors(self) -> None:
        start = torch.tensor([5, 3])
        picks, neighbors = torch_fps.farthest_point_sampling_with_knn(self.CLOUDS, self.VALID, 3, 5, start_idx=start)
        assert picks.tolist() == [[5, 8, 4], [3, 8, 11]]
        assert neighbors.tolist() == [
            [[5, 17, 10, 14, 19], [8, 13, 11, 19, 2], [4, 16, 2, 19, 13]],
            [[3, 0, 1, 6, 7], [8, 5, 7, 12, 13], [11, 14, 1, 2, 7]],
        ]
        _, all_of_them = torch_fps.farthest_point_sampling_with_knn(self.CLOUDS, self.VALID, 1, 20, start_idx=start)
        assert all_of_them[0, 0, 13:].tolist() == [5] * 7  # 13 points take part, and the pick fills up

    def test_cells(self) -> None:
        picks, cells = torch_fps.farthest_point_sampling_with_assign(
            self.CLOUDS, self.VALID, 4, start_idx=torch.tensor([5, 3])
        )
        takes_part = self.VALID & self.CLOUDS.isfinite().all(-1)
        assert picks.tolist() == [[5, 8, 4, 7], [3, 8, 11, 10]]
        assert cells[0, takes_part[0]].tolist() == [0, 2, 2, 0, 3, 1, 0, 1, 1, 0, 2, 0, 1]
        assert cells[1, takes_part[1]].tolist() == [0, 0, 3, 0, 1, 0, 0, 1, 3, 3, 2, 1, 3, 2]
        assert not cells[~takes_part].any()

    def test_sets_with_too_few_points_repeat_the_last(self) -> None:
        made = [[5, 8, 4, 7, 1, 19, 11, 10, 14, 13, 16, 17, 2, 2, 2, 2, 2],
                [3, 8, 11, 10, 12, 7, 6, 1, 13, 14, 0, 2, 5, 9, 9, 9, 9]]  # fmt: skip
        options: dict[str, Any] = {"start_idx": torch.tensor([5, 3]), "validate": False}
        assert torch_fps.farthest_point_sampling(self.CLOUDS, self.VALID, 17, **options).tolist() == made
        none = torch.zeros_like(self.VALID)
        options["start_idx"] = torch.tensor([5, 99])
        got = torch_fps.farthest_point_sampling(self.CLOUDS, none, 3, **options)
        assert got.tolist() == [[5, 5, 5], [0, 0, 0]]

    def test_nothing_to_pick(self) -> None:
        for rows in (20, 0):
            points, mask = self.CLOUDS[:, :rows], self.VALID[:, :rows]
            assert torch_fps.farthest_point_sampling(points, mask, 0).shape == (2, 0)
            assert torch_fps.farthest_point_sampling_with_knn(points, mask, 0, 4)[1].shape == (2, 0, 4)
            assert torch_fps.farthest_point_sampling_with_assign(points, mask, 0)[1].shape == (2, rows)
        assert torch_fps.farthest_point_sampling(self.CLOUDS[:0], self.VALID[:0], 3).shape == (0, 3)

    def test_precision(self) -> None:
        points = torch.tensor([[[0.0], [1.0], [1.0004]]], dtype=torch.float64)
        mask = torch.ones(1, 3, dtype=torch.bool)
        for precision, last in ((None, 2), (torch.float64, 2), (torch.float16, 1)):
            got = torch_fps.farthest_point_sampling(points, mask, 2, random_start=False, precision=precision)
            assert got.tolist() == [[0, last]]

    @pytest.mark.parametrize(
        ("error", "changes"),
        [
            ("points must have shape", {"points": CLOUD}),
            ("points must have shape", {"valid_mask": VALID[:, 1:]}),
            ("K must be non-negative", {"k": -1}),
            ("K <= number of valid points", {"k": 14}),
            ("at least one point", {"points": CLOUDS[:, :0], "valid_mask": VALID[:, :0], "validate": False}),
            ("start_idx must have shape", {"start_idx": torch.tensor([1])}),
            ("start_idx values must be within", {"start_idx": torch.tensor([1, 20])}),
        ],
    )
    def test_errors(self, error: str, changes: dict[str, Any]) -> None:
        given = {"points": self.CLOUDS, "valid_mask": self.VALID, "k": 3, **changes}
        with pytest.raises(ValueError, match=error):
            torch_fps.farthest_point_sampling(**given)

    @pytest.mark.parametrize(("number", "error"), [(0, "must be positive"), (21, "must be <= N")])
    def test_errors_of_neighbors(self, number: int, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            torch_fps.farthest_point_sampling_with_knn(self.CLOUDS, self.VALID, 3, number)


class TestTorchQuickfps:
    @CASES
    def test_picks(self, points: torch.Tensor, k: int, start: int, made: list[int]) -> None:
        assert torch_quickfps.sample_idx_baseline(points, k, start_idx=start).tolist() == made

    def test_any_batch_dimensions_masks_and_random_starts(self) -> None:
        sets = CLOUD.view(2, 2, 10, 3)
        torch.manual_seed(0)
        made = [[[4, 0, 3, 5], [9, 0, 2, 7]], [[3, 8, 2, 9], [0, 2, 1, 5]]]
        points, indices = torch_quickfps.sample(sets, 4)
        assert indices.dtype == torch.int64
        assert indices.tolist() == made
        assert torch.equal(points, sets.gather(2, indices[..., None].expand(2, 2, 4, 3)))
        mask = torch.ones(2, 2, 10, dtype=torch.uint8)
        mask[..., :3] = 0
        made = [[[3, 5, 8, 9], [3, 8, 7, 6]], [[3, 8, 9, 7], [3, 5, 7, 4]]]
        assert torch_quickfps.sample(sets, 4, mask=mask, return_points=False).tolist() == made

    def test_points_have_the_gradient_of_a_gather(self) -> None:
        x = torch.randn(5, 9, 2, requires_grad=True)
        points, indices = torch_quickfps.sample(x, 3)
        (grad,) = torch.autograd.grad(points.sum(), x)
        want = torch.zeros(5, 9).scatter_(1, indices, 1.0)
        assert torch.equal(grad, want[..., None].expand(5, 9, 2))

    @pytest.mark.parametrize(
        ("error", "changes"),
        [
            ("at least 2 dims", {"x": ROW.float()}),
            ("k must be", {"k": 0}),
            ("k must be", {"k": 41}),
            ("start_idx out of range", {"start_idx": 40}),
            ("mask must be", {"mask": torch.ones(40)}),
            ("mask must be", {"mask": torch.ones(39, dtype=torch.bool)}),
            ("fewer than k valid", {"mask": ROW < 2}),
            ("disallows start_idx", {"mask": ROW > 3, "start_idx": 3}),
        ],
    )
    def test_errors(self, error: str, changes: dict[str, Any]) -> None:
        with pytest.raises(RuntimeError, match=error):
            torch_quickfps.sample(**{"x": CLOUD, "k": 3, **changes})


class TestPointnet2:
    def test_picks(self) -> None:
        got = pointnet2.furthest_point_sample(torch.stack([COPIES, COPIES.roll(1, 0)]).requires_grad_(), 9)
        assert got.dtype == torch.int32
        assert not got.requires_grad
        assert sorted(got[0, :6].tolist()) == [0, 1, 2, 3, 4, 5]
        assert got[:, 6:].tolist() == [[0, 0, 0], [0, 0, 0]]  # only copies are left
        assert pointnet2.furthest_point_sample(CLOUD[None, :2], 5)[0].tolist() == [0, 1, 0, 0, 0]

    def test_errors(self) -> None:
        for xyz in (CLOUD, CLOUD[None, :0]):
            with pytest.raises(ValueError, match="expected xyz of shape"):
                pointnet2.furthest_point_sample(xyz, 2)
        with pytest.raises(ValueError, match="point 0 of each cloud to be finite"):
            pointnet2.furthest_point_sample(CLOUD[None] / torch.zeros(()), 2)
        with pytest.raises(ValueError, match="expected k"):
            pointnet2.furthest_point_sample(CLOUD[None], 0)


class TestFpsample:
    def test_picks(self) -> None:
        got = fpsample.fps_sampling(CLOUD.numpy(), 12, 7)
        assert got.dtype == np.uint64
        assert got.tolist() == MADE[0]
        assert fpsample.bucket_fps_kdline_sampling(CLOUD.double().numpy(), 12, 3, 7).tolist() == MADE[0]
        np.random.seed(0)  # noqa: NPY002, fpsample's
        assert fpsample.fps_sampling(CLOUD.numpy(), 5).tolist() == [0, 28, 9, 31, 20]

    def test_a_list_of_starts_comes_first(self) -> None:
        got = fpsample.bucket_fps_kdtree_sampling(CLOUD.numpy(), 12, MADE[0][:5])
        assert got.tolist() == MADE[0]
        assert fpsample.fps_sampling(CLOUD.numpy(), 3, [9, 0, 4]).tolist() == [9, 0, 4]
        assert sorted(fpsample.fps_sampling(COPIES.numpy(), 14, [3, 0]).tolist()) == list(range(14))

    @pytest.mark.parametrize("start", [-1, 40, [1, 1], [0, 1, 2, 3]])
    def test_errors_of_starts(self, start: Any) -> None:
        with pytest.raises(ValueError, match="different start_idx"):
            fpsample.fps_sampling(CLOUD.numpy(), 3, start)

    @pytest.mark.parametrize("count", [0, 41])
    def test_errors_of_numbers(self, count: int) -> None:
        with pytest.raises(ValueError, match="n_samples from 1 to n_pts"):
            fpsample.fps_sampling(CLOUD.numpy(), count)


class TestAnomalib:
    LOOP = (
        [15, 28, 31, 33, 0, 32, 36, 20, 9, 19, 1, 10],
        [3, 12, 0, 15, 5, 10, 1, 2, 4, 6, 7, 8, 9, 11, 13, 14],
        [12, 0, 3, 5, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0],
    )
    """With the start, for which torch was seeded with that of FROM."""

    @pytest.mark.parametrize(
        ("points", "k", "seed", "made"), [(*given, made) for given, made in zip(FROM, LOOP, strict=True)]
    )
    def test_picks(self, points: torch.Tensor, k: int, seed: int, made: list[int]) -> None:
        sampler = anomalib.KCenterGreedy(embedding=points, sampling_ratio=k / len(points))
        assert (sampler.coreset_size, sampler.n_observations) == (k, len(points))
        torch.manual_seed(seed)
        assert sampler.select_coreset_idxs() == made
        torch.manual_seed(seed)
        assert torch.equal(sampler.sample_coreset(), points[made])
        assert sampler.min_distances is not None
        want = torch.cdist(points, points[made]).amin(1, keepdim=True)
        torch.testing.assert_close(sampler.min_distances, want)

    def test_embeddings_of_more_dimensions_and_projections(self) -> None:
        torch.manual_seed(7)
        got = anomalib.KCenterGreedy(CLOUD.view(40, 3, 1), 0.3).sample_coreset()
        assert torch.equal(got[..., 0], CLOUD[self.LOOP[0]])
        sampler = anomalib.KCenterGreedy(CLOUD, 0.1, project=lambda rows: rows[:, :1])
        rows = CLOUD[sampler.select_coreset_idxs()]
        assert sampler.features.shape == (40, 1)
        assert {0.0, 40.0} & set(rows[:, 0].tolist())  # of a line its ends come first

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="coreset_size must be a positive integer, got 0"):
            anomalib.KCenterGreedy(CLOUD, 0.01)
        with pytest.raises(ValueError, match="expected 40 rows to be picked"):
            anomalib.KCenterGreedy(torch.where(CLOUD[:, :1] == 7, NAN, CLOUD), 1.0).select_coreset_idxs()


class TestPatchcore:
    ROWS = np.random.RandomState(0).rand(120, 6).astype(np.float32)

    def listing(self, rows: torch.Tensor, first: torch.Tensor, picks: int) -> list[int]:
        """k-center-greedy on a matrix of distances, beginning with these."""
        gaps, near, found = torch.cdist(rows, rows), first, []
        for _ in range(picks):
            found.append(int(near.argmax()))
            near = torch.minimum(near, gaps[found[-1]])
        return found

    def test_the_greedy_start_is_far_from_all(self) -> None:
        rows = torch.from_numpy(self.ROWS).double()
        want = self.listing(rows, torch.cdist(rows, rows).norm(dim=1), 24)
        got = patchcore.GreedyCoresetSampler(0.2, torch.device("cpu"), None).run(self.ROWS)
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, self.ROWS[want])

    def test_averages_to_some_rows_take_part_in_the_minimum(self) -> None:
        rows = torch.from_numpy(self.ROWS).double()
        sampler = patchcore.ApproximateGreedyCoresetSampler(0.2, torch.device("cpu"), 3, 6)
        np.random.seed(3)  # noqa: NPY002, theirs
        starts = np.random.choice(120, 3, replace=False)  # noqa: NPY002
        want = self.listing(rows, torch.cdist(rows, rows[starts]).mean(1), 24)
        np.random.seed(3)  # noqa: NPY002, theirs
        got = sampler.run(torch.from_numpy(self.ROWS))
        assert torch.equal(got, torch.from_numpy(self.ROWS[want]))

    def test_projections_are_torchs(self) -> None:
        rows = torch.from_numpy(self.ROWS)
        torch.manual_seed(0)
        mapper = torch.nn.Linear(6, 4, bias=False)
        near = mapper(rows).detach().double()
        want = self.listing(near, torch.cdist(near, near).norm(dim=1), 12)
        torch.manual_seed(0)
        got = patchcore.GreedyCoresetSampler(0.1, torch.device("cpu"), 4).run(rows.requires_grad_())
        assert torch.equal(got, rows[want])
        assert got.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_rows_of_other_dtypes_are_projected_too(self, dtype: torch.dtype) -> None:
        rows = torch.from_numpy(self.ROWS).to(dtype)
        for sampler in (patchcore.GreedyCoresetSampler, patchcore.ApproximateGreedyCoresetSampler):
            for width in (4, 6):
                got = sampler(0.1, torch.device("cpu"), dimension_to_project_features_to=width).run(rows)
                assert got.dtype == dtype
                assert got.shape == (12, 6)

    @pytest.mark.parametrize("percentage", [0, 1, -0.5])
    def test_errors(self, percentage: float) -> None:
        with pytest.raises(ValueError, match=r"Percentage value not in \(0, 1\)"):
            patchcore.ApproximateGreedyCoresetSampler(percentage, torch.device("cpu"))

    def test_a_share_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="expected k"):
            patchcore.GreedyCoresetSampler(0.001, torch.device("cpu")).run(self.ROWS)


class TestScikitActiveml:
    LABELS = np.full(40, NAN)
    LABELS[[3, 9, 21]] = 1

    def test_queries_go_on_from_labelled_rows(self) -> None:
        picks, utilities = scikit_activeml.k_greedy_center(CLOUD.numpy(), self.LABELS, 6, random_state=0)
        assert picks.tolist() == [28, 17, 0, 16, 36, 32]
        alone = scikit_activeml.k_greedy_center(CLOUD.numpy(), self.LABELS, 6, random_state=0, return_utilities=False)
        assert alone[0].tolist() == picks.tolist()
        assert alone[1] is None
        taken = [3, 9, 21]
        for pick, row in zip(picks, utilities, strict=True):
            want = torch.cdist(CLOUD, CLOUD[taken]).amin(1)
            want[taken] = torch.nan
            np.testing.assert_allclose(row, want.numpy(), rtol=1e-6)
            taken.append(int(pick))

    def test_mappings(self) -> None:
        mapping = [1, 2, 5, 9, 30, 31, 32, 33]  # 9 is labelled
        picks, utilities = scikit_activeml.k_greedy_center(CLOUD.numpy(), self.LABELS, 4, mapping=mapping)
        assert picks.tolist() == [31, 2, 32, 33]
        assert np.isnan(np.delete(utilities, mapping, 1)).all()
        assert np.isnan(utilities[:, 9]).all()
        short = scikit_activeml.k_greedy_center(CLOUD.numpy(), self.LABELS, 4, mapping=mapping, n_new_cand=8)[1]
        np.testing.assert_array_equal(short, utilities[:, mapping])

    def test_without_labels_any_row_comes_first(self) -> None:
        none = np.full(16, "none")
        firsts = set()
        for seed in range(60):
            given = {"random_state": seed, "missing_label": "none"}
            picks, utilities = scikit_activeml.k_greedy_center(GRID.numpy(), none, 2, **given)
            assert scikit_activeml.k_greedy_center(GRID.numpy(), none, 2, **given)[0].tolist() == picks.tolist()
            assert not utilities[0].any()
            assert np.nanmax(utilities[1]) == utilities[1, picks[1]]
            firsts.add(int(picks[0]))
        assert len(firsts) > 10

    def test_ties_are_picked_at_random(self) -> None:
        labels = np.full(16, NAN)
        labels[[5, 6, 9, 10]] = 0
        seen = {int(scikit_activeml.k_greedy_center(GRID.numpy(), labels, random_state=s)[0][0]) for s in range(60)}
        assert seen == {0, 3, 12, 15}

    @pytest.mark.parametrize(
        ("error", "match", "changes"),
        [
            (ValueError, "2D array", {"X": [1.0]}),
            (TypeError, "batch_size must be", {"batch_size": "2"}),
            (TypeError, "n_new_cand", {"n_new_cand": "2"}),
            (ValueError, "n_new_cand", {"n_new_cand": 2}),
            (ValueError, "metric", {"metric": "cosine"}),
            (ValueError, "inconsistent", {"y": [NAN]}),
            (ValueError, "expected 38 rows to be picked", {"batch_size": 38}),
        ],
    )
    def test_errors(self, error: type[Exception], match: str, changes: dict[str, Any]) -> None:
        with pytest.raises(error, match=match):
            scikit_activeml.k_greedy_center(**{"X": CLOUD.numpy(), "y": self.LABELS, **changes})

    def test_a_query_strategy_of_theirs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a stand-in for their base class, which checks its arguments and knows the candidates."""

        class CoreSet:
            def __init__(self, metric="euclidean", metric_dict=None, missing_label=NAN, random_state=None):
                self.metric, self.metric_dict = metric, metric_dict
                self.missing_label_, self.random_state_ = missing_label, random_state

            def _validate_data(self, *given, reset):
                return given

            def _transform_candidates(self, candidates, X, y):
                mapping = np.flatnonzero(np.isnan(y)) if candidates is None else np.asarray(candidates)
                return (X[mapping], mapping) if mapping.ndim == 1 else (mapping, None)

        pool, utils = ModuleType("skactiveml.pool"), ModuleType("skactiveml.utils")
        pool.CoreSet = CoreSet
        utils.labeled_indices = lambda y, missing_label: np.flatnonzero(~np.isnan(y))
        for name, module in (("skactiveml", ModuleType("skactiveml")), (pool.__name__, pool), (utils.__name__, utils)):
            monkeypatch.setitem(sys.modules, name, module)
        scikit_activeml._core_set.cache_clear()
        try:
            strategy = scikit_activeml.CoreSet(random_state=0)
            assert isinstance(strategy, CoreSet)
            again = pickle.loads(pickle.dumps(strategy))
            assert again.query(CLOUD.numpy(), self.LABELS, batch_size=6).tolist() == [28, 17, 0, 16, 36, 32]
            picks, utilities = strategy.query(CLOUD.numpy(), self.LABELS, CLOUD.numpy()[30:] * 1.5, 4, True)
            assert picks.tolist() == [4, 3, 2, 6]
            assert utilities.shape == (4, 10)
        finally:
            scikit_activeml._core_set.cache_clear()

    def test_without_theirs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "skactiveml", None)
        monkeypatch.delitem(sys.modules, "skactiveml.pool", raising=False)
        scikit_activeml._core_set.cache_clear()
        with pytest.raises(ImportError, match=r"skactiveml.pool is needed here: pip install \"fcn_kernels\[peers\]\""):
            importlib.import_module("fcn_kernels.integrations.scikit_activeml").CoreSet  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'Coreset'"):
            scikit_activeml.Coreset  # noqa: B018
