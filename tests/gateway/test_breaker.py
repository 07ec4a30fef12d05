"""The circuit of a replica, by the clock that the tests hold."""

from __future__ import annotations

from hypothesis import given, strategies as st

from gateway.breaker import BACKOFF_MAX, Circuit
from policies.retrying import Breaker

POLICY = Breaker(failures=3, share=0.5, min_requests=10, window_s=20.0, open_s=5.0)


def opened(now: float = 0.0) -> Circuit:
    """A circuit that has just opened."""
    circuit = Circuit(POLICY)
    for _ in range(3):
        circuit.failed(now, trial=circuit.begin(now))
    return circuit


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    """Three in a row; two, a success, two more are no row."""
    circuit = Circuit(POLICY)
    for well in (False, False, True, False, False):
        trial = circuit.begin(0.0)
        (circuit.succeeded if well else circuit.failed)(0.0, trial=trial)
    assert circuit.state(0.0) == "closed"
    circuit.failed(0.0, trial=circuit.begin(0.0))
    assert (circuit.state(0.0), circuit.allows(0.0)) == ("open", False)
    assert circuit.wait_s(1.0) == 4.0


def test_a_replica_that_fails_every_second_time_is_found_by_its_share() -> None:
    """Flapping never makes a row."""
    circuit = Circuit(POLICY)
    for number in range(10):
        assert circuit.allows(0.0)
        report = circuit.failed if number % 2 else circuit.succeeded
        report(float(number), trial=False)
    assert circuit.state(9.0) == "open"


def test_old_failures_are_forgotten() -> None:
    """Beyond the window a share counts from nothing."""
    circuit = Circuit(POLICY)
    for number in range(8):
        report = circuit.failed if number % 2 else circuit.succeeded
        report(0.0, trial=False)
    for number in range(9):
        report = circuit.failed if number % 3 == 2 else circuit.succeeded
        report(100.0 + number, trial=False)
    assert circuit.state(110.0) == "closed"


def test_one_trial_is_let_through_and_decides() -> None:
    """A success closes it, a failure opens it for twice as long."""
    circuit = opened()
    assert not circuit.allows(4.9)
    assert circuit.allows(5.0)
    assert circuit.begin(5.0)
    assert circuit.state(5.0) == "half_open"
    assert not circuit.allows(5.1), "one trial at a time"
    circuit.failed(6.0, trial=True)
    assert (circuit.allows(15.9), circuit.allows(16.0)) == (False, True)
    assert circuit.begin(16.0)
    circuit.succeeded(17.0, trial=True)
    assert circuit.state(17.0) == "closed"


def test_requests_that_began_before_it_opened_say_nothing_of_a_trial() -> None:
    """Their failures do not lengthen the wait, their successes do not end it."""
    circuit = opened()
    circuit.succeeded(1.0, trial=False)
    circuit.failed(2.0, trial=False)
    assert circuit.wait_s(2.0) == 3.0


def test_a_trial_whose_client_left_is_followed_by_another_at_once() -> None:
    """It says nothing of the replica."""
    circuit = opened()
    assert circuit.begin(5.0)
    circuit.ended(5.5, trial=True)
    assert circuit.allows(5.5)


def test_a_trial_that_takes_long_does_not_keep_others_out_for_ever() -> None:
    """A whole answer may be generated for minutes: after open_s there may be another trial."""
    circuit = opened()
    assert circuit.begin(5.0)
    assert (circuit.allows(9.9), circuit.allows(10.0)) == (False, True)


def test_what_is_no_failure_never_opens_it() -> None:
    """Clients that leave, refusals, generations of any length."""
    circuit = Circuit(POLICY)
    for number in range(1000):
        circuit.ended(float(number), trial=circuit.begin(float(number)))
    assert circuit.state(1000.0) == "closed"


steps = st.lists(
    st.tuples(st.floats(0.0, 10.0), st.sampled_from(["well", "failed", "none"])), max_size=60
)


@given(steps)
def test_it_lets_a_request_through_again_within_the_longest_pause(
    steps: list[tuple[float, str]],
) -> None:
    """Whatever happened: no replica is lost for ever, and only rows and shares open a circuit."""
    circuit, now = Circuit(POLICY), 0.0
    failures = 0
    for pause_s, outcome in steps:
        now += pause_s
        if not circuit.allows(now):
            assert failures >= 3
            continue
        trial = circuit.begin(now)
        if outcome == "well":
            circuit.succeeded(now, trial=trial)
        elif outcome == "failed":
            circuit.failed(now, trial=trial)
            failures += 1
        else:
            circuit.ended(now, trial=trial)
    assert circuit.wait_s(now) <= POLICY.open_s * BACKOFF_MAX
    assert circuit.allows(now + POLICY.open_s * BACKOFF_MAX)
