"""Random damage to whatever the package reads: files, and settings and values of wrong types.

    python -m benchmarks.reliability.fuzz                           # 100,000 cases: under an hour on one core
    python -m benchmarks.reliability.fuzz --only labels --cases 500    # prints, and writes no result

A case reads one damaged example. It is read, it is refused with one of the reader's errors, or it fails: another error
escapes, it hangs, or it takes too much memory. Results: benchmarks/results/reliability/fuzz.json.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from tqdm.auto import tqdm
from transformers.utils import logging

from benchmarks.common import records
from benchmarks.reliability.mutations import damage_folder
from benchmarks.reliability.outcomes import FAILURES, READ, REFUSED
from benchmarks.reliability.readers import FILES, VALUES

FILE = records.RESULTS / "reliability" / "fuzz.json"
SECONDS = 10
"""Time after which a case hangs."""
MEBIBYTES = 1024
"""Memory that a case may add to the largest size of the process so far."""
SHARES = {"model": 0.3, "model to share": 0.3, "text": 0.1}
"""Share of cases of slow readers, compared with one of the others."""


class Case(NamedTuple):
    """A case, which always damages in the same way."""

    reader: str
    seed: int


class Outcome(NamedTuple):
    """Result of a case."""

    case: Case
    outcome: str
    """`READ`, `REFUSED` or one of `FAILURES`."""
    detail: str = ""
    """Error, and the innermost line of the package that raised it."""


class Hung(BaseException):
    """The time of a case is over. No reader may catch it as an error of the input."""


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Context that raises `Hung` after `SECONDS`."""

    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def size() -> int:
    """Largest size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def example(reader: str, folder: Path) -> Path:
    """Folder with a valid example of a reader, made on first use."""
    made = folder / reader.replace(" ", "-")
    if not made.exists():
        made.mkdir(parents=True)
        FILES[reader].make(made)
    return made


def run_case(case: Case, folder: Path) -> Outcome:
    """Damages an example and reads it. Examples are kept in a folder."""
    random_ = random.Random(f"{case.reader}-{case.seed}")
    refusals = (FILES.get(case.reader) or VALUES[case.reader]).refusals
    before = size()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            with limited_time(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if case.reader in FILES:
                    damaged = Path(shutil.copytree(example(case.reader, folder), Path(scratch, "damaged")))
                    damage_folder(damaged, random_)
                    FILES[case.reader].read(damaged)
                else:
                    VALUES[case.reader].read(random_)
            outcome, detail = READ, ""
        except Hung:
            outcome, detail = "hung", f"more than {SECONDS} s"
        except refusals:
            outcome, detail = REFUSED, ""
        except BaseException as error:
            outcome, detail = "escaped", told(error)
    if outcome in (READ, REFUSED) and size() - before > MEBIBYTES:
        return Outcome(case, "large", f"{size() - before} MiB")
    return Outcome(case, outcome, detail)


def told(error: BaseException) -> str:
    """Error and the innermost line of the package that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling_mfn" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside the package"
    return f"{type(error).__name__} at {place}: {str(error)[:120]}"


def begin_process(folder: str) -> None:
    """Sets up a process: one thread, no messages, limited memory, and a folder of its own for examples."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    os.chdir(tempfile.mkdtemp(dir=folder))


def run_in_process(case: Case) -> Outcome:
    """Runs a case in a process that `begin_process` set up."""
    return run_case(case, Path.cwd())


def cases_of(readers: list[str], number: int, seed: int) -> list[Case]:
    """Cases of some readers, in random order."""
    weights = {reader: SHARES.get(reader, 1.0) for reader in readers}
    cases = [
        Case(reader, place)
        for reader, weight in weights.items()
        for place in range(round(number * weight / sum(weights.values())))
    ]
    random.Random(seed).shuffle(cases)
    return [case._replace(seed=seed * 10**6 + case.seed) for case in cases]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Outcomes by reader, and each kind of failure with its count and its first case."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[str, dict[str, Any]] = {}
    for found in sorted(outcomes):
        counts[found.case.reader][found.outcome] += 1
        if found.outcome in FAILURES:
            kind = f"{found.case.reader}: {found.outcome}, {found.detail.partition(': ')[0]}"
            kept = failures.setdefault(kind, {"cases": 0, "seed": found.case.seed, "detail": found.detail})
            kept["cases"] += 1
    return {"readers": {reader: dict(of) for reader, of in counts.items()}, "failures": failures}


def main(
    cases: Annotated[int, typer.Option(help="Number of cases.")] = 100_000,
    only: Annotated[str, typer.Option(help="Pattern that the names of readers must match.")] = "*",
    seed: Annotated[int, typer.Option(help="Seed of the damage.")] = 0,
    processes: Annotated[int, typer.Option(help="Cases at a time.")] = 2,
) -> None:
    """Runs the cases, prints the failures, and writes the result of a complete run. Fails if a case fails."""
    readers = [reader for reader in (*FILES, *VALUES) if fnmatch.fnmatch(reader, only)]
    chosen = cases_of(readers, cases, seed)
    # spawned, because a fork would inherit locks of torch's threads
    processes_of, scratch = get_context("spawn"), tempfile.TemporaryDirectory
    with scratch() as folder, processes_of.Pool(processes, begin_process, (folder,)) as pool:
        outcomes = list(tqdm(pool.imap_unordered(run_in_process, chosen, 16), total=len(chosen), mininterval=10))
    found = summary(outcomes)
    for kind, of in found["failures"].items():
        print(f"{of['cases']} x {kind}; first: seed {of['seed']}, {of['detail']}")
    counts = Counter(outcome.outcome for outcome in outcomes)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if only == "*":
        record = {"command": records.command_line("reliability.fuzz"), "commit": records.COMMIT, "seed": seed}
        records.write_record(FILE, record | {"cases": len(chosen)} | found)
    if found["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
