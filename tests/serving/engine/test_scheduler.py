"""The policy without a model: order, budget, rows, pages, and that everything comes back."""

import random

import pytest

from megatron_dla.errors import UserError
from megatron_dla.serving.engine import EngineConfig, Request, SamplingParams
from megatron_dla.serving.engine.pages import PagePool, PageTable
from megatron_dla.serving.engine.prefixes import Prefix, Prefixes
from megatron_dla.serving.engine.scheduler import Phase, Scheduler, Sequence


class Store:
    """Checks that what is saved comes back to where it can lie; states are the lengths."""

    def __init__(self):
        self.log = []

    def save(self, sequence):
        assert sequence.row >= 0
        sequence.state = ("saved", sequence.length, [table.behind for table in sequence.tables])
        self.log.append(("save", sequence.arrival))

    def load(self, sequence):
        assert sequence.state == ("saved", sequence.length, [table.behind for table in sequence.tables])
        assert all(table.missing(sequence.length) == 0 for table in sequence.tables)
        sequence.state = None
        self.log.append(("load", sequence.arrival))

    def move(self, sequence, row):
        self.log.append(("move", sequence.arrival, row))

    def snapshot(self, sequence):
        assert sequence.row >= 0
        return sequence.length

    def begin(self, sequence, snapshot):
        assert sequence.row >= 0 and sequence.length == snapshot


class Simulation:
    """Steps of a scheduler as the engine takes them; every request generates all of its tokens."""

    def __init__(self, windows=(), **config):
        self.config = EngineConfig(**{"slots": 4, "prefill_chunk": 16, "prefix_states": 0} | config)
        self.store = Store()
        self.scheduler = Scheduler(self.config, self.store, windows)
        self.count, self.done, self.reads = 0, [], []

    def add(self, prompt=8, tokens=4, prompt_ids=None, **options):
        ids = prompt_ids if prompt_ids is not None else range(self.count * 1000, self.count * 1000 + prompt)
        request = Request(tuple(ids), SamplingParams(max_new_tokens=tokens), **options)
        self.scheduler.check(request)
        one = Sequence(request, self.count)
        self.scheduler.add(one)
        self.count += 1
        return one

    def _token(self, one):
        one.tokens.append(0)
        if len(one.tokens) >= one.request.sampling.max_new_tokens:
            self.scheduler.end(one)
            self.done.append(one.arrival)

    def step(self):
        s, spent = self.scheduler, 0
        decoding = s.begin_step()
        rows = [x.row for x in decoding]
        assert rows == sorted(set(rows)) and all(0 <= row < self.config.slots for row in rows)
        for one in decoding:
            assert one.is_read and all(table.missing(one.length + 1) == 0 for table in one.tables)
            s.decoded(one)
            self._token(one)
        while (work := s.next_read()) is not None:
            one, stop = work
            assert all(table.missing(stop) == 0 for table in one.tables)
            assert stop == len(one.request.prompt) or stop % self.config.prefill_chunk == 0
            self.reads.append((one.arrival, one.length, stop))
            spent += stop - one.length
            s.was_read(one, stop)
            if one.is_read:
                self._token(one)
        assert len(decoding) + spent <= self.config.budget, "over the budget"
        self.check()
        return bool(s.active)

    def check(self):
        s = self.scheduler
        assert sorted([x.row for x in s.held] + s.free_rows) == list(range(self.config.slots))
        assert [x.order for x in s.waiting] == sorted(x.order for x in s.waiting)
        for kind, pool in enumerate(s.pools):
            tables = [x.tables[kind] for x in s.held] + [x.tables[kind] for x in s.prefixes.kept]
            held = {page for table in tables for page in table.pages}
            assert len(held) == pool.total - pool.free
            assert not any(x.tables[kind].pages for x in s.waiting)

    def run(self, limit=2000):
        for _ in range(limit):
            if not self.step():
                assert len(self.scheduler.free_rows) == self.config.slots
                while self.scheduler.prefixes.evict():
                    pass
                assert all(pool.free == pool.total for pool in self.scheduler.pools)
                return
        pytest.fail("no progress")


def test_sequences_come_and_go_at_every_step():
    sim = Simulation(slots=2)
    for tokens in (2, 6, 2, 2):
        sim.add(tokens=tokens)
    sim.run()
    assert sim.done == [0, 2, 3, 1]  # short ones pass through the other slot


def test_whole_batches_wait_for_their_last():
    sim = Simulation(slots=2, whole_batches=True)
    for tokens in (2, 6, 2, 2):
        sim.add(tokens=tokens)
    sim.run()
    assert sim.done == [0, 1, 2, 3]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    sim = Simulation(readers=2, token_budget=20)
    sim.add(prompt=200, tokens=1)
    sim.add(prompt=8, tokens=1)
    sim.run()
    assert sim.done == [1, 0]
    assert [stop - start for _, start, stop in sim.reads if _ == 0] == [16] * 12 + [8]


def test_a_prompt_gets_a_row_when_it_is_read_and_not_before():
    sim = Simulation(readers=3, token_budget=20, slots=4)  # one chunk a step
    for _ in range(4):
        sim.add(prompt=60, tokens=9)
    held = []
    while any(not x.is_read for x in sim.scheduler.active):
        sim.step()
        assert all(x.length for x in sim.scheduler.held)
        held.append(len(sim.scheduler.held))
    assert held[:5] == [1, 2, 3, 3, 3]  # as many as are read side by side
    sim.run()


def test_a_prompt_gets_no_row_while_one_of_a_higher_priority_is_read():
    sim = Simulation(token_budget=20)
    high, low = (sim.add(prompt=60, priority=n, tokens=1) for n in (1, 0))
    sim.step()
    assert high.phase is Phase.READING and low.phase is Phase.WAITING
    sim.run()
    assert sim.done == [0, 1]


def test_a_prompt_is_cut_alike_whatever_the_load():
    alone, busy = Simulation(), Simulation(token_budget=20)
    alone.add(prompt=70)
    alone.run()
    for prompt in (70, 3, 50, 33):
        busy.add(prompt=prompt, tokens=9)
    busy.run()
    assert [x for x in busy.reads if x[0] == 0] == alone.reads


def test_priority_goes_first_and_puts_a_lower_one_aside():
    sim = Simulation(slots=1)
    low = sim.add(tokens=9)
    sim.step()
    sim.step()
    high = sim.add(tokens=3, priority=1)
    same = sim.add(tokens=3)
    sim.step()
    assert low.phase is Phase.SAVED and high.row == 0
    sim.run()
    assert sim.done == [high.arrival, low.arrival, same.arrival]
    assert sim.store.log == [("save", 0), ("load", 0)]


def test_no_more_are_put_aside_than_allowed():
    sim = Simulation(slots=1, max_saved=0)
    sim.add(tokens=5)
    sim.step()
    sim.add(tokens=1, priority=9)
    sim.run()
    assert sim.done == [0, 1]


def test_without_pages_the_last_one_is_put_aside_and_goes_on_later():
    sim = Simulation(windows=[None], slots=3, kv_pages=6)
    for _ in range(3):
        sim.add(prompt=20, tokens=50)
    sim.run()
    assert sim.done == [0, 1, 2] and ("save", 2) in sim.store.log and ("save", 0) not in sim.store.log


def test_a_request_that_can_never_be_held_is_refused():
    sim = Simulation(windows=[None, 8], kv_pages=4)
    with pytest.raises(UserError, match=r"prompt of 60 tokens with max_tokens = 5: .* 64 tokens"):
        sim.add(prompt=60, tokens=5)
    sim.add(prompt=60, tokens=4)
    windowed = Simulation(windows=[8], kv_pages=4)
    windowed.add(prompt=500, tokens=4)
    windowed.run()


def test_idle_decode_calls_are_emptied():
    sim = Simulation(slots=8, decode_rows=2)
    for tokens in (2, 2, 2, 2, 30, 30):
        sim.add(tokens=tokens, prompt=1)
    sim.step()
    sim.step()
    assert sorted(x.row for x in sim.scheduler.held) == [4, 5]
    sim.step()
    assert sorted(x.row for x in sim.scheduler.held) == [0, 1]
    sim.run()


def test_a_prefix_is_read_once():
    sim, system = Simulation(windows=[None, 8], prefix_states=2), list(range(40))
    first, second, third, fourth = (sim.add(prompt_ids=[*system, 100 + n], tokens=30) for n in range(4))
    while not second.is_read or not fourth.is_read:
        sim.step()
    assert (first.cached, second.cached, third.cached, fourth.cached) == (0, 0, 32, 32)  # kept when it came again
    assert third.tables[0].pages[:2] == fourth.tables[0].pages[:2] == second.tables[0].pages[:2]
    assert len({third.tables[0].pages[2], fourth.tables[0].pages[2], second.tables[0].pages[2]}) == 3
    sim.run()
    sim = Simulation(prefix_states=2)
    first, second = (sim.add(prompt_ids=[*system, 100 + n], shared_prefix=39) for n in range(2))
    sim.run()
    assert (first.cached, second.cached) == (0, 32)


def test_kept_prefixes_are_bounded_and_give_way():
    sim = Simulation(windows=[None], slots=1, kv_pages=6, prefix_states=2)
    for _ in range(4):
        sim.add(prompt=33, shared_prefix=33, tokens=1)
    sim.run()
    assert len(sim.scheduler.prefixes) == 0  # `run` lets go
    for _ in range(4):
        sim.add(prompt=33, shared_prefix=33, tokens=1)
    while sim.step():
        pass
    assert len(sim.scheduler.prefixes) == 2
    sim.add(prompt=80, tokens=10)
    sim.step()
    assert len(sim.scheduler.prefixes) == 0
    sim.run()


def test_a_kept_prefix_stays_where_dropping_it_would_not_help():
    sim, system = Simulation(windows=[None], slots=3, kv_pages=8, prefix_states=2), list(range(40))
    for n in range(2):  # both on the pages of the prefix
        sim.add(prompt_ids=[*system, 100 + n], shared_prefix=40, tokens=30)
    while len(sim.scheduler.held) < 2:
        sim.step()
    late = sim.add(prompt=110, tokens=2)
    sim.step()
    assert late.phase is Phase.WAITING and len(sim.scheduler.prefixes) == 1
    sim.run()
    assert len(sim.done) == 3


def test_the_longest_prefix_is_found_and_the_oldest_dropped():
    prefixes, pool = Prefixes(2, 16), PagePool(9)
    long = prefixes.digests(range(100))
    assert len(long) == 6 and prefixes.digests(range(97)) == long == prefixes.digests([*range(96), 7, 7])
    assert len(prefixes.digests(range(96))) == 5  # a token is left to read
    for chunks in (1, 3):
        table = PageTable(pool)
        table.grow(16 * chunks)
        prefixes.keep(long, Prefix(16 * chunks, None, [table]))
    assert prefixes.find(long).tokens == 48 and prefixes.find(long[:2]).tokens == 16
    assert prefixes.find(prefixes.digests([1, *range(1, 100)])) is None
    prefixes.keep(other := prefixes.digests(range(5, 40)), Prefix(16, None, []))
    assert prefixes.find(long).tokens == 16 and prefixes.find(other) and pool.free == 8


def test_a_whole_prompt_is_read_alone_and_what_is_decoded_waits():
    sim = Simulation(slots=3)
    sim.scheduler.chunk = 10**9
    first = sim.add(prompt=5, tokens=20)
    sim.step()
    long, short = sim.add(prompt=500, tokens=2), sim.add(prompt=5, tokens=2)
    with pytest.raises(AssertionError, match="over the budget"):
        sim.step()
    assert long.is_read and not short.is_read and len(first.tokens) == 2
    sim.run()
    assert len(sim.done) == 3


def test_idle_places_of_shared_pages_are_not_counted_by_each():
    pool = PagePool(40)
    for window in (None, 20):
        prefix = PageTable(pool, window)
        prefix.grow(64)
        tables = [prefix.fork(64) for _ in range(3)]
        for table in tables:
            table.grow(75)
            table.slide(75)
        assert [table.idle(75) for table in tables] == [5] * 3  # of the last page alone
        assert [table.own for table in tables] == [1] * 3
        prefix.clear()
        for table in tables[1:]:
            table.clear()
        held = 75 if window is None else 19
        assert tables[0].idle(75) == len(tables[0].pages) * 16 - held and tables[0].own == len(tables[0].pages)
        tables[0].clear()
    assert pool.free == 40


def test_pages_behind_a_window_are_given_back():
    pool = PagePool(10)
    table = PageTable(pool, window=20)
    for length in range(1, 100):
        table.grow(length)
        assert table.slot_of(length - 1) == table.pages[-1] * 16 + (length - 1) % 16
        table.slide(length)
        assert pool.total - pool.free == len(table.pages) <= 3
        assert table.behind * 16 <= table.seen_from(length) < table.behind * 16 + 16
    assert table.idle(99) == len(table.pages) * 16 - 19
    table.clear()
    assert pool.free == 10 and table.behind == 5


@pytest.mark.parametrize("seed", range(6))
def test_everything_comes_back_under_random_load(seed):
    r = random.Random(seed)
    sim = Simulation(
        windows=[None, 24], slots=5, kv_pages=r.choice([12, 20, 60]), decode_rows=r.choice([1, 2, 3]),
        prefix_states=r.choice([0, 3]), readers=r.choice([1, 3]), reserve_tokens=r.choice([0, 0, 100]),
    )  # fmt: skip
    active = []
    for _ in range(300):
        if r.random() < 0.4:
            prompt = [*range(r.choice([0, 16, 40])), *(r.randrange(99) for _ in range(r.randrange(1, 50)))]
            active.append(sim.add(prompt_ids=prompt, tokens=r.randrange(1, 60), priority=r.choice([0, 0, 0, 1])))
        if active and r.random() < 0.05:
            one = active.pop(r.randrange(len(active)))
            if one.phase is not Phase.ENDED:
                sim.scheduler.end(one)
        sim.step()
    sim.run(20_000)
    roomy = sim.config.kv_pages == 60 or sim.config.reserve_tokens
    assert len(sim.done) > 20 and (roomy or sim.scheduler.saves)


@pytest.mark.parametrize("key, value", [
    ("slots", 0), ("decode_rows", 17), ("prefill_chunk", 24), ("token_budget", 100), ("readers", 0), ("kv_pages", -1),
    ("max_waiting", 0), ("prefix_states", -1),
])  # fmt: skip
def test_a_bad_size_is_named(key, value):
    with pytest.raises(UserError, match=f"{key} = {value}: want "):
        EngineConfig(**{key: value})
