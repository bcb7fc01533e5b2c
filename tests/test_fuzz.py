"""Random training problems against a loop of their own: see ``fuzz.py``.

``pytest tests/test_fuzz.py --fuzz-cases 5000`` runs more of them.
"""

from __future__ import annotations

import fuzz
import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        count = metafunc.config.getoption("fuzz_cases", 300)
        metafunc.parametrize("seed", range(count))


def test_equal_to_the_reference_or_an_error_where_it_is_impure(seed: int) -> None:
    fuzz.check(seed)


@pytest.mark.parametrize("fault", fuzz.FAULTS)
def test_the_fuzzer_finds_a_fault_of_the_reference(fault: str) -> None:
    """Of the cases that a fault concerns, each is found; some of 40 are."""
    found = 0
    for seed in range(40):
        case = fuzz.Case(seed)
        healthy = fuzz.solve(case, by_hand=True)
        broken = fuzz.solve(case, by_hand=True, fault=fault)
        concerned = any(
            bool(((healthy[n] - broken[n]).abs() > 1e-7 * healthy[n].abs().max()).any())
            for n in healthy
        )
        if case.impure or not concerned:
            continue
        with pytest.raises(fuzz.Mismatch, match=rf"case {seed} \(pure\)\n  steps = "):
            fuzz.check(seed, fault=fault)
        found += 1
        if found == 5:
            return
    assert found > 0


def test_cases_are_the_same_each_time_and_of_all_kinds() -> None:
    cases = [fuzz.Case(seed) for seed in range(300)]
    assert str(cases[7]) == str(fuzz.Case(7))
    assert {name for case in cases for name in case.holders} == set(fuzz.HOLDERS)
    assert {case.optimizer for case in cases} == set(fuzz.OPTIMIZERS)
    assert {str(case.adjoint) for case in cases} == {str(a) for a in fuzz.ADJOINTS}
    assert set().union(*(case.wants for case in cases)) == {*fuzz.PURE, *fuzz.IMPURE}
    assert 0.05 < sum(case.impure for case in cases) / len(cases) < 0.2
    assert {case.second for case in cases} == {True, False}
    assert len({case.batch for case in cases}) == 7
