"""Draws by rank without sorting keep what draws after sorting would, and are made once."""

from dataclasses import replace

import numpy as np
import pytest

from expunge.merge import draws, fused, plain
from expunge.merge.codec import BFLOAT16, BLOCK, FLOAT32
from expunge.merge.fused import ALWAYS, NEVER, Election, Rounding, Tally, Trim
from expunge.merge.operands import Slice

ROWS = {
    "distinct": lambda rng, n: rng.standard_normal(n),
    "stored halves": lambda rng, n: np.round(rng.standard_normal(n) * 64) / 64,
    "two values": lambda rng, n: rng.choice([-1.0, 0.5], n),
    "all alike": lambda rng, n: np.zeros(n),
    "many octaves": lambda rng, n: np.ldexp(rng.standard_normal(n), rng.integers(-60, 60, n)),
    "close together": lambda rng, n: 1 + rng.integers(0, 3, n) * 2.0**-23,
    "one far away": lambda rng, n: np.where(np.arange(n) == n // 2, 1e30, rng.standard_normal(n)),
}


def piece_of(rows: list[np.ndarray], start: int) -> Slice:
    base = np.zeros(rows[0].size, np.float32)
    raws = tuple(row.astype(np.float32).view(np.uint8) for row in rows)
    kinds = np.full(len(rows), FLOAT32, np.int64)
    return Slice(start, base.size, base.view(np.uint8), FLOAT32, raws, kinds)


def trim_of(columns: int, drawn=None, models: int = 2) -> Trim:
    return Trim(
        bounds=np.array([[NEVER, ALWAYS]] * models, np.int64),
        keys=np.arange(3, 3 + models, dtype=np.uint64),
        odds=np.array([0.5, 0.8][:models], np.float32),
        scales=np.ones(models, np.float32),
        spread=np.array([0.4, 0.1][:models], np.float32),
        columns=columns,
        drawn=drawn,
    )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("columns", [1, 2, 7, 1000])
def test_what_stays_is_what_sorting_would_keep(name, columns):
    rng = np.random.default_rng(0)
    piece = piece_of([ROWS[name](rng, 20 * columns) for _ in range(2)], 40 * columns)
    found = fused.measure(piece, trim_of(columns))
    np.testing.assert_allclose(found, plain.measure(piece, trim_of(columns)), rtol=1e-6)
    trim = trim_of(columns, drawn={})
    fused.measure(piece, trim)
    kept = trim.drawn[piece.start]
    for i, row in enumerate(piece.deltas.reshape(2, -1, columns)):
        places = np.abs(row).argsort(1, kind="stable").argsort(1).astype(np.float32)
        share = places / max(1, columns - 1) if columns > 1 else places + np.float32(0.5)
        low, span = trim.odds[i] - trim.spread[i], np.float32(2) * trim.spread[i]
        chance = (low + share * span).astype(np.float32).ravel()
        values = plain.uniform(int(trim.keys[i]), piece.start, piece.n).cpu().numpy()
        np.testing.assert_array_equal(kept[i], values < chance)


@pytest.mark.parametrize("n", [1, 63, 64, 16384, 40001])
@pytest.mark.parametrize("kind", ["drawn", "bounded", "by rank"])
def test_sums_are_those_of_the_numbers_that_stay(n, kind):
    rng = np.random.default_rng(2)
    piece = piece_of([rng.standard_normal(n) for _ in range(2)], 3 * n)
    trim = trim_of(n) if kind == "by rank" else replace(trim_of(n), spread=None)
    if kind == "bounded":
        inner = np.float32(0.5).view(np.int32)
        trim = replace(trim, bounds=np.array([[NEVER, (inner, ALWAYS[1])]] * 2, np.int64))
    assert trim.draws_alone == (kind == "drawn")
    sums, energies = fused.measure(piece, trim), fused.energies(piece, trim)
    np.testing.assert_allclose(sums, plain.measure(piece, trim), rtol=1e-12)
    np.testing.assert_allclose(energies, plain.energies(piece, trim), rtol=1e-12)
    assert n == 1 or (sums[:, 1] < sums[:, 0]).all()


@pytest.mark.parametrize("kind", [np.uint32, np.int64])
def test_the_place_of_the_kth_greatest_is_found_from_the_top(kind):
    rng = np.random.default_rng(3)
    hists = rng.integers(0, 3, (4, 2, 5000)).astype(kind)
    hists[:, :, ::7] = 0
    for row in range(2):
        counts = hists[:, row].sum(0).astype(int)
        places = np.repeat(np.arange(5000), counts)[::-1]
        for number in (1, 2, len(places) // 2, len(places)):
            place, left, here = fused.descend(hists, row, number)
            assert (place, here) == (places[number - 1], counts[place])
            assert left == number - (places > place).sum()
        place, left, here = fused.descend(hists, row, len(places) + 1)
        assert left > here


def test_what_was_drawn_to_measure_is_not_drawn_again(monkeypatch):
    rng = np.random.default_rng(1)
    piece = piece_of([rng.standard_normal(6000) for _ in range(2)], 0)
    election = Election(np.array([0.7, 0.7], np.float32), elect=True, weighted=True)

    def elected(trim):
        return fused.elect(piece, trim, election, Rounding(BFLOAT16), Tally())

    expected = elected(trim_of(1000))
    trim = trim_of(1000, drawn={})
    fused.measure(piece, trim)
    monkeypatch.setattr(fused, "_ranks", None)  # nothing could be drawn any more
    np.testing.assert_array_equal(elected(trim), expected)
    with pytest.raises(AttributeError):
        elected(trim_of(1000))  # control


@pytest.mark.parametrize("start", [0, 1, 1023, 16384, (1 << 40) + 1])
@pytest.mark.parametrize("key", [0, 7, (1 << 64) - 3])
def test_a_draw_depends_on_its_key_and_place_alone(start, key):
    """In runs from even and odd places, one by one, and in torch; each place draws another."""
    pairs, n = np.empty(BLOCK // 2 + 1, np.uint64), 500
    run = draws.drawn_bits(np.uint64(key), start, n, pairs)
    found = np.array([draws.scaled(bits) for bits in run])
    alone = [draws.uniform(np.uint64(key), start + j) for j in range(n)]
    assert found.tolist() == alone
    assert plain.uniform(key, start, n).tolist() == alone
    assert len(set(alone)) > n - 3
    assert 0 <= min(alone) < 0.02 and 0.98 < max(alone) < 1


def test_draws_are_those_of_splitmix64():
    """The first outputs of the published generator for the seed 1234567."""
    stated = 6457827717110365317, 3203168211198807973
    pairs = np.empty(2, np.uint64)
    draws.drawn_bits(np.uint64(1234567), 0, 3, pairs)
    assert pairs.tolist() == list(stated)


def test_draws_are_even():
    """Of a million, as many lie in each of 64 equal parts as chance lets: χ² of 63 degrees; and a
    number says nothing of the next, nor of its own under the next key."""
    one, two = (plain.uniform(key, 0, 1 << 20).cpu().double().numpy() for key in (3, 4))
    for values in (one, (one[:-1] - one[1:]) % 1, (one - two) % 1):
        counts = np.histogram(values, 64, (0, 1))[0]
        expected = len(values) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 104  # p = 0.001
