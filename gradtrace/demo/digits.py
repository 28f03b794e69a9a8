"""Drawn digits for a demo that needs no extra data: synthetic throughout, and said to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradtrace.demo.data import Recordings, Windows

FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
"""The digits 0 to 9 as five-by-seven dots."""

ROWS, COLUMNS = 24, 20
WRITERS, PICTURES = 6, 20  # writers per site; pictures per writer: each digit twice


@dataclass(frozen=True)
class Site:
    """How one pretended camera sees the ink."""

    contrast: float
    noise: float  # standard deviation


SITES = {"bright": Site(contrast=1.0, noise=0.05), "faint": Site(contrast=0.6, noise=0.15)}

STORY = (
    f"Synthetic pictures, drawn by this program and by nobody else: digits from a dot-matrix font, {ROWS} x {COLUMNS} "
    f"pixels, by {WRITERS} pretended writers at each of two pretended sites, every writer with a slant and position of "
    "their own; the site `faint` has less contrast and more noise. The networks learn the right half of a picture from "
    "its left half, row by row."
)
CAVEAT = (
    "The data are synthetic and the sites differ by design, in contrast and noise: a gap between them shows how such a "
    "difference looks during learning, and is no finding about anything."
)


def draw_digits(seed: int) -> Recordings:
    """Pictures of all writers, with the groupings `site` and `parity` (of the digit)."""
    rng = np.random.default_rng(seed)
    pictures, person, site_of, parity = [], [], [], []
    for site, seen_by in SITES.items():
        for writer in range(WRITERS):
            slant, across, down = rng.uniform(-0.2, 0.2), rng.integers(0, 6), rng.integers(0, 4)
            for digit in (number % 10 for number in range(PICTURES)):
                ink = _draw(digit, slant, int(across), int(down))
                pictures.append(seen_by.contrast * ink + seen_by.noise * rng.standard_normal(ink.shape))
                person.append(f"{site}/{writer}")
                site_of.append(site)
                parity.append("odd" if digit % 2 else "even")
    seen = np.stack(pictures).astype(np.float32)
    middle = COLUMNS // 2
    labels = {"site": np.array(site_of), "parity": np.array(parity)}
    windows = Windows(seen[..., :middle], seen[..., middle:], np.array(person), labels)
    return Recordings(
        windows,
        "Drawn digits (synthetic), two sites: gradient spectra while three networks learn",
        STORY,
        CAVEAT,
        _pixels,
    )


def _draw(digit: int, slant: float, across: int, down: int) -> np.ndarray:
    dots = np.array([[int(dot) for dot in row] for row in FONT[digit].split()], dtype=float)
    glyph = np.kron(dots, np.ones((3, 3)))  # 21 x 15
    ink = np.zeros((ROWS, COLUMNS))
    ink[down : down + glyph.shape[0], across : across + glyph.shape[1]] = glyph
    middle = ROWS // 2
    return np.stack([np.roll(row, round(slant * (middle - at))) for at, row in enumerate(ink)])


def _pixels(halves: np.ndarray) -> np.ndarray:
    return halves.reshape(len(halves), -1)
