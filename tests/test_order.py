"""Order against a plain reference model, and what answers mean (channel contract 5.5 and 12)."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medplum_agent as ma


@dataclasses.dataclass(eq=False)
class Item:
    key: str | None
    number: int = 0


class Model:
    """The rule itself, tried pair by pair: an item may start when nothing that must come first is unsettled."""

    def __init__(self) -> None:
        self.unsettled: list[Item] = []

    def startable(self) -> set[Item]:
        return {
            item
            for place, item in enumerate(self.unsettled)
            if not any(self.before(earlier, item) for earlier in self.unsettled[:place])
        }

    @staticmethod
    def before(earlier: Item, later: Item) -> bool:
        return earlier.key is ma.BARRIER or later.key is ma.BARRIER or earlier.key == later.key


class Both:
    """Order and model side by side; `started` are taken and not yet settled."""

    def __init__(self) -> None:
        self.order: ma.Order[Item] = ma.Order()
        self.model = Model()
        self.started: list[Item] = []
        self.settled: list[Item] = []
        self.count = 0

    def add(self, key: str | None) -> None:
        self.count += 1
        item = Item(key, self.count)
        self.order.add(item)
        self.model.unsettled.append(item)
        self.check()

    def take(self) -> None:
        if self.order.ready:
            self.started.append(self.order.ready.popleft())

    def settle(self, place: int) -> None:
        if self.started:
            item = self.started.pop(place % len(self.started))
            self.order.settle(item)
            self.model.unsettled.remove(item)
            self.settled.append(item)
            self.check()

    def check(self) -> None:
        ready = [*self.order.ready, *self.started]
        assert len(ready) == len(set(ready)), "started twice"
        assert set(ready) == self.model.startable()

    def drain(self) -> None:
        while self.model.unsettled:
            assert self.order.ready or self.started, f"stuck with {self.model.unsettled}"
            self.take()
            self.settle(0)


KEYS = st.sampled_from(["a", "b", "c", "", ma.BARRIER])
STEPS = st.lists(
    st.one_of(
        KEYS.map(lambda key: ("add", key)),
        st.just(("take", None)),
        st.integers(0, 9).map(lambda place: ("settle", place)),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_any_schedule_follows_the_model_and_loses_nothing(steps: list[tuple[str, object]]) -> None:
    both = Both()
    for step, argument in steps:
        getattr(both, step)(*([] if step == "take" else [argument]))
    both.drain()
    assert len(both.settled) == both.count
    assert not both.order.ready
    for key in ("a", "b", "c", ""):
        numbers = [item.number for item in both.settled if item.key == key]
        assert numbers == sorted(numbers)


def added(*keys: str | None) -> tuple[ma.Order[Item], list[Item]]:
    order, items = ma.Order[Item](), [Item(key, number) for number, key in enumerate(keys)]
    for item in items:
        order.add(item)
    return order, items


def taken(order: ma.Order[Item]) -> list[int]:
    found = [item.number for item in order.ready]
    order.ready.clear()
    return found


def test_different_keys_are_ready_together() -> None:
    order, _ = added(*(f"patient {n}" for n in range(500)))
    assert taken(order) == list(range(500))


def test_equal_keys_are_ready_one_after_the_other() -> None:
    order, items = added("a", "a", "b", "a")
    assert taken(order) == [0, 2]
    order.settle(items[2])
    assert taken(order) == []
    order.settle(items[0])
    assert taken(order) == [1]
    order.settle(items[1])
    assert taken(order) == [3]


def test_the_empty_key_orders_everything_that_has_it() -> None:
    order, items = added("", "", "")
    assert taken(order) == [0]
    order.settle(items[0])
    assert taken(order) == [1]


def test_a_barrier_waits_for_all_before_it_and_holds_all_behind() -> None:
    order, items = added("a", "b", ma.BARRIER, "a", "c", ma.BARRIER, "a")
    assert taken(order) == [0, 1]
    order.settle(items[1])
    assert taken(order) == []
    order.settle(items[0])
    assert taken(order) == [2]
    order.settle(items[2])
    assert taken(order) == [3, 4]
    order.settle(items[4])
    order.settle(items[3])
    assert taken(order) == [5]
    order.settle(items[5])
    assert taken(order) == [6]


def test_barriers_alone_run_one_by_one() -> None:
    order, items = added(ma.BARRIER, ma.BARRIER)
    assert taken(order) == [0]
    order.settle(items[0])
    assert taken(order) == [1]


def test_what_is_added_behind_a_running_barrier_waits() -> None:
    order, items = added(ma.BARRIER)
    assert taken(order) == [0]
    order.add(Item("a", 1))
    assert taken(order) == []
    order.settle(items[0])
    assert taken(order) == [1]


def test_a_fence_is_a_barrier() -> None:
    assert ma.Fence().key is ma.BARRIER


def test_nothing_is_remembered_of_settled_items() -> None:
    both = Both()
    for n in range(200):
        both.add(f"key {n}" if n % 7 else ma.BARRIER)
    both.drain()
    assert not both.order._lines and not both.order._held and not both.order._open


# --- judge (channel contract 5.5) ---


def ack(code: str) -> str:
    return f"MSH|^~\\&|BOT|S|||20260101||ACK|1|P|2.5.1\rMSA|{code}|MSG1"


BY_STATUS = [(200, ""), (201, ""), (202, ""), (302, ""), (399, ""), (400, "server-rejected"), (401, "server-rejected")]
BY_STATUS += [(404, "server-rejected"), (429, "server-rate-limited"), (500, "server-error"), (503, "server-error")]


@pytest.mark.parametrize("mode", ["none", "normal", "original", "enhanced"])
@pytest.mark.parametrize("body", [None, "", "text", ack("AE"), ack("AA"), {"a": 1}], ids=str)
def test_status_decides_outside_of_guaranteed_mode(mode: str, body: object) -> None:
    for status, error in BY_STATUS:
        assert ma.judge(mode, status, body) == error


@pytest.mark.parametrize("body", [None, "", "text", {"a": 1}, ["MSH"], "MSH|^~\\&|no msa", "MSH|x\rMSA| |1"], ids=str)
def test_status_decides_in_guaranteed_mode_without_an_acknowledgment(body: object) -> None:
    for status, error in BY_STATUS:
        assert ma.judge("guaranteed", status, body) == error


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("AA", ""), ("CA", ""), ("AE", "upstream-error"), ("CE", "upstream-error"), ("AR", "upstream-rejected"),
        ("CR", "upstream-rejected"), ("ae", "upstream-error"), ("aa", ""),
    ],
)  # fmt: skip
def test_msa_1_decides_in_guaranteed_mode(code: str, error: str) -> None:
    for status, _ in BY_STATUS:
        assert ma.judge("guaranteed", status, ack(code)) == error


@pytest.mark.parametrize(
    ("error", "modes"),
    [
        ("server-error", {"normal", "guaranteed"}),
        ("server-rate-limited", {"normal", "guaranteed"}),
        ("response-timeout", {"guaranteed"}),
        ("interrupted", {"guaranteed"}),
        ("server-rejected", {"guaranteed"}),
        ("upstream-error", {"guaranteed"}),
        ("upstream-rejected", set[str]()),
    ],
)
def test_what_is_tried_again(error: str, modes: set[str]) -> None:
    assert {mode for mode in ma.RETRY_MODES if error in ma._RETRIED[mode]} == modes


def test_final_states() -> None:
    """Permanent refusals end as rejected, everything else as failed."""
    assert ma._REJECTED.issuperset({"server-rejected", "upstream-rejected"})
    assert not ma._REJECTED & {
        "server-error",
        "server-rate-limited",
        "response-timeout",
        "interrupted",
        "upstream-error",
    }


def test_every_error_has_a_reason_for_a_person() -> None:
    for error in set().union(*ma._RETRIED.values(), ma._REJECTED, ma._UPSTREAM.values()):
        assert ma._REASONS[error].format(status=400)


# --- back-off ---


def policy(query: str) -> ma.Policy:
    return ma.channel_plan("A", {"address": f"mllp://h:5?{query}"}, {}, []).policy


@pytest.mark.parametrize("failures", [1, 2, 3, 5, 8, 20, 100, 10_000])
def test_back_off_is_between_half_and_whole_of_the_capped_power(failures: int) -> None:
    limit = min(60_000, 1000 * 2 ** (failures - 1))
    delays = [policy("").delay_ms(failures) for _ in range(200)]
    assert all(isinstance(delay, int) and limit / 2 <= delay <= limit for delay in delays)
    assert len(set(delays)) > 20


@pytest.mark.parametrize("multiplier", ["1", "1000000", "1e300"])
def test_any_multiplier_gives_a_back_off(multiplier: str) -> None:
    slow = policy(f"autoRetryBackoffMultiplier={multiplier}")
    assert all(500 <= slow.delay_ms(failures) <= 60_000 for failures in (1, 2, 60, 1000))


@pytest.mark.parametrize(
    ("query", "attempts"),
    [
        ("", 20), ("retryMode=normal", 10), ("retryMode=normal&autoRetryMaxAttempts=3", 3),
        ("retryMode=normal&autoRetryMaxAttempts=0", 0), ("retryMode=guaranteed&autoRetryMaxAttempts=3", 3),
    ],
)  # fmt: skip
def test_attempts(query: str, attempts: int) -> None:
    tried = policy(query)
    assert tried.settings.autoRetryMaxAttempts == attempts
    assert not tried.spent(attempts - 1 if attempts else 10_000, 0)
    assert tried.spent(attempts, 0) is bool(attempts)


def test_a_message_that_failed_too_long_is_spent() -> None:
    hour = 3_600_000
    assert policy("deadLetterAfterHours=1").spent(1, hour + 1000)
    assert not policy("deadLetterAfterHours=1").spent(1, hour - 60_000)
    assert not policy("deadLetterAfterHours=0").spent(1, 1000 * hour)


# --- percentiles (channel contract 12) ---


def test_percentiles_of_nothing() -> None:
    found = ma.percentiles([])
    assert found.pop("count") == 0
    assert found == dict.fromkeys(("min", "max", "average", "p50", "p95", "p99"), -1)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([7], (1, 7, 7, 7, 7, 7, 7)),
        ([4, 2], (2, 2, 4, 3, 2, 4, 4)),
        ([3, 1, 2], (3, 1, 3, 2, 2, 3, 3)),
        (range(100, 0, -1), (100, 1, 100, 50.5, 50, 95, 99)),
        (range(1, 1001), (1000, 1, 1000, 500.5, 500, 950, 990)),
        (range(1, 21), (20, 1, 20, 10.5, 10, 19, 20)),
    ],
)
def test_percentiles(samples: list[int], expected: tuple[float, ...]) -> None:
    names = ("count", "min", "max", "average", "p50", "p95", "p99")
    assert ma.percentiles(samples) == dict(zip(names, expected, strict=True))
