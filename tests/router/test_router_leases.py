"""The lease book: who has which examples."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.router.horizon import Speed, fair_hold
from paramserver.router.leases import LeaseBook, LeaseCut, LeaseError


def make_book(examples: int = 10, batch: int = 4, epochs: int = 1, seed: int = 0) -> LeaseBook:
    book = LeaseBook(batch, epochs, seed)
    book.declare({"train": examples, "valid": 5, "test": 3})
    return book


@given(examples=st.integers(1, 60), batch=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_every_example_of_an_epoch_is_granted_exactly_once(examples: int, batch: int, epochs: int, seed: int) -> None:
    book = make_book(examples, batch, epochs, seed)
    by_epoch: dict[int, list[int]] = {}
    numbers = []
    while leases := book.grant("train", f"w{len(numbers) % 3}", 2):
        for lease in leases:
            by_epoch.setdefault(lease.epoch, []).extend(lease.examples)
            numbers.append(lease.number)
    assert len(set(numbers)) == len(numbers) == epochs * -(-examples // batch)
    assert {epoch: sorted(ids) for epoch, ids in by_epoch.items()} == {
        key: list(range(examples)) for key in range(epochs)
    }


def test_order_follows_from_seed_and_epoch() -> None:
    orders = {
        (seed, lease.epoch): lease.examples
        for seed in (1, 2)
        for lease in make_book(50, 50, 2, seed).grant("train", "w", 2)
    }
    assert len(set(orders.values())) == 4
    assert orders[1, 0] == make_book(50, 50, 2, 1).grant("train", "w", 1)[0].examples


def test_short_tail_is_kept() -> None:
    assert [len(lease.examples) for lease in make_book(10, 4).grant("train", "w", 9)] == [4, 4, 2]


def test_evaluation_covers_valid_and_test_in_order() -> None:
    leases = make_book(batch=4).grant("evaluate", "w", 9)
    assert [(lease.split, lease.examples) for lease in leases] == [
        ("valid", (0, 1, 2, 3)),
        ("valid", (4,)),
        ("test", (0, 1, 2)),
    ]


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_no_unit_has_two_holders_and_all_end_done_under_deaths_returns_and_restarts(seed: int) -> None:
    dice = random.Random(seed)
    book = make_book(37, 4, 2, seed=5)
    holds: dict[str, dict[int, tuple[int, ...]]] = {name: {} for name in "abc"}
    done: list[int] = []
    ever: set[int] = set()
    trained: list[tuple[int, int]] = []
    for _ in range(2000):
        if not book.left("train"):
            break
        name = dice.choice("abc")
        mine = holds[name]
        match dice.randrange(6):
            case 0 | 1:
                for lease in book.grant("train", name, dice.randint(1, 3)):
                    assert lease.number not in ever, "a lease number came back"
                    ever.add(lease.number)
                    mine[lease.number] = lease.examples
                    trained += [(lease.epoch, example) for example in lease.examples]
            case 2 | 3 if mine:
                number = dice.choice(sorted(mine))
                assert book.finish(name, number) == "done"
                assert book.finish(name, number) == "duplicate"
                done.append(number)
                del mine[number]
            case 4 if mine:
                number = dice.choice(sorted(mine))
                assert book.give_back(name, [number]) == 1
                del mine[number]
            case 5 if dice.random() < 0.2:
                if dice.random() < 0.5:
                    assert book.release(name) == len(mine)
                    mine.clear()
                else:
                    book_before, book = book, LeaseBook(4, 2, 5, book.state, done)
                    book.declare({"train": 37, "valid": 5, "test": 3})
                    assert all(book.adopt(who, number) for who in holds for number in holds[who])
                    assert book.left("train") == book_before.left("train")
        held = [examples for who in holds.values() for examples in who.values()]
        units = [number & (2**40 - 1) for who in holds.values() for number in who]
        assert len(set(units)) == len(units), f"two holders of {held}"
    assert not book.left("train")
    assert set(trained) == {(epoch, example) for epoch in (0, 1) for example in range(37)}


def test_examples_of_a_dead_worker_are_granted_again_and_counted_only_where_it_had_begun() -> None:
    book = make_book(14, 4)
    done, begun, *others = first = book.grant("train", "a", 4)
    book.begin("a", [done.number, begun.number])
    assert book.finish("a", done.number) == "done"
    assert book.release("a") == 3
    assert book.examples_repeated == 0
    again = book.grant("train", "b", 4)
    assert [lease.examples for lease in again] == [lease.examples for lease in (begun, *others)]
    assert {lease.number for lease in again}.isdisjoint(lease.number for lease in first)
    assert book.examples_repeated == len(begun.examples) == 4


def test_lease_begun_by_a_dead_worker_is_not_begun_for_the_next_holder() -> None:
    book = make_book(4, 4)
    (lease,) = book.grant("train", "a", 1)
    book.begin("a", [lease.number])
    book.release("a")
    (again,) = book.grant("train", "b", 1)
    book.begin("a", [lease.number, again.number, 12345])  # late, another's, and never granted
    book.release("b")
    book.grant("train", "c", 1)
    assert book.examples_repeated == 4


def test_lease_that_is_handed_back_in_the_middle_counts_as_repeated() -> None:
    book = make_book(10, 4)
    begun, idle, told = book.grant("train", "a", 3)
    book.begin("a", [told.number])
    assert book.give_back("a", [begun.number, idle.number], begun={begun.number}) == 2
    assert book.give_back("a", [told.number]) == 1
    book.grant("train", "b", 3)
    assert book.examples_repeated == len(begun.examples) + len(told.examples)


def test_lease_begun_and_handed_back_while_the_book_was_away_counts_as_repeated() -> None:
    book = make_book(8, 4)
    begun, idle = book.grant("train", "a", 2)
    restored = LeaseBook(4, 1, 0, book.state)
    restored.declare({"train": 8, "valid": 5, "test": 3})
    restored.give_back("a", [begun.number, idle.number], begun={begun.number})
    restored.grant("train", "b", 2)
    assert restored.examples_repeated == len(begun.examples)


def test_returned_examples_are_granted_again_and_not_counted_as_repeated() -> None:
    book = make_book(10, 4)
    lease = book.grant("train", "a", 1)[0]
    assert book.give_back("a", [lease.number, 12345]) == 1
    assert lease.examples in [other.examples for other in book.grant("train", "b", 3)]
    assert book.examples_repeated == 0


def test_lease_handed_back_before_or_during_a_restart_does_not_count_as_repeated() -> None:
    book = make_book(40, 4)
    before, during, died = book.grant("train", "a", 3)
    book.give_back("a", [before.number])
    restored = LeaseBook(4, 1, 0, book.state)
    restored.declare({"train": 40, "valid": 5, "test": 3})
    restored.give_back("a", [during.number])
    again = restored.grant("train", "b", 3)
    assert {lease.examples for lease in again} == {before.examples, during.examples, died.examples}
    assert restored.examples_repeated == len(died.examples)


def test_result_of_a_worker_given_up_counts_unless_another_holds_the_unit() -> None:
    book = make_book(10, 4)
    one, two = book.grant("train", "a", 2)
    book.release("a")
    assert book.grant("train", "b", 1)[0].examples == one.examples
    assert book.finish("a", one.number) == "late"
    assert book.finish("a", two.number) == "done"
    assert [lease.examples for lease in book.grant("train", "b", 3)] != [two.examples]


@pytest.mark.parametrize("number", [2, 5, 2**40 + 2, 2**61, 3 << 40])
def test_lease_that_was_never_granted_is_unknown(number: int) -> None:
    book = make_book(10, 4)
    assert book.finish("a", number) == "unknown"
    assert not book.adopt("a", number)
    assert book.describe(number) is None


def test_lease_of_another_worker_cannot_be_finished_adopted_or_returned() -> None:
    book = make_book(10, 4)
    number = book.grant("train", "a", 1)[0].number
    assert book.finish("b", number) == "unknown"
    assert not book.adopt("b", number)
    assert book.give_back("b", [number], begun=[number]) == 0
    assert book.held_by("a") == [number]


def test_limit_ends_training_early_but_keeps_what_was_granted() -> None:
    book = make_book(40, 4)
    granted = book.grant("train", "a", 3)
    book.limit_training(2)
    assert book.left("train") == 3
    assert not book.grant("train", "b", 1)
    for lease in granted:
        book.finish("a", lease.number)
    assert book.left("train") == 0


def test_millions_of_examples_and_epochs_cost_nothing_before_they_are_reached() -> None:
    book = LeaseBook(1, 100_000, 0)
    book.declare({"train": 1_000_000})
    assert book.left("train") == 10**11
    assert len(book.grant("train", "a", 2)) == 2


@pytest.mark.parametrize(
    ("examples", "text"),
    [({}, "'train' has no example"), ({"train": -1}, "allowed"), ({"train": 1, "dev": 1}, "'dev'")],
)
def test_impossible_numbers_of_examples_are_refused(examples: dict[str, int], text: str) -> None:
    with pytest.raises(LeaseError, match=text):
        LeaseBook(1, 1, 0).declare(examples)


def test_too_many_leases_are_refused() -> None:
    with pytest.raises(LeaseError, match=r"stop\.epochs"):
        LeaseBook(1, 10**6, 0).declare({"train": 2**31})


def test_hold_is_two_until_the_speed_is_known_then_the_horizon() -> None:
    assert fair_hold("a", 1000, {"a": None, "b": None}) == 2
    assert fair_hold("a", 1000, {"a": 0.5, "b": None}) == 30


def test_near_the_end_workers_share_by_speed_and_keep_at_least_one() -> None:
    speeds: dict[str, float | None] = {"fast": 3.0, "slow": 1.0}
    assert fair_hold("fast", 8, speeds) == 6
    assert fair_hold("slow", 8, speeds) == 2
    assert fair_hold("slow", 2, speeds) == 1


def test_speed_is_measured_over_the_time_in_which_leases_were_held() -> None:
    speed = Speed()
    speed.observe(0, True, 0.0)
    assert speed.leases_a_second is None
    for second in range(1, 20):
        speed.observe(2, True, float(second))
    assert speed.leases_a_second == pytest.approx(2.0)
    speed.observe(0, False, 20.0)
    before = speed.leases_a_second
    speed.observe(0, True, 500.0)
    assert speed.leases_a_second == before


# ------------------------------------------------------------------------------- checkpoints


EXAMPLES = {"train": 22, "valid": 5, "test": 3}


def resumed(cut: LeaseCut, epochs: int = 2, batch: int = 4) -> LeaseBook:
    trained = epochs * -(-EXAMPLES["train"] // batch)
    book = LeaseBook(batch=batch, epochs=epochs, seed=1, state=cut.state(), done=cut.done(trained))
    book.declare(EXAMPLES)
    return book


def drain(book: LeaseBook, worker: str = "w") -> list[tuple[int, int]]:
    """Finish all that is left of training. Returns (epoch, example) in their order."""
    seen = []
    while leases := book.grant("train", worker, 3):
        for lease in leases:
            seen += [(lease.epoch, example) for example in lease.examples]
            assert book.finish(worker, lease.number) == "done"
    return seen


@pytest.mark.parametrize("granted", range(13))
def test_a_book_that_goes_on_from_a_cut_gives_every_example_that_was_not_done_once_and_in_order(granted: int) -> None:
    book = LeaseBook(batch=4, epochs=2, seed=1)
    book.declare(EXAMPLES)
    before = []
    leases = book.grant("train", "w", granted)
    for lease in leases[: granted // 2]:
        before += [(lease.epoch, example) for example in lease.examples]
        book.finish("w", lease.number)
    cut = book.cut()
    assert cut.begun == ()
    other = resumed(cut)
    assert other.left("initialise") == 0
    after = drain(other)
    whole = LeaseBook(batch=4, epochs=2, seed=1)
    whole.declare(EXAMPLES)
    assert before + after == drain(whole)
    assert other.examples_repeated == 0


def test_what_was_begun_at_the_cut_is_repeated_and_counted_and_what_was_only_granted_is_not() -> None:
    book = LeaseBook(batch=4, epochs=1, seed=1)
    book.declare(EXAMPLES)
    done, begun, lost, granted = book.grant("train", "w", 4)
    book.finish("w", done.number)
    book.begin("w", [begun.number, lost.number])
    book.give_back("w", [lost.number])  # free again, but somebody has trained on it
    cut = book.cut()
    assert len(cut.begun) == 2
    other = resumed(cut, epochs=1)
    seen = drain(other)
    expected = {(0, example) for example in range(EXAMPLES["train"])} - {(0, example) for example in done.examples}
    assert sorted(seen) == sorted(expected)
    assert other.examples_repeated == len(begun.examples) + len(lost.examples)
    assert set(granted.examples) <= {example for _, example in seen}


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_run_that_goes_on_may_have_more_epochs_or_fewer(epochs: int) -> None:
    book = LeaseBook(batch=4, epochs=2, seed=1)
    book.declare(EXAMPLES)
    batches = -(-EXAMPLES["train"] // 4)
    for lease in book.grant("train", "w", batches + 2):
        book.finish("w", lease.number)
    other = resumed(book.cut(), epochs=epochs)
    assert other.left("train") == max(0, (epochs - 1) * batches - 2)
    drain(other)
    evaluated = other.grant("evaluate", "w", 100)
    assert {lease.split for lease in evaluated} == {"valid", "test"}
    assert sum(len(lease.examples) for lease in evaluated) == EXAMPLES["valid"] + EXAMPLES["test"]
