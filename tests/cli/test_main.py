"""The command line as a whole: verbs, help, what it imports, what it says when something is wrong."""

import json
import subprocess
import sys
from importlib import import_module
from shlex import quote

import pytest

import regard
from regard.cli import main as cli
from regard.cli.options import UsageError, check_device, check_folder

HEAVY = ("torch", "numpy", "matplotlib", "transformers", "lightning", "pandas", "scipy")


def loaded(code: str) -> set[str]:
    """The modules that are loaded after the code has run in a fresh interpreter."""
    script = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import regard",
        "from regard.cli.main import main; assert main(['list']) == 0",
        "from regard.cli.main import main; assert main(['list', '--json']) == 0",
        "from regard.cli.main import main; assert main(['evidence', '--json']) == 0",
        "from regard.cli.main import main; assert main(['--help']) == 0",
        "from regard.cli.main import main; assert main(['train', '--help']) == 0",
        *(
            f"from regard.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass"
            for verb in ("run", "generate", "demo")
        ),
    ],
)
def test_what_only_looks_imports_nothing_heavy(code):
    assert not loaded(code) & set(HEAVY)


def test_the_global_help_imports_no_other_library_than_the_registry_needs():
    assert not loaded("from regard.cli.main import main; main(['--help'])") & {"tyro", "rich", "jinja2", "grimp"}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_file_and_its_help(verb, capsys):
    module = import_module(f"regard.cli.{verb}")
    assert module.__doc__
    try:
        assert module.main(["--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    assert f"regard {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"regard {regard.__version__}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lsit"], "regard: no verb 'lsit'; did you mean 'list'? (the verbs are list, "),
        (["trian"], "regard: no verb 'trian'; did you mean 'train'?"),
        (["run", "door", "--seeds", "0"], "regard: --seeds must be at least 1, got 0"),
        (["run", "door", "--only", "visit"], "regard: door makes no claim 'visit'; did you mean 'visits'?"),
        (["run", "door", "--device", "toaster"], "regard: --device must be one that is here (cpu"),
        (["show", "doro"], "regard: no paper 'doro'; did you mean 'door'? (regard list shows all "),
        (["run", "doro"], "regard: no paper 'doro'; did you mean 'door'?"),
        (["evidence", "doro"], "regard: no paper 'doro'; did you mean 'door'?"),
        (["bench", "mixer"], "regard: no bench 'mixer'; did you mean 'mixers'?"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence_and_2(house, words, sentence, capsys):
    house.add("door")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(sentence)
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["list", "--jsno"], ["run"], ["run", "x", "--seeds", "many"], ["show", "x", "y"]])
def test_words_that_do_not_parse_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err


def test_a_file_where_the_workdir_should_be(house, tmp_path, capsys):
    house.add("blocked")
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "blocked", "--workdir", str(tmp_path / "file" / "runs")]) == 2
    assert "--workdir must be a folder" in capsys.readouterr().err
    assert check_folder(tmp_path / "new" / "runs", "--workdir") == tmp_path / "new" / "runs"


def test_devices():
    assert check_device("cpu") == "cpu"
    with pytest.raises(UsageError):
        check_device("cuda:99")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("first\n  second"), "first second"),
        (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
        (OSError(28, "No space left on device", "f"), "f: No space left on device"),
        (OSError(28, "could not write f"), "could not write f"),
        (ZeroDivisionError(), "ZeroDivisionError: no more is known (--debug shows where)"),
    ],
)
def test_a_failure_is_one_sentence_and_1(error, sentence, monkeypatch, capsys):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["list"]) == 1
    assert capsys.readouterr().err == f"regard: {sentence}\n"


def test_debug_shows_where_wherever_it_stands(house):
    with pytest.raises(regard.papers.UnknownPaper):
        cli.main(["show", "--debug", "nowhere"])
    run = house.regard("show", "nowhere", "--debug")
    assert run.returncode == 1 and "Traceback" in run.stderr


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "regard: interrupted; nothing is left half-written\n"


def test_a_reader_that_has_seen_enough_is_no_failure(house):
    command = f"{quote(sys.executable)} -m regard.cli.main list --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], env=house.environment, capture_output=True, text=True)
    assert run.returncode == 0 and "Broken pipe" not in run.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_options(shell, tmp_path):
    path = tmp_path / "completion"
    try:
        cli.main(["--tyro-write-completion", shell, str(path)])
    except SystemExit as end:
        assert not end.code
    script = path.read_text()
    assert "evidence" in script and "record" in script
