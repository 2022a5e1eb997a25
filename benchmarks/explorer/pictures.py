"""Pictures of the explorer for README and docs: pages in light and dark, and a short recording.

    python -m benchmarks.explorer.pictures [MODEL] [--feature L16/123]

starts `mfn explore` on a model, by default that of `benchmarks.explorer.model`, drives Debian's Chromium through it and
writes docs/images/explorer-*.png and docs/images/explorer.gif. With `--review FOLDER`, whole pages at three widths in
both modes are written there, for looking at.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from PIL import Image
from playwright.sync_api import Page

from benchmarks.common import records
from benchmarks.explorer.load_times import chromium
from benchmarks.explorer.model import NAME
from modeling_mfn import FeatureAtlas
from modeling_mfn.demo.assets import cache_folder

IMAGES = records.REPOSITORY / "docs" / "images"
SIZE = {"width": 1280, "height": 860}
RECORDED = {"width": 960, "height": 640}
WIDTHS = (360, 1280, 2560)
MODES = ("light", "dark")
COLUMN, GAP, GREY = 420, 8, (128, 128, 128)
"""Width of a picture among others, space between them, and its colour."""
MAX_COLOURS = 64
PROMPT = "The king is dead, and the"
TIMES_TYPICAL = 4
MIN_FIRINGS = 200
PATIENCE = 120_000
"""Milliseconds that a page has for what it shows."""
SHOWN = {
    "features": ".ag-row",
    "feature/": "svg",
    "text": "[role=gridcell]",
    "steer": ".stream:has-text('tokens')",
    "why": "svg.why-picture",
}
"""Page -> selector of what it shows at last."""


@contextmanager
def explorer(model: Path) -> Iterator[str]:
    """Address of `mfn explore`, which runs until the end of the context."""
    command = [sys.executable, "-m", "modeling_mfn", "explore", str(model), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if found := re.search(r"http://\S+", line):
                    yield found.group().rstrip("/")
                    return
            raise RuntimeError("mfn explore ended without an address")
        finally:
            server.terminate()


def best_feature(atlas: FeatureAtlas) -> str:
    """Feature of the best label that a concept gave, which fires often enough to have many examples."""
    named = [label for label in atlas.labels if label.details.get("method") == "concept"]
    often = [label for label in named if atlas.row(label.feature)["firing_count"] >= MIN_FIRINGS]
    return max(often, key=lambda label: label.score or 0.0).feature


def addresses(feature: str, typical: float) -> dict[str, str]:
    """Name of a picture -> address of its page, after the server's.

    Args:
        feature: feature to show.
        typical: its mean activation.
    """
    text = quote(PROMPT)
    return {
        "list": "#/features?sort=auroc:desc",
        "feature": f"#/feature/{feature}",
        "text": f"#/text?text={text}",
        "steer": f"#/steer?prompt={text}&max=16&set={quote(f'{feature}=clamp:{TIMES_TYPICAL * typical:.3g}')}",
        "why": f"#/why?text={text}&top=4",
        "model": "#/model",
    }


def visit(page: Page, address: str) -> None:
    """Opens a page; on the page of steering, lets the model write."""
    page.goto(address)
    if "#/steer" in address:
        page.get_by_role("button", name="Generate").click()
    shown = next((selector for name, selector in SHOWN.items() if f"#/{name}" in address), "h1")
    page.wait_for_selector(shown, timeout=PATIENCE)
    page.wait_for_function("!document.querySelector('.loading, [aria-busy=true]')", timeout=PATIENCE)
    page.wait_for_timeout(800)


def small(picture: bytes) -> Image.Image:
    """Picture with few colours, without dithering."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    return image.quantize(MAX_COLOURS, dither=Image.Dither.NONE)


def of_documents(browser: Any, pages: dict[str, str]) -> None:
    """Writes the pictures of README and docs."""
    for mode in MODES:
        page = browser.new_page(viewport=SIZE, color_scheme=mode, bypass_csp=True)
        for name, rest in pages.items():
            visit(page, rest)
            page.mouse.move(0, 0)
            file = IMAGES / f"explorer-{name}-{mode}.png"
            small(page.screenshot()).save(file, optimize=True)
            print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB", flush=True)
        page.close()


def recording(browser: Any, pages: dict[str, str]) -> None:
    """Writes a recording: the list, a feature, a text read through features, and steered text."""
    page, frames = browser.new_page(viewport=RECORDED, color_scheme="light", bypass_csp=True), []
    for name in ("list", "feature", "text", "steer"):
        visit(page, pages[name])
        for _ in range(2 if name in ("feature", "steer") else 1):
            frames.append(small(page.screenshot()))
            page.mouse.move(RECORDED["width"] // 2, RECORDED["height"] // 2)
            page.mouse.wheel(0, 420)
            page.wait_for_timeout(300)
    page.close()
    file = IMAGES / "explorer.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1800, loop=0, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB", flush=True)


def at_all_widths(browser: Any, pages: dict[str, str], folder: Path | None) -> None:
    """Writes a picture per mode of all pages in windows of three widths, and the pages themselves into a folder."""
    for mode in MODES:
        rows = []
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=mode, bypass_csp=True)
            row = []
            for name, address in pages.items():
                visit(page, address)
                row.append(small(page.screenshot()).convert("RGB"))
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=folder / f"{name}-{width}-{mode}.png", full_page=True)
            page.close()
            rows.append(row)
        file = IMAGES / f"explorer-widths-{mode}.png"
        side_by_side(rows).quantize(MAX_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB", flush=True)


def side_by_side(rows: list[list[Image.Image]]) -> Image.Image:
    """One picture of all pictures: a column per page, a row per width of the window."""
    whole = Image.new("RGB", (len(rows[0]) * (COLUMN + GAP), sum(height_in_column(row[0]) + GAP for row in rows)), GREY)
    top = 0
    for row in rows:
        for place, picture in enumerate(row):
            height = height_in_column(picture)
            fitted = picture.resize((height * picture.width // picture.height, height), Image.Resampling.LANCZOS)
            whole.paste(fitted, (place * (COLUMN + GAP), top))
        top += height_in_column(row[0]) + GAP
    return whole


def height_in_column(picture: Image.Image) -> int:
    """Height at which a picture fits into a column."""
    return min(COLUMN * picture.height // picture.width, COLUMN)


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder of an MFN model with an atlas.")] = None,
    feature: Annotated[str | None, typer.Option(help="Feature to show. Default: that of the best label.")] = None,
    review: Annotated[Path | None, typer.Option(help="Folder for whole pages at all widths.")] = None,
) -> None:
    """Makes the pictures."""
    folder = model or cache_folder() / "explorer" / NAME
    atlas = FeatureAtlas.from_pretrained(folder)
    shown = feature or best_feature(atlas)
    rest = addresses(shown, atlas.row(shown)["mean_activation"])
    with explorer(folder) as address, chromium() as browser:
        pages = {name: f"{address}/{of}" for name, of in rest.items()}
        of_documents(browser, pages)
        recording(browser, pages)
        at_all_widths(browser, pages, review)


if __name__ == "__main__":
    typer.run(main)
