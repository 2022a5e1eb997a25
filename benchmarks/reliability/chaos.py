"""Kills, full disks and read-only disks, and the output that they leave behind.

    python -m benchmarks.reliability.chaos                          # 200 kills, and full and read-only disks
    python -m benchmarks.reliability.chaos --only 'harvest*' --kills 20    # prints, and writes no result

A command is killed (SIGKILL) at a random moment of its work. Then its output must be the older one or the newer one,
each as a whole, or an error must name the place where it is. Then the command runs once more, with `--resume` where it
has that. The result must equal that of a run without a kill, bit for bit. Disks need root, for `mount`.
Results: benchmarks/results/reliability/chaos.json.
"""

from __future__ import annotations

import os

from benchmarks.reliability.hub import HUB

os.environ |= HUB.environment("no-cache")  # read by huggingface_hub when it is imported

import contextlib
import fnmatch
import hashlib
import io
import multiprocessing
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from tqdm.auto import tqdm

from benchmarks.common import records
from benchmarks.reliability import readers
from modeling_mfn import FeatureAtlas, MFNForCausalLM

FILE = records.RESULTS / "reliability" / "chaos.json"
DISK_KILOBYTES = 2_000
"""Size of the small disk, which an older output nearly fills."""
REPOSITORY, KEPT = "me/out", "hub.pickle"
TEXTS = ["--text", "text.txt", "--window", "8", "--batch-size", "2"]
TRAINING = [*TEXTS, "--steps", "24", "--save-steps", "4"]


class Scenario(NamedTuple):
    """A command that is killed, in a folder with the models `old` and `new`, a text, and perhaps an older output."""

    run: Callable[[], None]
    """Runs the command in the current folder."""
    digest: Callable[[], str]
    """Returns a digest of the output, as its readers see it; `ValueError` or `OSError` if they refuse it."""
    older: Callable[[], None] | None = None
    """Makes an older output."""
    again: Callable[[], None] | None = None
    """Runs the command once more after a kill; `run` if `None`."""
    on_disk: bool = True
    """False if the output goes to the Hub, so that the disk does not matter."""


def digest_of_model(folder: str) -> str:
    """Digest of a model's weights and settings."""
    model = MFNForCausalLM.from_pretrained(folder)
    found = hashlib.sha256(f"{model.config.k} {model.config.alpha}".encode())
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def digest_of_atlas(folder: str) -> str:
    """Digest of an atlas."""
    atlas = FeatureAtlas.from_pretrained(folder)
    tables = (atlas.features.to_pylist(), atlas.examples.to_pylist())
    return hashlib.sha256(repr((atlas.metadata["data"], *tables)).encode()).hexdigest()


def digest_of_results(folder: str) -> str:
    """Digest of the results. The report tells what is known so far, and is made of them."""
    return hashlib.sha256(b"".join(Path(folder, name).read_bytes() for name in ("P1.json", "further.json"))).hexdigest()


def digest_of_repository() -> str:
    """Digest of the files of the repository. `OSError` if it has no model."""
    repositories, _ = pickle.loads(Path(KEPT).read_bytes())
    repository = repositories.get(REPOSITORY)
    files = repository.commits[repository.branches["main"]] if repository else {}
    if "config.json" not in files:
        raise OSError("the repository has no model")
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def mfn(arguments: list[str]) -> None:
    """Runs the command line in this process."""
    sys.argv = ["mfn", *arguments]
    runpy.run_module("modeling_mfn", run_name="__main__")


def resumed(*arguments: str) -> Callable[[], None]:
    """Command with `--resume`, or with `--overwrite` where nothing can be resumed."""

    def run() -> None:
        try:
            mfn([*arguments, "--resume"])
        except SystemExit as error:
            if error.code:
                mfn([*arguments, "--overwrite"])

    return run


def save(source: str) -> Callable[[], None]:
    """Saves a model into `out`."""
    return lambda: MFNForCausalLM.from_pretrained(source).save_pretrained("out")


def command(*arguments: str) -> Callable[[], None]:
    """Command of `mfn`."""
    return lambda: mfn([*arguments])


OLD_MODEL = command("train", "old", "out", *TEXTS, "--steps", "2")
OLD_ATLAS = command("atlas", "old", "out", *TEXTS)
SCENARIOS: dict[str, Scenario] = {
    "save": Scenario(save("new"), lambda: digest_of_model("out")),
    "save over a model": Scenario(save("new"), lambda: digest_of_model("out"), save("old")),
    "convert over a model": Scenario(
        command("convert", "base", "out", "--num-features", "24", "--k", "4", "--overwrite"),
        lambda: digest_of_model("out"),
        save("old"),
    ),
    "train": Scenario(
        command("train", "new", "out", *TRAINING),
        lambda: digest_of_model("out"),
        again=resumed("train", "new", "out", *TRAINING),
    ),
    "train over a model": Scenario(
        command("train", "new", "out", *TRAINING, "--overwrite"),
        lambda: digest_of_model("out"),
        OLD_MODEL,
    ),
    "harvest": Scenario(
        command("atlas", "new", "out", *TEXTS),
        lambda: digest_of_atlas("out"),
        again=resumed("atlas", "new", "out", *TEXTS),
    ),
    "harvest over an atlas": Scenario(
        command("atlas", "new", "out", *TEXTS, "--overwrite"), lambda: digest_of_atlas("out"), OLD_ATLAS
    ),
    "evaluate": Scenario(
        command(
            "evaluate", "new", "--text", "text=text.txt", "--window", "8", "--predictions", "P1", "--output", "out"
        ),
        lambda: digest_of_results("out"),
    ),
    "push": Scenario(command("push", "new", REPOSITORY), digest_of_repository, on_disk=False),
    "push over a model": Scenario(
        command("push", "new", REPOSITORY), digest_of_repository, command("push", "old", REPOSITORY), on_disk=False
    ),
}


def write_inputs(folder: Path) -> None:
    """Writes a base model, two MFN models made from it, and a text."""
    for name, k in (("old", 4), ("new", 6)):
        model = readers.model()
        model.set_k(k)
        torch.manual_seed(k)
        with torch.no_grad():
            for layer in model.mfn_layers.values():
                layer.encoder.weight += 0.01 * torch.randn_like(layer.encoder.weight)
        model.save_pretrained(folder / name)
        readers.tokenizer().save_pretrained(folder / name)
    readers.base().save_pretrained(folder / "base")
    readers.tokenizer().save_pretrained(folder / "base")
    words = random.Random(0).choices([f"w{number}" for number in range(3, readers.VOCABULARY)], k=4000)
    (folder / "text.txt").write_text("\n".join(" ".join(words[at : at + 20]) for at in range(0, 4000, 20)))


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[None]:
    """Context in which the Hub has the repositories that a file of the folder keeps."""
    file = folder / KEPT
    HUB.reset()
    if file.exists():
        HUB.repositories, HUB.objects = pickle.loads(file.read_bytes())
    yield
    if HUB.repositories:
        file.write_bytes(pickle.dumps((HUB.repositories, HUB.objects)))


def in_child(work: Callable[[], Any], folder: Path, kill_after: float | None = None) -> tuple[str, float]:
    """Runs work in a forked process with `folder` as current folder, and kills it after some seconds.

    A forked process has imported everything already, so that kills meet the work itself.

    Returns:
        What the work returned, as text, "refused: ..." for an error that refuses input, or "killed"; and its seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with hub_of(folder):
        process = context.Process(target=_work, args=(work, folder, sender))
        begun = time.monotonic()
        process.start()
        process.join(kill_after)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        took = time.monotonic() - begun
    return (receiver.recv() if receiver.poll() else "killed"), took


def _work(work: Callable[[], Any], folder: Path, sender: Any) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    with io.StringIO() as told, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            sender.send(str(work()))
        except (ValueError, OSError) as error:
            sender.send(f"refused: {error}")
        except SystemExit as error:
            sender.send("done" if not error.code else f"refused: {told.getvalue().strip().splitlines()[-1]}")
        except BaseException as error:
            sender.send(f"escaped: {type(error).__name__}: {error}")


class Prepared(NamedTuple):
    """A scenario with its inputs and an older output, and what a run without a kill gives."""

    scenario: Scenario
    folder: Path
    older: str | None
    newer: str
    seconds: float


def prepare(scenario: Scenario, folder: Path) -> Prepared:
    """Writes inputs and the older output, and runs the command once without a kill."""
    folder.mkdir()
    in_child(lambda: write_inputs(folder), folder)
    older = None
    if scenario.older is not None:
        in_child(scenario.older, folder)
        older = in_child(scenario.digest, folder)[0]
    whole = folder.with_name(f"{folder.name}-whole")
    shutil.copytree(folder, whole)
    outcome, seconds = in_child(scenario.run, whole)
    newer = in_child(scenario.digest, whole)[0]
    if outcome.startswith(("refused", "escaped")) or newer == older or ":" in newer:
        raise RuntimeError(f"the command does not work: {outcome}, {newer}")
    return Prepared(scenario, folder, older, newer, seconds)


def kill_once(prepared: Prepared, share: float) -> str:
    """Kills the command after a share of its time. Returns what was left, and what was wrong with it, if anything."""
    scenario = prepared.scenario
    with tempfile.TemporaryDirectory(dir=prepared.folder.parent) as scratch:
        folder = Path(shutil.copytree(prepared.folder, Path(scratch, "work")))
        outcome, _ = in_child(scenario.run, folder, share * prepared.seconds)
        left, _ = in_child(scenario.digest, folder)
        names = {prepared.older: "older", prepared.newer: "newer"}
        found = names.get(left) or _refusal(left, prepared.older is not None)
        if found == "named":
            complete_by_hand(folder)
        again, _ = in_child(scenario.again or scenario.run, folder)
        final, _ = in_child(scenario.digest, folder)
        if final != prepared.newer:
            return f"wrong: {found} after {outcome}, then {again[:200]}, {final[:200]}"
    return found


def _refusal(left: str, was_there: bool) -> str:
    """Name of what a reader's refusal means."""
    if not left.startswith("refused"):
        return f"wrong: {left[:200]}"
    if any(name in left for name in (".replaced", ".saved", ".unfinished")):
        return "named"
    return f"wrong: the older output is lost: {left[:200]}" if was_there else "none"


def complete_by_hand(folder: Path) -> None:
    """Does what the refusal asks for: moves the newer files to their place, or gives the older folder its name back."""
    out = folder / "out"
    if (out / ".saved").is_dir():
        for file in (out / ".saved").iterdir():
            os.replace(file, out / file.name)
        (out / ".saved").rmdir()
    for place in (out, out / "features"):
        older = place.with_name(f"{place.name}.replaced")
        if older.exists() and not place.exists():
            os.replace(older, place)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Context with a mounted disk of `DISK_KILOBYTES`."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_KILOBYTES}k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def disk_once(prepared: Prepared, free_kilobytes: int | None) -> str:
    """Runs the command on a disk with little space, or on a read-only one (`None`). Returns what was left."""
    with tempfile.TemporaryDirectory() as scratch, small_disk(Path(scratch)) as disk:
        folder = Path(shutil.copytree(prepared.folder, disk / "work"))
        if free_kilobytes is None:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            room = shutil.disk_usage(disk).free - 1024 * free_kilobytes
            (disk / "filling").write_bytes(b"0" * max(0, room))
        outcome, _ = in_child(prepared.scenario.run, folder)
        left, _ = in_child(prepared.scenario.digest, folder)
    names = {prepared.older: "older", prepared.newer: "newer"}
    found = names.get(left) or _refusal(left, prepared.older is not None)
    if outcome.startswith("escaped") or (outcome == "done" and left != prepared.newer):
        return f"wrong: {outcome[:200]}, {found}"
    return found


def main(
    kills: Annotated[int, typer.Option(help="Kills in all.")] = 200,
    only: Annotated[str, typer.Option(help="Pattern that the names of scenarios must match.")] = "*",
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kills the commands, prints what was left, and writes the result of a complete run. Fails if anything is wrong."""
    chosen = [name for name in SCENARIOS if fnmatch.fnmatch(name, only)]
    moments, found = random.Random(seed), {}
    progress = tqdm(total=kills // len(chosen) * len(chosen), mininterval=10)
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            prepared = prepare(SCENARIOS[name], Path(scratch, "inputs"))
            outcomes: dict[str, list[str]] = {"killed": []}
            for _ in range(kills // len(chosen)):
                outcomes["killed"].append(kill_once(prepared, moments.random()))
                progress.update()
            if os.geteuid() == 0 and SCENARIOS[name].on_disk:
                outcomes["full disk"] = [disk_once(prepared, kilobytes) for kilobytes in (0, 4, 16, 64, 256)]
                outcomes["read-only disk"] = [disk_once(prepared, None)]
        found[name] = {how: dict(Counter(left)) for how, left in outcomes.items()}
        print(name, found[name], flush=True)
    if only == "*":
        record = {"command": records.command_line("reliability.chaos"), "commit": records.COMMIT, "seed": seed}
        records.write_record(FILE, record | {"kills": kills, "left": found})
    if any(left.startswith("wrong") for of in found.values() for outcomes in of.values() for left in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    with HUB:
        typer.run(main)
