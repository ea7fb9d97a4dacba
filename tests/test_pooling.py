"""The comparison of poolings on one's own embeddings."""

from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
for needed in ("tqdm", "matplotlib"):
    pytest.importorskip(needed)

from benchmarks import pooling  # noqa: E402


def write(path: Path) -> Path:
    """Eight people in images of which most are spoiled, and say so by their quality."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((8, 16))
    person = np.repeat(np.arange(8), 40)
    lost = np.where(rng.random((320, 1)) < 0.7, 4, 0.5)
    features = people[person] + lost * rng.standard_normal((320, 16))
    np.savez(path, features=features.astype("float32"), person=person, quality=np.exp(-lost[:, 0]))
    return path


def test_all_ways_are_measured_on_the_same_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "faces.npz"), tmp_path / "table.md"
    options = f"--ids person --hold-out rows --steps 2 --every 2 --batch 8 --validation-sets 40 --seeds 0 0 --out {out}"
    assert pooling.main([str(source), *options.split()]) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    lines = [line.split("|")[1:3] for line in text.splitlines()[2:] if line]
    values = {name.strip(): tuple(map(float, value.split("±"))) for name, value in lines}
    assert list(values) == [*pooling.UNTRAINED, "coreset, untrained", *pooling.TRAINED.values()]
    assert values["quality-weighted mean"][0] > values["mean"][0] + 0.1
    assert all(0 <= mean <= 1 for mean, _ in values.values())
    assert {spread for _, spread in values.values()} == {0.0}  # the same seed twice
    assert pooling.main([str(source), *options.split()]) == 2
    assert "is there already" in capsys.readouterr().err
