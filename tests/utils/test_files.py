"""A folder is replaced as a whole. A kill leaves the older or the newer one, under a name that is told."""

import os
import resource

import pytest

from modeling_mfn.features.atlas.storage import check_atlas_folder
from modeling_mfn.utils.files import begin_unfinished, check_output, check_space, new_folder, unfinished, write_whole


@pytest.fixture
def output(tmp_path):
    """Folder with a result of this package."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "explanation.json").write_text("old")
    return folder


class Killed(BaseException):
    """Stands for a kill: no code of the package catches it, and `finally` clauses are switched off."""


@pytest.mark.parametrize(("renames", "left"), [(0, {"out"}), (1, {"out.replaced"}), (2, {"out", "out.replaced"})])
def test_a_kill_between_two_renames_leaves_the_older_folder_by_name(output, monkeypatch, renames, left):
    real, done = os.replace, []

    def replace(*paths):
        if len(done) == renames:
            raise Killed
        done.append(paths)
        real(*paths)

    def remove(folder, ignore_errors=False):
        if renames == 2 and str(folder).endswith(".replaced") and len(done) == 2:
            raise Killed

    def write():
        with new_folder(output, overwrite=True) as folder:
            (folder / "explanation.json").write_text("new")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        patched.setattr("shutil.rmtree", remove)
        with pytest.raises(Killed):
            write()
    found = {path.name: (path / "explanation.json").read_text() for path in output.parent.iterdir()}
    assert found.keys() - {"out.unfinished"} == left
    assert {name: text for name, text in found.items() if text == "old"}
    if renames == 1:
        with pytest.raises(ValueError, match=r"the older one is .*out\.replaced, and the new one is .*out\.unfinished"):
            check_output(output, overwrite=True)
        (output.parent / "out.replaced").rename(output)
    write()
    assert {path.name: (path / "explanation.json").read_text() for path in output.parent.iterdir()} == {"out": "new"}


def test_a_failed_rename_leaves_everything_as_it_was(output, monkeypatch):
    real = os.replace

    def replace(source, target):
        if str(source).endswith(".unfinished"):
            raise PermissionError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError), new_folder(output, overwrite=True) as folder:
        (folder / "explanation.json").write_text("new")
    assert {path.name: (path / "explanation.json").read_text() for path in output.parent.iterdir()} == {"out": "old"}


@pytest.mark.parametrize("ending", ["unfinished", "replaced"])
def test_an_input_that_the_command_would_remove_is_refused(output, ending):
    source = output.with_name(f"out.{ending}") / "checkpoint-5"
    source.mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"checkpoint-5 is in .*out\.{ending}, which the command would remove"):
        check_output(output, overwrite=True, inputs=[source])


def test_an_atlas_that_was_being_replaced_is_not_taken_for_none(tmp_path):
    (tmp_path / "features.replaced").mkdir()
    with pytest.raises(ValueError, match=r"features was being replaced .* the older one is .*features\.replaced"):
        check_atlas_folder(tmp_path)


def test_a_full_disk_is_found_before_the_work(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses both in the same place."""
    check_space(tmp_path / "new" / "out", 10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"out cannot take 10,000 bytes: File too large"):
            check_space(tmp_path / "new" / "out", 10_000)
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "file", b"0" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="out cannot take 1 bytes: Not a directory"):
        check_space(tmp_path / "file" / "out")


def test_a_save_that_was_killed_does_not_stop_the_next_one(tmp_path):
    """Code is written first, before the config that names it."""
    killed = unfinished(tmp_path / "out") / ".saving"
    killed.mkdir(parents=True)
    (killed / "conversion.py").touch()
    assert list(begin_unfinished(tmp_path / "out").iterdir()) == []
