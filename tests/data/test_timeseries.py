"""Time series: what a file becomes, what is refused, and how a set is split and scaled."""

import re
from importlib.util import find_spec

import pytest
import torch

from regard.data.timeseries import BUNDLED, SeriesSet, bundled, hold_out, load_series, mean_and_deviation, standardise

CSV = "series,label,x,y\na,up,1,10\na,up,2,20\na,up,3,30\nb,down,4,40\n"
TS = "# made up\n@problemName two\n@classLabel true down up\n@data\n1,2,3:10,20,30:up\n4:40:down\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="series.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(("content", "name"), [(CSV, "series.csv"), (TS, "series.ts")])
def test_both_formats_give_the_same_set(write, content, name):
    found = load_series(write(content, name))
    assert found.series.tolist() == [[[1, 10], [2, 20], [3, 30]], [[4, 40], [0, 0], [0, 0]]]
    assert found.lengths.tolist() == [3, 1] and found.classes == ("down", "up")
    assert found.labels is not None and found.labels.tolist() == [1, 0]
    assert found.mask.tolist() == [[True, True, True], [True, False, False]]
    assert found.names == (("a", "b") if name.endswith("csv") else ("1", "2"))


def test_the_rows_of_a_series_need_not_be_together(write):
    found = load_series(write("x,series\n1,a\n9,b\n2,a\n\n8,b\n"))
    assert found.series[..., 0].tolist() == [[1, 2], [9, 8]]
    assert found.labels is None and found.features == ("x",)


def test_features_fix_the_columns_and_their_order(write):
    path = write("series,y,note,x\na,10,good,1\na,20,bad,2\n")
    found = load_series(path, features=("x", "y"))
    assert found.series.tolist() == [[[1, 10], [2, 20]]] and found.features == ("x", "y")


def test_classes_fix_the_order_of_the_labels(write):
    found = load_series(write(CSV), classes=("up", "middle", "down"))
    assert found.labels is not None and found.labels.tolist() == [0, 2]
    assert found.classes == ("up", "middle", "down")


def test_blank_labels_are_no_labels(write):
    assert load_series(write("series,label,x\na,,1\nb, ,2\n")).labels is None


def test_a_spreadsheets_marks_are_read_over(write):
    found = load_series(write("\ufeffseries, x\r\na,1\r\na,2\r\n".encode()))
    assert found.series.tolist() == [[[1], [2]]] and found.features == ("x",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("series,label,x\n", "the file holds no series"),
        ("name,x\na,1\n", "the column 'series' is missing, the columns are name, x"),
        ("series,label\na,up\n", "a column with values is missing, the columns are series, label"),
        ("series,x,x\na,1,2\n", "every column must have a name of its own, got 'x' more than once"),
        ("series,x\na,1\na,NaN\n", "line 3, column 'x': a value must be a finite number, got 'NaN'"),
        ("series,x\na,1\na,\n", "line 3, column 'x': a value must be a finite number, got ''"),
        ("series,x,y\na,1,low\n", "line 2, column 'y': a value must be a finite number, got 'low'"),
        ("series,x\na,1e39\n", "line 2, column 'x': a value must be a finite number, got '1e39'"),
        ("series,x,y\na,1\n", "line 2: a row must have 3 values, got 2"),
        ("series,label,x\na,up,1\na,down,2\n", "line 3: series 'a' must have one label, got 'up' and 'down'"),
        ("series,label,x\na,up,1\nb,,2\n", "every series must have a label or none of them, got none for 'b'"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xd8", "the column 'series' is missing"),
    ],
)
def test_a_csv_file_that_is_wrong_is_named_with_its_line(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_series(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a .ts file must have a line @data"),
        ("@data\n", "the file holds no series"),
        ("1,2,3\n@data\n", "line 1: a line before @data must begin with @ or #, got '1,2,3'"),
        ("@timeStamps true\n@data\n(0,1):a\n", "series with time stamps are not supported"),
        ("@targetlabel true\n@data\n1,2:0.5\n", "numbers as labels are not supported"),
        ("@data\n1,2\n1,?\n", "line 3: a value must be a finite number, got '?'"),
        ("@data\n1,2:1,2\n1,2\n", "every series must have the same features, got 1 and 2"),
        ("@data\n1,2:1\n", "line 2: all features of a series must be equally long, got 2, 1"),
        ("@classLabel true a b\n@data\n1,2:c\n", "labels must be out of a, b, got 'c'"),
        ("@classLabel true a b\n@data\n1,2\n", "line 3: a series must end in a colon and its label, got '1,2'"),
    ],
)
def test_a_ts_file_that_is_wrong_is_named_with_its_line(write, content, message):
    path = write(content, "series.ts")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_series(path)
    assert str(path) in str(caught.value)


def test_a_feature_that_is_missing_is_named(write):
    with pytest.raises(ValueError, match="the column 'z' is missing, the columns are series, label, x, y"):
        load_series(write(CSV), features=("x", "z"))


def test_what_is_no_series_file_is_refused(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="no series file"):
        load_series(tmp_path)
    with pytest.raises(ValueError, match=r"must be in a \.ts or \.csv file, got '\.txt'"):
        load_series(write(CSV, "series.txt"))


def test_indexing_keeps_what_belongs_to_a_series(write):
    found = load_series(write(CSV))
    second = found[torch.tensor([1])]
    assert second.series.tolist() == [[[4, 40]]] and second.names == ("b",)
    assert second.labels is not None and second.labels.tolist() == [0]
    assert found[2:].series.shape == (0, 0, 2)


def made_up(counts):
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    series = torch.arange(len(labels), dtype=torch.float32)[:, None, None]
    return SeriesSet(series, torch.ones(len(labels), dtype=torch.int64), labels, tuple("abc"))


def test_series_are_held_out_class_by_class():
    kept, held = hold_out(made_up([10, 2, 1]), 0.3, seed=1)
    assert held.labels is not None and torch.bincount(held.labels, minlength=3).tolist() == [3, 1, 0]
    assert sorted(torch.cat([kept.series, held.series]).flatten().tolist()) == list(range(13))
    assert torch.equal(hold_out(made_up([10, 2, 1]), 0.3, seed=1)[1].series, held.series)
    assert not torch.equal(hold_out(made_up([10, 2, 1]), 0.3, seed=2)[1].series, held.series)
    with pytest.raises(ValueError, match="no class has two series"):
        hold_out(made_up([1, 1, 1]), 0.3)
    with pytest.raises(ValueError, match=r"must be between 0 and 1, got 1\.0"):
        hold_out(made_up([10, 2, 1]), 1.0)


def test_standardising_ignores_the_padding_and_spares_constants(write):
    train = load_series(write("series,x,c\na,1,0.1\na,5,0.1\nb,3,0.1\n"))
    mean, deviation = mean_and_deviation(train)
    torch.testing.assert_close(mean, torch.tensor([3.0, 0.1]))
    torch.testing.assert_close(deviation, torch.tensor([(8 / 3) ** 0.5, 1.0]))
    scaled, other = standardise(train, load_series(write("series,x,c\nz,3,0.2\n", "other.csv")))
    assert scaled.series[1, 1].tolist() == [0, 0]
    torch.testing.assert_close(other.series, torch.tensor([[[0.0, 0.1]]]))


@pytest.mark.skipif(find_spec("sktime") is None, reason="the sets are inside sktime")
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("ItalyPowerDemand", (67, 24, 1), (1029, 24, 1), 2),
        ("BasicMotions", (40, 100, 6), (40, 100, 6), 4),
    ],
)
def test_the_bundled_sets_are_those_of_the_archive(name, train, test, classes):
    first, second = bundled(name)
    assert first.series.shape == train and second.series.shape == test
    assert len(first.classes) == classes and first.classes == second.classes


def test_an_unknown_set_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match=f"must be one of {', '.join(BUNDLED)}, got 'GunPint'"):
        bundled("GunPint")
