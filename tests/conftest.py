"""What the whole suite shares: the tally of codes and scales that were compared with other implementations."""

import signal
from dataclasses import dataclass, field

import pytest

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt: they inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Tally:
    """Counts what the oracle tests compared, by oracle, for the summary at the end of the run."""

    rows: dict[str, dict] = field(default_factory=dict)

    def add(self, oracle: str, kind: str, codes: int = 0, scales: int = 0, differ: int = 0, convention: int = 0) -> None:
        """Compared `codes` and `scales` (or values) of data `kind`: `differ` of them differ, `convention` by a stated one."""
        row = self.rows.setdefault(oracle, {"kinds": set(), "codes": 0, "scales": 0, "differ": 0, "convention": 0})
        row["kinds"].add(kind)
        for name, count in (("codes", codes), ("scales", scales), ("differ", differ), ("convention", convention)):
            row[name] += int(count)

    def lines(self) -> list[str]:
        """One line an oracle, in the order of the tests."""
        out = []
        for oracle, row in self.rows.items():
            kinds = len(row["kinds"])
            counts = f"{row['codes']:,} codes, {row['scales']:,} scales, {row['differ']:,} differ"
            stated = f" ({row['convention']:,} more by a stated convention)" if row["convention"] else ""
            out.append(f"oracle {oracle}: {kinds} kind{'s' if kinds > 1 else ''}, {counts}{stated}")
        return out


_TALLY = pytest.StashKey[Tally]()


def pytest_configure(config):
    config.stash[_TALLY] = Tally()


@pytest.fixture(scope="session")
def tally(request) -> Tally:
    return request.config.stash[_TALLY]


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash[_TALLY].lines()
    if lines:
        terminalreporter.section("oracles")
        for line in lines:
            terminalreporter.line(line)
