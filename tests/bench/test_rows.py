"""Noise, merged passes and comparisons, on rows whose times are made up."""

import json

import numpy as np
import pytest

from nmkern.bench import cases, compare, noise, rows
from nmkern.bench.clocks import HostClock
from nmkern.bench.harness import Case, Report
from nmkern.bench.table import comparison, to_text

CASE = Case("linear", 1, 8, 8, "float32", "uniform", 64)


class Given(HostClock):
    """A clock that tells the samples that it was given."""

    def __init__(self, **samples):
        super().__init__()
        self.samples = samples

    def time(self, variants, seconds, calls=1):
        assert variants.keys() == self.samples.keys()
        return {name: np.array(found) for name, found in self.samples.items()}


def around(median, spread, count=41, seed=0):
    return median * (1 + spread * np.random.default_rng(seed).standard_normal(count))


def row(ours, stored=None, case=CASE):
    samples = {"ours": ours} if stored is None else {"ours": ours, "stored": stored}
    report = Report(None, Given(**samples), tell=lambda _: None)
    calls = {} if stored is None else {"stored": lambda: None}
    report.measure(case, lambda: None, calls, 0.0, 0.0)
    return {**report.rows[0], "load": 0.0, "noisy": [n for n in report.rows[0]["noisy"] if n != "machine"]}


def test_an_interval_holds_the_ratio_and_narrows_with_rounds():
    few, many = (
        noise.ratio_interval(around(1, 0.1, count), around(3, 0.1, count, 1)) for count in (11, 1001)
    )
    assert few[0] < 3 < few[1] and many[0] < 3 < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 3
    assert noise.ratio_interval(np.ones(3), np.full(3, 2.0)) == (2.0, 2.0)


def test_a_row_is_noisy_where_its_ratio_is_not_known_to_five_per_cent():
    assert row(around(1, 0.01), around(3, 0.01, seed=1))["noisy"] == []
    assert row(around(1, 0.5), around(3, 0.5, seed=1))["noisy"] == ["stored"]


def test_load_of_others_makes_the_machine_noisy(monkeypatch):
    monkeypatch.setattr(noise.Load, "share", lambda self: 0.3)
    report = Report(None, Given(ours=np.ones(9)), tell=lambda _: None)
    report.measure(CASE, lambda: None, {}, 0.0, 0.0)
    assert report.rows[0]["noisy"] == ["machine"] and report.rows[0]["load"] == 0.3


def test_our_own_work_is_no_load_of_others():
    load = noise.Load()
    end = np.random.default_rng(0)
    for _ in range(40):
        end.standard_normal(10**5)
    own = noise.Load()
    own._before = 0.0  # all that ever ran on this machine
    assert 0 <= load.share() < own.share()


def test_passes_that_disagree_are_noisy_however_steady_each_was():
    passes = [row(around(1, 0.001), around(ratio, 0.001, seed=1)) for ratio in (3, 3.6)]
    assert [found["noisy"] for found in passes] == [[], []]
    (merged,) = rows.merged(passes)
    assert merged["noisy"] == ["stored"] and merged["passes"] == 2
    low, high = merged["intervals"]["stored"]
    assert low < 3 < 3.6 < high and merged["ratios"]["stored"] == pytest.approx(3.3, rel=0.01)


def judged(old, new):
    (verdict,) = compare.compare(rows.merged([old]), rows.merged([new]))
    return verdict


@pytest.mark.parametrize("stored", [None, 3.0])
def test_a_slowed_row_is_found(stored):
    old, new = (
        row(around(t, 0.02), None if stored is None else around(stored, 0.02, seed=1)) for t in (1, 1.3)
    )
    assert judged(old, new).slower and judged(new, old).faster
    assert judged(old, new).change == pytest.approx(1.3, rel=0.02)
    assert not judged(old, old).slower


def test_noise_is_no_slowdown():
    seeds = range(20)
    found = [row(around(1, 0.05, seed=2 * s), around(3, 0.05, seed=2 * s + 1)) for s in seeds]
    assert not any(judged(a, b).beyond_noise for a in found for b in found)
    wide = row(np.array([0.9, 1, 1.2, 1.3, 1.5, 2, 3]), around(3, 0.02, seed=1))  # slower, perhaps
    verdict = judged(row(around(1, 0.02), around(3, 0.02, seed=1)), wide)
    assert not verdict.slower and verdict.noisy


def test_a_slower_machine_is_no_slowdown_where_a_rival_tells():
    old, new = (row(around(t, 0.01), around(3 * t, 0.01, seed=1)) for t in (1, 2))
    assert not judged(old, new).beyond_noise


def test_a_faster_rival_is_no_slowdown():
    old, new = (row(around(1, 0.01), around(t, 0.01, seed=1)) for t in (3, 2))
    verdict = judged(old, new)
    assert not verdict.beyond_noise and verdict.change == pytest.approx(1.5, rel=0.02)


def test_the_copy_of_the_machine_is_told_but_is_no_case_of_ours():
    case = Case("copy", 1, 1, 1, "float32", "none", 0, extra={"bytes": 2**20})
    old, new = (rows.merged([row(around(t, 0.01), case=case), row(np.ones(9))]) for t in (1, 1.5))
    assert [verdict.label for verdict in compare.compare(old, new)] == ["linear M=1 8 -> 8 float32 uniform"]
    assert compare.machine_change(old, new) == pytest.approx(1.5, rel=0.02)
    told = " ".join(to_text(comparison([], old, new)).split())
    assert "copying memory takes +50 % time" in told
    assert "copying" not in to_text(comparison([], old, old))


def test_what_is_copied_is_not_all_the_same():
    copied = []

    class Sees(Given):
        def time(self, variants, seconds, calls=1):
            copied.append(variants["ours"]())
            return super().time(variants, seconds, calls)

    cases.copy(Report(None, Sees(ours=np.ones(9)), tell=lambda _: None), 2**12, 0.0)
    assert len(copied[0].unique()) > 1000


def test_rows_that_are_older_than_intervals_can_be_compared():
    new = row(around(1.5, 0.02), around(3, 0.02, seed=1))
    old = row(around(1, 0.02), around(3, 0.02, seed=1))
    for key in ("intervals", "ours_interval", "noisy", "load"):
        del old[key]
    assert judged(old, new).slower


def test_what_cannot_be_compared_is_refused(tmp_path):
    old = rows.merged([row(np.ones(9))])
    compare.require_same_machine(old, HostClock().machine())
    with pytest.raises(ValueError, match="threads 1, here 64"):
        compare.require_same_machine(old, {**HostClock().machine(), "threads": 64})
    with pytest.raises(ValueError, match="a case that both files measured"):
        compare.compare(old, [{**old[0], "m": 2}])
    file = tmp_path / "rows.jsonl"
    for text in ("", "no json", "[1]", '{"seconds": 1}', json.dumps({"name": "x", "failed": "y"})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"rows\.jsonl: expected"):
            rows.read(file)
