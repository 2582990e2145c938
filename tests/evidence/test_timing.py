"""Times that can be compared."""

from regard.evidence.timing import in_turn, ratio, timed
from regard.paper import Run


def test_the_result_comes_with_its_time():
    seconds, result = timed(lambda: "done")
    assert seconds >= 0 and result == "done"


def test_calls_take_turns_there_and_back(tmp_path):
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = in_turn(calls, 3, Run(seed=0, workdir=tmp_path))
    assert "".join(called) == "abc" + "abc" + "cba" + "abc"  # the first round does not count
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_that_of_most_rounds():
    assert ratio({"a": [2.0, 4.0, 90.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2
