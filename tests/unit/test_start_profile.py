"""Start profiles: recording the first reads, keeping them, planning and fetching ahead by them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from shim.cache import prefetch
from shim.cache.layer import ABSENT
from shim.cache.prefetch import Prefetch, plan
from shim.daemon.profile import SECONDS, Recorder, read_profile, write_profile
from shim.errors import RegistryError
from tests.support.fetchbench import SIZE, Clock, Make, make, runs
from tests.support.host import wait_for
from tests.support.lazylayers import sample_layer

__all__ = ["make"]


def test_what_is_read_first_is_told_once_and_in_order(make: Make) -> None:
    bench = make()
    spans = bench.sample.spans
    bench.check(spans.ustart(9), 10)  # fetches its whole run, unheard
    heard: list[int] = []
    bench.lazy.listen(heard.extend)
    for span in (20, 21, 4, 20, 4):
        bench.check(spans.ustart(span) + 3, 10)
        # beside a span that is being written a first read is heard later
        wait_for("the whole run is there", lambda: not bench.lazy.is_busy)
    bench.check(spans.ustart(41) - 5, 10)
    assert list(dict.fromkeys(heard)) == [20, 21, 4, 40, 41]
    assert len(heard) < 10


def test_no_first_read_slips_through_behind_the_fetch(make: Make) -> None:
    bench = make()
    cached, spans = bench.lazy.cached, bench.sample.spans
    heard: list[int] = []
    for listener, span in ((heard.extend, 20), (None, 30)):
        bench.lazy.listen(listener)
        cached.publish(span, bench.sample.data[spans.ustart(span) : spans.ustart(span + 1)])
        bench.check(spans.ustart(span), 10)  # before its job says that it has landed
    assert heard == [20]


def test_fetch_ahead_is_one_request_and_leaves_alone_what_is_there(make: Make) -> None:
    bench = make()
    first = runs(bench.sample)
    wanted = [first[3], first[3] + 1, first[6] + 2]
    bench.lazy.fetch_ahead(wanted)
    cached = bench.lazy.cached
    assert all(cached.states[span] for span in wanted)
    assert cached.states[first[4]] == ABSENT
    assert len(bench.source.requests) == 1
    bench.lazy.fetch_ahead(wanted)
    assert len(bench.source.requests) == 1
    bench.lazy.fetch_ahead([*wanted, first[8]])
    assert bench.source.requests[1][0] == bench.sample.spans.cstart(first[8])


def test_a_reader_of_what_is_fetched_ahead_waits_for_it_and_asks_nobody(make: Make) -> None:
    bench = make()
    bench.source.gate.clear()
    first = runs(bench.sample)[5]
    ahead = threading.Thread(target=bench.lazy.fetch_ahead, args=([first, first + 1],))
    arrived = threading.Event()
    bench.source.before = lambda _n, _start, _end: arrived.set()
    ahead.start()
    assert arrived.wait(20)
    read = bench.start(bench.sample.spans.ustart(first + 1), 100)
    bench.source.gate.set()
    at = bench.sample.spans.ustart(first + 1)
    assert read.result(20) == bench.sample.data[at : at + 100]
    ahead.join()
    assert len(bench.source.requests) == 1


def test_a_failure_ahead_is_nobody_s(make: Make) -> None:
    bench = make()

    def fail(number: int, _start: int, _end: int) -> None:
        if number == 0:
            raise RegistryError("no", retryable=True)

    bench.source.before = fail
    first = runs(bench.sample)[5]
    bench.lazy.fetch_ahead([first])
    assert bench.lazy.cached.states[first] == ABSENT
    bench.check(bench.sample.spans.ustart(first), 100)


def test_plan_joins_neighbours_and_keeps_the_order(make: Make) -> None:
    one, other = make().lazy, make(sample_layer(SIZE, seed=2)).lazy
    first = runs(make().sample)
    profile = [(0, first[20]), (1, first[3]), (0, first[21] + 1), (1, first[4]), (0, first[2])]
    stretches = plan([one, other], profile)
    assert [(s.layer is one, s.spans) for s in stretches] == [
        (True, [first[20], first[21] + 1]),
        (False, [first[3], first[4]]),
        (True, [first[2]]),
    ]
    assert stretches[0].start == one.spans.cstart(first[20])
    assert stretches[0].end == one.spans.cstart(first[22])


def test_plan_joins_what_a_later_read_connects(make: Make) -> None:
    lazy = make().lazy
    first = runs(make().sample)
    stretches = plan([lazy], [(0, first[i]) for i in (10, 12, 30, 11)])
    assert [s.spans for s in stretches] == [[first[10], first[11], first[12]], [first[30]]]


def test_plan_keeps_apart_what_is_wanted_much_later_and_requests_small(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = make().lazy
    first = runs(make().sample)
    size = max(lazy.spans.cstart(first[i + 1]) - lazy.spans.cstart(first[i]) for i in range(40))
    wanted = [(0, first[i]) for i in (10, *range(20, 30), 11)]
    monkeypatch.setattr(prefetch, "_APART", 5 * size)
    assert [s.spans for s in plan([lazy], wanted)][::3] == [[first[10]], [first[11]]]
    monkeypatch.setattr(prefetch, "_APART", 100 * size)
    monkeypatch.setattr(prefetch, "_STRETCH", 4 * size)
    stretches = plan([lazy], wanted)
    assert max(s.end - s.start for s in stretches) <= 4 * size
    assert stretches[0].spans == [first[10], first[11]]


def test_plan_spends_little_on_gaps(make: Make) -> None:
    lazy = make().lazy
    first = runs(make().sample)
    assert len(plan([lazy], [(0, first[10]), (0, first[12])])) == 2  # the gap is half of all
    everything = [(0, span) for span in range(lazy.spans.count) if not first[30] <= span < first[31]]
    assert len(plan([lazy], everything)) == 1


def test_prefetch_works_the_plan_off(make: Make) -> None:
    bench = make()
    wanted = [runs(bench.sample)[i] for i in (40, 3, 17, 28)]
    Prefetch(plan([bench.lazy], [(0, span) for span in wanted]), lambda _: nullcontext(True)).start()
    for span in wanted:
        bench.check(bench.sample.spans.ustart(span), 100)
    assert len(bench.source.requests) == 4


def test_prefetch_leaves_a_layer_alone_that_is_served_no_longer(make: Make) -> None:
    bench = make()
    asked: list[object] = []

    @contextmanager
    def gone(layer: object) -> Iterator[bool]:
        asked.append(layer)
        yield False

    Prefetch(plan([bench.lazy], [(0, 0)]), gone).start()
    wait_for("the plan is worked off", lambda: not any(t.name.startswith("prefetch-") for t in threading.enumerate()))
    assert asked == [bench.lazy]
    assert bench.source.requests == []


def test_profiles_on_disk(tmp_path: Path) -> None:
    assert read_profile(tmp_path, [9]) == ()
    write_profile(tmp_path, [(0, 8), (1, 0)])
    assert read_profile(tmp_path, [9, 1]) == ((0, 8), (1, 0))
    assert read_profile(tmp_path, [8, 1]) == ()  # of another index
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"v": 1}', '{"v": 1, "spans": [[0]]}', '{"v": 2, "spans": []}', "[" * 99_999]
)
def test_damaged_profiles_count_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    assert read_profile(tmp_path, [9]) == ()


@pytest.mark.parametrize("spans", [[["0", 1]], [[0, "1"]], [[0, None]], [[0, 1.5]], [[0, True]]])
def test_numbers_that_are_none(tmp_path: Path, spans: object) -> None:
    (tmp_path / "profile.json").write_text(json.dumps({"v": 1, "spans": spans}))
    assert read_profile(tmp_path, [9]) == ()


def test_a_recording_is_kept_when_its_time_is_over(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(clock)
    recording = recorder.begin("ab", tmp_path)
    assert recorder.current("ab") == ()
    recording.touch(0, range(3, 5))
    recording.touch(1, range(1))
    recording.touch(0, range(4, 6))
    assert recorder.current("ab") == ((0, 3), (0, 4), (1, 0), (0, 5))
    assert recorder.end_due() == []
    clock.now += SECONDS
    assert recorder.end_due() == ["ab"]
    assert read_profile(tmp_path, [9, 9]) == ((0, 3), (0, 4), (1, 0), (0, 5))
    assert recorder.current("ab") == ()
    assert recorder.end_due(everything=True) == []


def test_a_recording_whose_directory_went_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.begin("ab", tmp_path / "gone").touch(0, range(1))
    assert recorder.end_due(everything=True) == ["ab"]
