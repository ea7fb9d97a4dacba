"""Templates that an engine brings together: the numbers of the command on one file, to the bit."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fcn_kernels import CoresetAggregator
from fcn_kernels.__main__ import main
from fcn_kernels.files.formats import InputError
from fcn_kernels.integrations.groups import AggregateGroups

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
TEMPLATES, ROWS, DIM = 40, 300, 16


@pytest.fixture(scope="module")
def columns() -> dict[str, Any]:
    """Rows of templates, in no order."""
    rng = np.random.default_rng(0)
    names = np.array([f"person {i}" for i in rng.integers(0, TEMPLATES, ROWS)])
    features = rng.standard_normal((ROWS, DIM)).astype("float32")
    return {"template_ids": names, "features": features, "row": np.arange(ROWS)}


@pytest.fixture(scope="module")
def of_one_file(columns: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("command")
    np.savez(folder / "in.npz", **columns)
    assert main(["aggregate", str(folder / "in.npz"), "--out", str(folder / "out.npz")]) == 0
    with np.load(folder / "out.npz") as file:
        return dict(file)


def check(made: Mapping[str, Any], of_one_file: Mapping[str, Any]) -> None:
    """Columns of the same templates, in any order."""
    order = np.argsort(made["template_ids"])
    assert made.keys() == of_one_file.keys()
    for name, values in of_one_file.items():
        ours = np.array([np.asarray(value) for value in np.asarray(made[name])[order].tolist()])
        assert np.array_equal(ours.astype(values.dtype), values), name


def test_all_rows_at_once_in_any_order(columns: dict[str, Any], of_one_file: dict[str, Any]) -> None:
    order = np.random.default_rng(1).permutation(ROWS)
    groups = pickle.loads(pickle.dumps(AggregateGroups(rows="row")))
    check(groups({name: values[order] for name, values in columns.items()}), of_one_file)


def test_columns_as_engines_have_them(columns: dict[str, Any], of_one_file: dict[str, Any]) -> None:
    """Objects: strings, and an array for each row; memory that may not be written to."""
    features = np.empty(ROWS, object)
    features[:] = list(columns["features"])
    row = columns["row"].copy()
    row.flags.writeable = False
    found = {"template_ids": columns["template_ids"].astype(object), "features": features, "row": row}
    check(AggregateGroups(rows="row")(found), of_one_file)
    made = AggregateGroups()(found)
    assert "picks" not in made
    assert np.array_equal(made["descriptors"], of_one_file["descriptors"])


def test_a_head_and_other_names(columns: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(CoresetAggregator(DIM, 2).state_dict(), tmp_path / "head.pt")
    quality = np.linspace(1, 2, ROWS)
    np.savez(tmp_path / "in.npz", who=columns["template_ids"], x=columns["features"], q=quality)
    names = ["--ids", "who", "--features", "x", "--quality", "q"]
    head = ["--checkpoint", str(tmp_path / "head.pt"), "--k", "2"]
    assert main(["aggregate", str(tmp_path / "in.npz"), *names, *head, "--out", str(tmp_path / "out.npz")]) == 0
    groups = AggregateGroups(ids="who", features="x", quality="q", k=2, checkpoint=tmp_path / "head.pt", rows="row")
    made = groups({"who": columns["template_ids"], "x": columns["features"], "q": quality, "row": columns["row"]})
    with np.load(tmp_path / "out.npz") as file:
        assert np.array_equal(made.pop("who"), file["template_ids"])
        for name, values in made.items():
            assert np.array_equal(values, file[name]), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": None}, "expected a column 'features'"),
        ({"features": [[1.0]] * (ROWS - 1) + [[1.0, 2.0]]}, "the group: cannot be read"),
        ({"row": np.linspace(0, 1, ROWS)}, "expected integers in 'row', got float64"),
        ({"features": np.zeros((ROWS, 3), "float32")}, "the norm of its features is 0"),
    ],
)
def test_bad_groups_are_told(columns: dict[str, Any], change: dict[str, Any], said: str) -> None:
    found = {name: values for name, values in {**columns, **change}.items() if values is not None}
    with pytest.raises(InputError, match=said):
        AggregateGroups(rows="row")(found)


def test_bad_options_are_told(columns: dict[str, Any]) -> None:
    from fcn_kernels import ClusterAggregate

    with pytest.raises(InputError, match="expected k of at least 1"):
        AggregateGroups(k=0)
    with pytest.raises(InputError, match="a ClusterAggregate's is for"):
        AggregateGroups(checkpoint=ClusterAggregate(DIM, 2, 1, style_dim=0, norm_dim=16).state_dict())
    with pytest.raises(InputError, match="expected C = 8, got 16"):
        AggregateGroups(checkpoint=CoresetAggregator(8).state_dict())(columns)


# --- pandas, and Spark, which calls the same method ---------------------------------------------------------------


def frame(columns: dict[str, Any]) -> Any:
    """Rows in no order."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    made = pandas.DataFrame({name: list(values) for name, values in columns.items()})
    return made.iloc[np.random.default_rng(2).permutation(ROWS)]


def test_pandas_groups(columns: dict[str, Any], of_one_file: dict[str, Any]) -> None:
    groups = AggregateGroups(rows="row")
    made = frame(columns).groupby("template_ids", group_keys=False)[["template_ids", "features", "row"]]
    made = made.apply(groups.pandas).reset_index(drop=True)
    check({name: made[name].to_numpy() for name in made.columns}, of_one_file)


@pytest.mark.parametrize("buckets", [None, 7])
def test_spark(
    columns: dict[str, Any], of_one_file: dict[str, Any], buckets: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java, and there is none")
    from fcn_kernels.integrations.spark import aggregate

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spark = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    rows = spark.createDataFrame(frame(columns).assign(features=lambda f: f["features"].map(lambda x: x.tolist())))
    made = aggregate(rows, AggregateGroups(rows="row"), buckets=buckets).toPandas()
    check({name: made[name].to_numpy() for name in made.columns}, of_one_file)


# --- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on this machine, with two workers."""
    found = pytest.importorskip("ray", reason="Ray is not installed: its tests have a step of their own in .ci/run")
    import ray.data

    found.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.default_hash_shuffle_parallelism = False, 2
    yield found
    found.shutdown()


@pytest.mark.parametrize("buckets", [None, 7])
def test_ray_on_two_workers(
    ray: Any, columns: dict[str, Any], of_one_file: dict[str, Any], buckets: int | None, tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    from fcn_kernels.integrations.ray import aggregate

    table = pyarrow.table({**columns, "features": list(columns["features"])})
    for part in range(3):  # a template's rows lie in several files
        parquet.write_table(table.take(np.arange(part, ROWS, 3)), tmp_path / f"{part}.parquet")
    dataset = ray.data.read_parquet(str(tmp_path))
    found = aggregate(dataset, AggregateGroups(rows="row"), buckets=buckets).take_all()
    check({name: [row[name] for row in found] for name in found[0]}, of_one_file)


def test_ray_tells_what_is_bad(ray: Any, columns: dict[str, Any]) -> None:
    from fcn_kernels.integrations.ray import aggregate

    dataset = ray.data.from_items([{"template_ids": 1, "features": [0.0, 0.0]}])
    with pytest.raises(ValueError, match="at least 1 bucket"):
        aggregate(dataset, buckets=0)
    with pytest.raises(Exception, match="the norm of its features is 0"):
        aggregate(dataset).take_all()
    found = aggregate(dataset, AggregateGroups(skip_bad_rows=True)).take_all()
    assert [(row["counts"], row["left_out"]) for row in found] == [(0, 1)]
