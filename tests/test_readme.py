"""The README's examples run as they are printed, and say what is true."""

from __future__ import annotations

from fenced import TOP, blocks, run

README = TOP / "README.md"


def test_the_python_examples_run_and_learn() -> None:
    page = run(README)
    assert page["after"] < page["before"] / 3  # MAML, on curves it has not seen
    assert page["losses"][-1] < page["losses"][0] / 1.3  # hyperparameters, by validation loss


def test_the_two_commands_are_one_line_each() -> None:
    commands = [source.splitlines() for _, source in blocks(README, "bash")]
    assert [len(lines) for lines in commands] == [1, 1]
    (main_job,), (tests,) = commands
    assert main_job.endswith("python docs/examples/digits.py")
    assert " -m pytest" in tests
    for command in (main_job, tests):
        assert command.startswith("python3 -m venv ")
        assert " -c constraints.txt " in command
