"""Evaluation without the packages of the extra `evaluate`, and the packages that its modules import."""

from fresh_process import run_fresh

WITHOUT = """
import contextlib
import io
import sys

for name in ("matplotlib", "scipy", "sklearn"):
    sys.modules[name] = None  # an import of it fails
"""
LINE = 'scipy is not installed; pip install "modeling-mfn[evaluate]" brings it'

LIGHT = """
import modeling_mfn.cli.evaluate
from modeling_mfn.evaluation import figures, intervals, metrics, report, result
from modeling_mfn.evaluation.measures import formatting, tasks

heavy = {"torch", "transformers", "datasets", "pandas"} & set(sys.modules)
assert not heavy, heavy
from modeling_mfn.evaluation import comparable
from modeling_mfn.evaluation.measures import perplexity, reconstruction
"""

MISSING = """
from modeling_mfn.cli.main import main
from modeling_mfn.evaluation.intervals import mean
from modeling_mfn.utils.extras import MissingExtra

try:
    mean([1.0, 2.0])
except MissingExtra as error:
    assert str(error) == sys.argv[1], error
else:
    raise SystemExit("an interval needs scipy")
printed = io.StringIO()
try:
    with contextlib.redirect_stderr(printed):
        main(["evaluate", "model", "--text", "text.txt"])
except SystemExit as ended:
    assert ended.code == 2, ended.code
assert printed.getvalue() == f"mfn: {sys.argv[1]}\\n", printed.getvalue()
"""


def test_modules_that_need_no_extra_import_without_it(tmp_path):
    run_fresh(WITHOUT + LIGHT, tmp_path)


def test_a_missing_extra_is_one_line(tmp_path):
    run_fresh(WITHOUT + MISSING, tmp_path, LINE)
