"""Sheets of first stages as one page: a column of numbers and a line of each chart a first stage."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ldmlab.files import write_text
from ldmlab.report.line_chart import Chart
from ldmlab.report.page_content import DASH, THUMBNAIL, Card, Charts, Gallery, Page, Row, Section, Table
from ldmlab.report.render import as_text, csv_text, write_pages
from ldmlab.report.score_lines import number_text, score_line, score_text

Sheet = Mapping[str, Any]  # sheet.json
_SHOWN = 16  # images of a row
_OF_PAIRS = ("psnr", "psnr_object", "ssim", "lpips", "psim")  # the same with all features
_WORDS = {"half_size": "at half size", "turned": "turned by 90 degrees"}
_CHANNELS = (
    "Of latents as a denoiser is trained on them. Kurtosis: 0 of a Gaussian; noise: the posterior's own deviation."
)
_NO_LPIPS = "LPIPS is left out: its weights are not on this machine (`ldmlab fetch lpips`)."


class Measure(NamedTuple):
    """A number of a sheet, as sheets.csv and the page have it."""

    name: str
    title: str
    value: float | None
    meaning: str
    text: str = ""  # as printed; empty: the value

    @property
    def cell(self) -> str:
        """The text, or a dash without a value."""
        return DASH if self.value is None else self.text or number_text(self.value)


def measures(sheet: Sheet) -> list[Measure]:
    """Every number of a sheet in reading order."""
    return [*_reconstruction(sheet), *_latents(sheet), *_codebook(sheet), *_generation(sheet)]


def _reconstruction(sheet: Sheet) -> Iterator[Measure]:
    for place, (features, result) in enumerate(sheet["reconstruction"].items()):
        for name, score in result["scores"].items():
            line, by = score_line(name, score, result), "" if name in _OF_PAIRS else f", {features}"
            if place == 0 or by:
                title = f"reconstruction: {line.head}{by}" if by else line.head
                yield Measure(f"reconstruction {name}{by}", title, score["value"], line.meaning, line.value)


def _latents(sheet: Sheet) -> Iterator[Measure]:
    own, images, smooth = sheet["spectrum"]["latents"], sheet["spectrum"]["images"], sheet["smoothness"]
    rank, between = sheet["statistics"]["effective_rank"], smooth["interpolation"]
    loss = smooth["noise"][0][1] - dict(map(tuple, smooth["noise"]))[0.4]
    high, slope = (f"{_text(own[name])} (images {_text(images[name])})" for name in ("high_band", "slope"))
    middle = f"{_text(between['middle'])} (at latents {_text(between['ends'])})"
    of_all = f"{_text(rank)} of {sheet['model']['latent'][0]}"
    words = "share of power above half of Nyquist's frequency; white noise about 0.75"
    yield Measure("effective_rank", "effective rank", rank, "of the channels' correlations", of_all)
    yield Measure("high_band", "high band", own["high_band"], words, high)
    yield Measure("slope", "slope of the spectrum", own["slope"], "log power over log frequency; white noise 0", slope)
    words = "dB of PSNR lost to noise of 0.4 of a channel's deviation on the latents"
    yield Measure("noise_loss", "noise response ↓", loss, words)
    words = "error of encoding what is decoded half-way between two latents, over the variance"
    yield Measure("half_way", "half-way latents ↓", between["middle"], words, middle)
    for name, errors in smooth["equivariance"].items():
        for part, moved in (("decoder", "latents decoded"), ("encoder", "images encoded")):
            meaning = f"error of {moved} {_WORDS[name]}, over the variance; 0: equivariant"
            yield Measure(f"{name}_{part}", f"{part}, {_WORDS[name]} ↓", errors[part], meaning)


def _codebook(sheet: Sheet) -> Iterator[Measure]:
    if book := sheet["codebook"]:
        yield Measure("codebook_use", "codebook use ↑", book["use"], "share of the codes that occur")
        yield Measure(
            "codebook_bits", "codebook entropy ↑", book["bits"], f"bits a code, at most {book['most_bits']:.1f}"
        )


def _generation(sheet: Sheet) -> Iterator[Measure]:
    """Means over the seeds, with their deviation."""
    seeds = sheet["generation"]
    for features in sheet["reconstruction"] if seeds else ():
        results = [seed["evaluations"][features] for seed in seeds]
        for name, score in results[0]["scores"].items():
            values = [result["scores"][name]["value"] for result in results]
            text = score_text(name, mean(values), stdev(values) if len(values) > 1 else None)
            title = f"generation: {score_line(name, score, results[0]).head}, {features}"
            meaning = f"samples of a small denoiser of these latents, {len(values)} of them trained"
            yield Measure(f"generation {name}, {features}", title, mean(values), meaning, text)


def _text(value: float | None) -> str:
    return Measure("", "", value, "").cell


def write_sheets(out: Path, sheets: Sequence[Sheet]) -> str:
    """report.html, report.md, points.csv of the charts and sheets.csv of the numbers; the numbers as text."""
    found = {one["label"]: {measure.name: measure.value for measure in measures(one)} for one in sheets}
    names = dict.fromkeys(name for row in found.values() for name in row)
    rows = [[label, *(row.get(name) for name in names)] for label, row in found.items()]
    write_text(out / "sheets.csv", csv_text([["first stage", *names], *rows]))
    write_pages(out, sheets_page(sheets), out)
    return as_text([_table(sheets)]).rstrip()


def sheets_page(sheets: Sequence[Sheet]) -> Page:
    """The page; images lie in the folders of the evaluations."""
    first, model = sheets[0], sheets[0]["model"]
    scored = next(iter(first["reconstruction"].values()))["sampling"]["images"]
    lead = f"Reconstructions of {scored:,} validation images of {model['image_size']} px, "
    lead += f"latents of {first['data']['images']:,} of them. "
    if made := first["generation"]:
        cost = f"{made[0]['parameters'] / 1e6:.1f} M parameters trained for {made[0]['flops'] / 1e12:.3g} TFLOP"
        lead += f"Generation: a denoiser of {cost}, the same for every first stage but for one step at most."
    sections = [
        Section("Numbers", [_table(sheets)]),
        Section("Spectrum and smoothness", [Charts(_charts(sheets))]),
        *(Section(f"Images of {one['label']}", list(_images(one))) for one in sheets),
        Section("Latents by channel", [_channels(sheets)]),
        *(Section(f"Settings and origin of {one['label']}", [_settings(one)]) for one in sheets),
    ]
    wanted = ("reconstruction psnr", "high_band", "half_size_decoder")
    chosen = [one for one in measures(first) if one.name in wanted or " fid, " in one.name] if len(sheets) == 1 else []
    tiles = [(one.title, re.split(r" [±(]", one.cell)[0], one.meaning) for one in chosen]
    return Page("First stage" if len(sheets) == 1 else "First stages", lead, sections, tiles)


def _table(sheets: Sequence[Sheet]) -> Table:
    found = [{measure.name: measure for measure in measures(one)} for one in sheets]
    rows = []
    for name, known in {name: one for row in found for name, one in row.items()}.items():
        cells = [row[name].cell if name in row else DASH for row in found]
        rows.append(Row("theirs", known.title, [*cells, known.meaning]))
    absent = any(result["perceptual"] is None for one in sheets for result in one["reconstruction"].values())
    heads = [*(one["label"] for one in sheets), "meaning"]
    return Table("Numbers", heads, rows, [_NO_LPIPS] * absent, "measure", True)


def _charts(sheets: Sequence[Sheet]) -> list[Chart]:
    spectra = {one["label"]: one["spectrum"]["latents"]["power"] for one in sheets}
    spectra["images at this size"] = sheets[0]["spectrum"]["images"]["power"]
    power = {
        name: [((k + 1) / len(curve), math.log10(value)) for k, value in enumerate(curve) if value > 0]
        for name, curve in spectra.items()
    }
    noise = {one["label"]: [(scale, psnr) for scale, psnr in one["smoothness"]["noise"]] for one in sheets}
    return [
        Chart("log10 of power (white noise: 0)", power, "frequency, of the highest"),
        Chart("PSNR with noise on the latents, dB", noise, "noise, of a channel's deviation"),
    ]


def _channels(sheets: Sequence[Sheet]) -> Table:
    names = {"mean": "mean", "std": "deviation", "kurtosis": "kurtosis", "noise": "noise"}
    rows = [
        Row("theirs", f"{one['label']}, {number}", [_text(channel.get(name)) for name in names])
        for one in sheets
        for number, channel in enumerate(one["statistics"]["channels"])
    ]
    return Table("", list(names.values()), rows, [_CHANNELS], "channel")


def _images(sheet: Sheet) -> Iterator[Gallery]:
    rebuilt = next(iter(sheet["reconstruction"].values()))
    rows = [("originals", rebuilt, "real"), ("reconstructions", rebuilt, "samples")]
    for seed in sheet["generation"]:
        result = next(iter(seed["evaluations"].values()))
        rows.append((f"samples of the denoiser, seed {seed['seed']}", result, "samples"))
    for title, result, kind in rows:
        cards = [Card([(one["file"], "")]) for one in result["images"][kind][:_SHOWN]]
        yield Gallery(Path(result["folder"]), cards, "thumbnails", title, THUMBNAIL)


def _settings(sheet: Sheet) -> Table:
    made, rows = sheet["provenance"], [(f"model: {name}", value) for name, value in sheet["model"].items()]
    rows += [(f"data: {name}", sheet["data"][name]) for name in ("folder", "manifest_hash")]
    for name, result in sheet["reconstruction"].items():
        network = result["features"]
        rows.append((f"features: {name}", f"{network['name']}, weights {network['weights_hash']}; {result['folder']}"))
    for one in sheet["generation"]:
        words = f"{one['steps']:,} steps, patch size {one['patch_size']}, {one['flops'] / 1e12:.4g} TFLOP"
        rows.append((f"denoiser, seed {one['seed']}", f"{words}; {one['folder']}"))
    rows += [(name, made[name]) for name in ("command", "commit", "time_utc")]
    return Table.of_pairs([(name, str(value)) for name, value in rows])
