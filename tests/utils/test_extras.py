"""A missing optional package is one line, in Python and on the command line."""

import pytest

from modeling_mfn.cli import main as command_line
from modeling_mfn.utils.extras import MissingExtra, needs

LINE = 'no_such_package is not installed; pip install "modeling-mfn[evaluate]" brings it'


def import_it():
    with needs("evaluate"):
        import no_such_package.inside  # noqa: F401


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingExtra) as caught:
        import_it()
    assert str(caught.value) == LINE
    assert isinstance(caught.value, ImportError)


def test_what_no_extra_brings_is_not_hidden():
    with pytest.raises(ModuleNotFoundError, match=r"modeling_mfn\.nowhere"), needs("evaluate"):
        import modeling_mfn.nowhere  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nothing'"), needs("evaluate"):
        from json import nothing  # noqa: F401


def test_the_command_line_shows_the_line_and_ends_with_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "app", lambda args: import_it())
    with pytest.raises(SystemExit) as ended:
        command_line.main(["evaluate"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mfn: {LINE}\n"
    with pytest.raises(MissingExtra):
        command_line.main(["--debug", "evaluate"])
