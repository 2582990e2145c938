import pytest
import torch

from regard.data.text import decode, encode, python_reference, read_texts, split, standard_library, windows


def test_the_built_in_texts_are_real_and_always_the_same():
    reference = python_reference()
    assert 'The "assert" statement' in reference and len(reference) > 300_000
    python_reference.cache_clear()
    assert python_reference() == reference


def test_the_standard_library_holds_sources_but_no_tests():
    library = standard_library()
    assert "class TextWrapper:" in library and len(library) > 5_000_000
    assert "class TextWrapTestCase" not in library


def test_bytes_there_and_back():
    text = "naïve → 字"
    assert decode(encode(text)) == text
    assert len(encode("")) == 0
    assert decode(encode(text)[:3]) == "na\ufffd"


def test_split_is_by_position():
    train, validation = split(torch.arange(10), held_out=0.2)
    assert train.tolist() == list(range(8)) and validation.tolist() == [8, 9]
    with pytest.raises(ValueError, match=r"held_out must be between 0 and 1, got 1.0"):
        split(torch.arange(10), held_out=1.0)


def test_windows_are_stretches_of_the_text_chosen_by_the_generator():
    tokens = torch.arange(20, dtype=torch.uint8)
    drawn = windows(tokens, length=5, batch=200, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 6) and drawn.dtype == torch.int64
    assert (drawn[:, 1:] - drawn[:, :-1] == 1).all()
    assert drawn[:, 0].unique().tolist() == list(range(15))  # the first and the last place that fit included
    again = windows(tokens, length=5, batch=200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(length=20, batch=1), "the text must be longer than length 20, got 20 tokens"),
        (dict(length=0, batch=1), "length and batch must be at least 1, got length 0"),
        (dict(length=1, batch=0), "batch 0"),
    ],
)
def test_windows_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(torch.zeros(20, dtype=torch.uint8), **arguments)


def test_a_folder_of_texts_is_read_in_order(tmp_path):
    (tmp_path / "b.md").write_text("# second", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first ü", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 4}\n', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read_texts(tmp_path) == "first ü\n\n# second\n\nthird\n\nfourth"
    assert read_texts(str(tmp_path / "b.md")) == "# second"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt must be UTF-8 text; byte 3 is not"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl, line 1: must be an object with a string under 'text', got"),
        ("a.jsonl", b'["x"]', "line 1: must be an object"),
    ],
)
def test_a_broken_text_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path)


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing"):
        read_texts(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no text in .*; a folder should hold files that end in .txt"):
        read_texts(tmp_path)
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"table.csv must end in one of .txt, .md, .jsonl"):
        read_texts(tmp_path / "table.csv")
