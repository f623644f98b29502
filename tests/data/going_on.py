"""What every source must do: go on from where it stood."""

import itertools
import json
import random
from dataclasses import asdict, replace

from gpt.data.sources import ReadReport, Source


def check_going_on(source: Source, chance: random.Random) -> None:
    """Stopped behind any row, and taken up again from what was written down, a stream and its report end as if it had not stopped."""
    report = ReadReport()
    rows = list(source.rows(report))
    for stop in {0, len(rows), chance.randint(0, len(rows))}:
        begun = ReadReport()
        stream = source.rows(begun)
        head = list(itertools.islice(stream, stop))
        state = json.loads(json.dumps({"at": stream.state_dict(), "report": asdict(begun)}))
        assert source.rows(ReadReport(), state["at"]).state_dict() == state["at"]
        later = ReadReport(**state["report"])
        rest = source.rows(later, state["at"])
        assert [*head, *rest] == rows
        assert later == report
        assert list(source.rows(replace(later), rest.state_dict())) == []
