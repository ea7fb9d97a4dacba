"""The training demo: run end to end at a small size, and its parts on cases worked out by hand."""

from __future__ import annotations

import argparse
import math
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fcn_kernels.demos import aligned, digits, plots, poolings, train_demo
from fcn_kernels.demos.templates import LONGEST, make_templates
from fcn_kernels.evaluation.verification import FARS, roc

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

WAYS = ["average", "norm-weighted", "best quality", poolings.CLUSTERS, poolings.OURS]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_demo.add_arguments(parser)
    return parser.parse_args(["--steps", "30", "--templates", "100", "--seeds", "1", *options])


def printed(out: Path, *options: str) -> str:
    with redirect_stdout(StringIO()) as text:
        assert train_demo.run(arguments("--out", str(out), *options)) == 0
    return text.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one run prints, and the folder of its pictures."""
    out = tmp_path_factory.mktemp("demo") / "made"
    return printed(out), out


def lines(text: str) -> dict[str, list[list[str]]]:
    """The cells behind each way of pooling's name, table by table: training, clean, corrupted."""
    return {
        way: [line[len(way) :].split() for line in text.splitlines() if line.startswith(way + "  ")] for way in WAYS
    }


def test_loss_falls_for_every_way_of_pooling(demo: tuple[str, Path]) -> None:
    for training, *_ in lines(demo[0]).values():
        first, _, last = training[:3]
        assert float(last) < 0.95 * float(first)


def test_gamma_moves_and_is_printed(demo: tuple[str, Path]) -> None:
    found = re.search(r"^gamma of coreset \(ours\): 0\.01 -> (-?\d+\.\d+)$", demo[0], re.MULTILINE)
    assert found
    assert abs(float(found[1]) - 0.01) > 1e-3


def test_norms_rank_clear_images_above_blurred_ones_before_long(demo: tuple[str, Path]) -> None:
    for training, *_ in lines(demo[0]).values():
        blurred, noisy = (float(cell.removesuffix("%")) for cell in training[-2:])
        assert blurred > 75
        assert 0 <= noisy <= 100


def test_tables_give_tar_at_all_fars_and_mark_the_best(demo: tuple[str, Path]) -> None:
    assert demo[0].count("TAR at FAR         1e-06    1e-05    1e-04    1e-03    1e-02    1e-01\n") == 2
    tables = lines(demo[0])
    for kind in (1, 2):
        columns = list(zip(*(tables[way][kind] for way in WAYS), strict=True))
        assert len(columns) == len(FARS)
        # 100 x 100 pairs of ten digits: 9,000 of two digits, so 1e-3 is the first FAR they can measure
        assert [set(column) for column in columns[:3]] == [{"-"}] * 3
        for column in columns[3:]:
            best = max(float(cell.strip("*")) for cell in column)
            assert {float(cell[:-1]) for cell in column if cell.endswith("*")} == {best}
            assert 0 <= best <= 1
        tars = [[float(cell.strip("*")) for cell in tables[way][kind][3:]] for way in WAYS]
        assert all(row == sorted(row) for row in tars)


def test_it_says_where_the_coreset_is_ahead_and_where_behind(demo: tuple[str, Path]) -> None:
    tables = lines(demo[0])
    for ours in (poolings.OURS, poolings.CLUSTERS):
        said = re.escape(ours) + ": ahead at (.*), level at (.*), behind at (.*)$"
        standings = re.findall(f"^{said}", demo[0], re.MULTILINE)
        assert len(standings) == 2
        for kind, (ahead, level, behind) in enumerate(standings, start=1):
            for far, cell in zip(FARS, tables[ours][kind], strict=True):
                if cell != "-":
                    assert (f"{far:.0e}" in ahead.split() + level.split()) == cell.endswith("*")
                    assert (f"{far:.0e}" in behind.split()) != cell.endswith("*")


def test_raw_and_aligned_scores_stand_side_by_side_with_what_harms(demo: tuple[str, Path]) -> None:
    _, _, raw, *ways = demo[0].partition("Aligned scores of two images")[2].splitlines()[:9]
    assert 0 < min(float(cell) for cell in raw.removeprefix("raw cosine").split()) < 1
    table = {name: cells for name, *cells in (re.split(r"\s{2,}", line) for line in ways)}
    assert len(table) == 6
    for place, kind in enumerate(aligned.KINDS):
        said = re.search(f"^{kind}: helps in every seed: (.*); harms on average: (.*)$", demo[0], re.MULTILINE)
        assert said
        for name, cells in table.items():
            change, seeds = cells[place].split(maxsplit=1)
            assert (name in said[1].split(", ")) == (seeds == "(1 of 1 better)")
            if float(change):
                assert (name in said[2].split(", ")) == change.startswith("-")
        assert "class centers" in said[2]  # six are too few


def test_a_change_is_called_what_it_is() -> None:
    said = aligned.verdict({"one": {"clean": [0.1, 0.2], "bad": [0.1, -0.3]}, "other": {"clean": [0.1, 0], "bad": [0]}})
    assert said.splitlines() == [
        "clean: helps in every seed: one; harms on average: none",
        "bad: helps in every seed: none; harms on average: one",
    ]


def test_pictures_are_pngs(demo: tuple[str, Path]) -> None:
    image = pytest.importorskip("matplotlib.image")
    for name, colors in (
        ("roc", [plots.OURS]),
        ("aligned", [plots.OURS]),
        ("picks", [plots.OURS]),
        ("clusters", plots.CENTERS),
    ):
        assert (demo[1] / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        picture = torch.from_numpy(image.imread(demo[1] / f"{name}.png")[..., :3])
        wanted = torch.tensor([list(bytes.fromhex(color[1:])) for color in colors]) / 255
        ours = (picture[..., None, :] - wanted).abs().amax(-1).amin(-1) < 0.02
        assert ours.sum() > 300  # a curve, or frames


def test_same_seed_prints_and_draws_the_same(tmp_path: Path) -> None:
    outs = tmp_path / "once", tmp_path / "again"
    once, again = (printed(out, "--steps", "10").replace(str(out), "") for out in outs)
    assert once == again
    for name in ("aligned.png", "roc.png", "picks.png", "clusters.png"):
        assert len({(out / name).read_bytes() for out in outs}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "9"], "expected --steps of at least 10 and --templates of at least 10, got 9 and 100"),
        (["--templates", "9"], "got 30 and 9"),
        (["--out", "no/such/folder"], "in a folder that exists, got no/such/folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train_demo.run(arguments(*options))


def test_pictures_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "aligned.png").write_text("mine")
    with pytest.raises(ValueError, match=r"aligned\.png: is there already; --overwrite replaces it"):
        train_demo.run(arguments("--out", str(tmp_path)))
    assert (tmp_path / "aligned.png").read_text() == "mine"


@pytest.fixture
def bright() -> digits.Digits:
    """Each image shows its digit as its brightness."""
    labels = torch.arange(300) % 10
    return digits.Digits((labels / 10).view(-1, 1, 1).expand(-1, 8, 8).float(), labels)


def test_templates_show_one_identity_in_1_to_20_images(bright: digits.Digits) -> None:
    torch.manual_seed(0)
    labels = torch.arange(500) % 10
    made = make_templates(bright, labels, torch.zeros(500))
    lengths = made.cu_seqlens.diff()
    assert made.cu_seqlens.dtype == torch.int32
    assert lengths.unique().tolist() == list(range(1, LONGEST + 1))
    assert len(made.images) == int(lengths.sum())
    shown = made.images[:, 4, 4].mul(10).round().long()
    assert torch.equal(shown, labels.repeat_interleave(lengths.long()))


def test_templates_hold_single_images_and_clips_of_near_duplicates() -> None:
    torch.manual_seed(0)
    data = digits.Digits(torch.rand(300, 8, 8), torch.zeros(300, dtype=torch.int64))
    made = make_templates(data, torch.zeros(200, dtype=torch.int64), torch.zeros(200))
    nearest = torch.cdist(made.images.flatten(1), data.images.flatten(1)).argmin(1)  # the digit behind each image
    inside = torch.ones(len(nearest), dtype=torch.bool)
    inside[made.cu_seqlens[:-1].long()] = False
    repeats = (nearest[1:] == nearest[:-1])[inside[1:]].float().mean().item()
    # 0.6 of some 1,900 steps go on with a clip, and 1 in 300 of the others repeats by chance: 4 deviations are 0.045
    assert repeats == pytest.approx(0.6, abs=0.05)
    assert len(nearest.unique()) > 250


def test_share_of_corrupted_media_is_the_one_asked_for(bright: digits.Digits) -> None:
    torch.manual_seed(0)
    labels, shares = torch.full((600,), 5), torch.tensor([0.0, 0.5, 1.0])
    made = make_templates(bright, labels, shares.repeat(200))
    # the middle of a flat image shows noise, and blur too, which brings in the dark around the image
    kept = (made.images[:, 3:5, 3:5] - 0.5).abs().amax((1, 2)) < 1e-5
    share = shares.repeat(200).repeat_interleave(made.cu_seqlens.diff().long())
    assert kept[share == 0].all()
    assert not kept[share == 1].any()
    # some 800 media decide it, clips weigh more: 4 deviations are below 0.1
    assert kept[share == 0.5].float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_poolings_of_a_template_worked_out_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    quality, cu_seqlens = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 2, 3], dtype=torch.int32)
    expected = {
        poolings.average: [[0.5, 0.5], [0.6, 0.8]],
        poolings.norm_weighted: [[1.5, 0.5], [1.2, 1.6]],
        poolings.best_quality: [[3.0, 0.0], [1.2, 1.6]],
    }
    for pooling, rows in expected.items():
        descriptor, norm = pooling(features, quality, cu_seqlens=cu_seqlens)
        assert torch.allclose(descriptor * norm[:, None], torch.tensor(rows))
        assert torch.allclose(descriptor.norm(dim=1), torch.ones(2))


def test_best_quality_sends_its_gradient_to_the_best_image_alone() -> None:
    features = torch.eye(2, requires_grad=True)
    quality = torch.tensor([1.0, 2.0], requires_grad=True)
    descriptor, norm = poolings.best_quality(features, quality, cu_seqlens=torch.tensor([0, 2]))
    (descriptor.sum() + norm.sum()).backward()
    assert features.grad is not None
    assert quality.grad is not None
    assert features.grad.tolist() == [[0, 0], [1, 1]]
    assert quality.grad.tolist() == [0, 1]


def test_frames_are_drawn_with_what_the_head_gives_them() -> None:
    torch.manual_seed(0)
    data = digits.Digits(torch.rand(100, 8, 8), torch.arange(100) % 10)
    templates = make_templates(data, torch.arange(40) % 10, torch.zeros(40))
    net = train_demo.TemplateNet(digits.DigitNet(), poolings.Clusters(digits.DigitNet().dim)).eval()
    found = train_demo.frames_of(net, templates, "cpu")
    assert len(found) == train_demo.TEMPLATES_DRAWN
    for frames in found:
        assert len(frames.images) == len(frames.weights) == len(frames.centers) >= 12
        assert float(frames.weights.sum()) == pytest.approx(1, abs=1e-5)
        assert set(frames.centers.tolist()) <= {0, 1, 2, 3}


def test_verification_compares_probes_with_the_gallery() -> None:
    torch.manual_seed(0)
    labels = torch.arange(30) % 10
    data = digits.Digits(torch.rand(100, 8, 8), torch.arange(100) % 10)
    trial = train_demo.Trial(*(make_templates(data, labels, torch.zeros(30)) for _ in range(2)))
    net = train_demo.TemplateNet(digits.DigitNet(), poolings.average)
    made = train_demo.verify(net, trial, "cpu")
    with torch.no_grad():
        gallery, probes = (F.normalize(net(side)[0]) for side in trial)
    expected = roc((gallery @ probes.T).flatten(), (labels[:, None] == labels).flatten())
    assert made.negatives == 810
    assert made.tar_at([0.01, 0.1]) == expected.tar_at([0.01, 0.1])
    assert not math.isnan(made.tar_at([0.01])[0])
