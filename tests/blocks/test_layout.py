import pytest

from regard.blocks.layout import parse_layout


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("conv", "conv"),
        ("(conv linear)*3 window", "conv linear conv linear conv linear window"),
        ("conv*2 linear", "conv conv linear"),
        ("(a (b c)*2) * 2", "a b c b c a b c b c"),
        ("(a)(b)", "a b"),
        ("(conv linear window conv conv)*5 conv conv", "conv linear window conv conv " * 5 + "conv conv"),
    ],
)
def test_a_layout_reads_as_it_is_written(layout, layers):
    assert parse_layout(layout) == tuple(layers.split())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("", "it names no layer"),
        ("  ", "it names no layer"),
        ("(a b", "a parenthesis is not closed"),
        ("a b)", "a parenthesis is closed that was not opened"),
        ("a ()", "a group is empty"),
        ("a*0", "a repetition must be at least 1, got 0"),
        ("a*-2", "a repetition must be at least 1, got -2"),
        ("*3 a", "nothing stands before \\*"),
        ("(*2)", "nothing stands before \\*"),
        ("a * b", "'\\*' has no meaning here"),
        ("a, b", "',' has no meaning here"),
    ],
)
def test_what_is_wrong_with_a_layout_is_said(layout, message):
    with pytest.raises(ValueError, match=f"layout must be names.*got .*: {message}"):
        parse_layout(layout)
