"""The selection demo: run end to end at a small size, and its parts on cases worked out by hand."""

from __future__ import annotations

import argparse
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from fcn_kernels.demos import digits, select_demo, sets
from fcn_kernels.extras import require

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

OURS = "coreset, gamma = 4"


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    select_demo.add_arguments(parser)
    return parser.parse_args(["--steps", "300", "--sets", "40", *options])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one run prints, and the picture it writes."""
    out = tmp_path_factory.mktemp("demo") / "picks.png"
    return printed(out), out


def printed(out: Path, *options: str) -> str:
    with redirect_stdout(StringIO()) as text:
        assert select_demo.run(arguments("--out", str(out), *options)) == 0
    return text.getvalue()


def rows(text: str) -> dict[str, list[float]]:
    """The table's lines as name -> quality, diversity, clear, different, clear and different."""
    found = re.findall(r"^(\S.*?)  +" + r" +".join([r"(\d+\.\d+)"] * 5) + "$", text, re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in found}


def test_table_has_a_row_for_each_way_and_columns_that_tell_them_apart(demo: tuple[str, Path]) -> None:
    table = rows(demo[0])
    assert list(table) == ["random", "best quality only", "plain farthest point"] + [
        f"coreset, gamma = {gamma}" for gamma in (0, 1, 2, 4)
    ]
    quality, diversity, clear, different, both = range(5)
    best, farthest, ours = (table[name] for name in ("best quality only", "plain farthest point", OURS))
    assert best[quality] == max(row[quality] for row in table.values())
    assert farthest[quality] < 1 < ours[quality]
    assert best[diversity] < ours[diversity] < farthest[diversity]
    assert all(row[both] <= min(row[clear], row[different]) <= 5 for row in table.values())
    assert ours[both] == max(row[both] for row in table.values())


def test_gamma_trades_diversity_for_quality(demo: tuple[str, Path]) -> None:
    coresets = [row for name, row in rows(demo[0]).items() if name.startswith("coreset")]
    assert coresets == sorted(coresets, key=lambda row: row[0])
    assert coresets == sorted(coresets, key=lambda row: -row[1])


def test_norm_ranks_clear_above_blurred_and_noisy_on_held_out_images(demo: tuple[str, Path]) -> None:
    blurred, noisy = (float(share) for share in re.findall(r"([\d.]+)%", demo[0]))
    assert blurred > 95
    assert noisy > 95


def test_picture_is_a_png_with_frames_in_it(demo: tuple[str, Path]) -> None:
    image = pytest.importorskip("matplotlib.image")
    assert demo[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(demo[1])[..., :3]
    assert min(picture.shape[:2]) > 800
    orange = abs(picture - [0xE0 / 255, 0x82 / 255, 0x14 / 255]).max(-1) < 0.02
    # 3 sets x 5 frames of best quality, each of 4 edges of some 50 x 3 pixels: 9,000, and a bar and a dot
    assert orange.sum() > 5000


def test_same_seed_prints_the_same_and_another_seed_does_not(demo: tuple[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "again.png"
    again = printed(out)
    assert again.replace(str(out), "") == demo[0].replace(str(demo[1]), "")
    assert out.read_bytes() == demo[1].read_bytes()
    assert rows(printed(out, "--seed", "1", "--overwrite")) != rows(again)


def test_a_picture_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "picks.png").write_text("mine")
    with pytest.raises(ValueError, match=r"picks\.png: is there already; --overwrite replaces it"):
        select_demo.run(arguments("--out", str(tmp_path / "picks.png")))
    assert (tmp_path / "picks.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1"], "--k: expected 2 to 24, the size of a set, got 1"),
        (["--k", "25"], "got 25"),
        (["--sets", "0"], "--sets: expected at least 1, got 0"),
        (["--out", "no/such/folder/x.png"], "expected a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        select_demo.run(arguments(*options))


def test_digits_are_all_there_and_split_without_overlap() -> None:
    torch.manual_seed(3)
    train, held_out = digits.load_digits(1200)
    assert len(train.labels) == 1200
    assert len(held_out.labels) == 597
    every = torch.cat([train.images, held_out.images])
    assert every.shape == (1797, 8, 8)
    assert every.amin() == 0
    assert every.amax() == 1
    assert torch.cat([train.labels, held_out.labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_photographs_are_near_duplicates_blurred_or_noisy_by_severity() -> None:
    torch.manual_seed(0)
    images = digits.load_digits(100)[0].images

    def change(condition: int, severity: float) -> float:
        taken = digits.photographed(images, torch.full((100,), condition), torch.full((100,), severity))
        assert taken.amin() >= 0
        assert taken.amax() <= 1
        return (taken - images).square().mean().item()

    assert change(digits.CLEAR, 1.0) < 0.01
    for condition in (digits.BLURRED, digits.NOISY):
        assert change(condition, 0.0) < 0.01 < change(condition, 0.5) < change(condition, 1.0)


def test_blur_keeps_a_flat_image_flat_and_zero_blur_keeps_any_image() -> None:
    assert torch.allclose(digits._blurred(torch.full((1, 8, 8), 0.5), torch.tensor([2.0])), torch.tensor(0.5))
    image = torch.rand(1, 8, 8)
    assert torch.equal(digits._blurred(image, torch.zeros(1)), image)


def test_sets_hold_one_class_one_clip_and_all_conditions() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 10
    # every image shows its class as its brightness
    made = sets.make_sets(digits.Digits((labels / 10).view(-1, 1, 1).expand(-1, 8, 8).float(), labels), 20)
    assert made.images.shape == (20, sets.SIZE, 8, 8)
    assert made.media.bincount().tolist() == [6] + [1] * 18
    assert made.conditions.bincount().tolist() == [12, 6, 6]
    middle = made.images[:, made.conditions == digits.CLEAR, 4, 4]
    assert torch.allclose(middle, middle[:, :1].expand_as(middle), atol=1e-6)
    assert middle[:10, 0].mul(10).round().long().sort().values.tolist() == list(range(10))


def test_score_of_picks_worked_out_by_hand() -> None:
    conditions = torch.tensor([digits.CLEAR, digits.CLEAR, digits.BLURRED, digits.CLEAR])
    made = sets.Sets(torch.zeros(1, 4, 8, 8), conditions, media=torch.tensor([0, 0, 1, 2]))
    features = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])  # mean norm 2
    twins = sets.score(features, made, torch.tensor([[0, 1]]))
    assert twins == sets.Score(quality=1.5, diversity=0, clear=2, different=1, clear_different=1)
    mixed = sets.score(features, made, torch.tensor([[0, 2]]))
    assert mixed == sets.Score(quality=1, diversity=1, clear=1, different=2, clear_different=1)
    assert sets.outranked(features.norm(dim=-1), made, digits.BLURRED) == pytest.approx(2 / 3)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ImportError, match=re.escape('pip install "fcn_kernels[demo]"')):
        require("a_module_that_is_nowhere", "demo")
