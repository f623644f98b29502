"""Following a job: its log over all hosts and its states, with whatever can happen to the connection."""

from __future__ import annotations

import pytest

from gpt.aws.following import Line, LogTail, Outcome, Transitions, follow, last_lines, metrics_of
from gpt.errors import UserError
from tests.aws.job_standins import DENIED, EXPIRED, JOB, THROTTLED, UNREACHABLE, Script, described, transition

RUNNING, DONE = described("InProgress", "Training"), described("Completed")


def followed(aws: Script, **settings) -> tuple[Outcome, list[str], list[str]]:
    """What came of it, the lines that were shown as `host: text`, and what was said."""
    shown: list[str] = []
    said: list[str] = []
    outcome = follow(aws, JOB, lambda line: shown.append(f"{line.host}: {line.text}"), said.append, pause=aws.pause, **settings)
    return outcome, shown, said


# The log


def test_lines_come_once_in_the_order_of_time_over_all_hosts():
    aws = Script(RUNNING, RUNNING, DONE)
    aws.write("algo-1-1763633500", "a1", "a2", at=10)
    aws.write("algo-2-1763633501", "b1", at=11)
    aws.at_pause = [lambda: aws.write("algo-1-1763633500", "a3", at=20), lambda: aws.write("algo-2-1763633501", "b2", at=15)]
    outcome, shown, _ = followed(aws)
    assert shown == ["algo-1: a1", "algo-1: a2", "algo-2: b1", "algo-1: a3", "algo-2: b2"]
    assert {host: list(lines) for host, lines in outcome.tails.items()} == {"algo-1": ["a1", "a2", "a3"], "algo-2": ["b1", "b2"]}


def test_streams_that_appear_late_are_found_also_the_first():
    aws = Script(RUNNING, RUNNING, RUNNING, DONE)
    aws.at_pause = [lambda: aws.write("algo-2-1", "second host first"), lambda: aws.write("algo-1-2", "then the first")]
    _, shown, said = followed(aws)
    assert shown == ["algo-2: second host first", "algo-1: then the first"]
    assert said == [], "that there is no log yet is no news"


def test_a_new_stream_of_the_same_host_after_an_interruption_goes_on():
    aws = Script(RUNNING, RUNNING, DONE)
    aws.write("algo-1-1", "before")
    aws.at_pause = [lambda: aws.write("algo-1-2", "after", at=5)]
    assert followed(aws)[1] == ["algo-1: before", "algo-1: after"]


def test_a_long_log_is_read_page_by_page():
    aws = Script(DONE, page=3)
    aws.write("algo-1-1", *(f"line {number}" for number in range(100)))
    assert followed(aws)[1] == [f"algo-1: line {number}" for number in range(100)]


def test_only_the_last_lines_are_wanted():
    aws = Script(RUNNING, DONE)
    aws.write("algo-1-1", "1", "2", "3", "4")
    aws.at_pause = [lambda: aws.write("algo-1-1", "5", "6", "7", at=9)]
    assert followed(aws, last=2)[1] == [f"algo-1: {number}" for number in (3, 4, 5, 6, 7)]


def test_what_cloudwatch_holds_back_until_after_the_end_is_shown():
    aws = Script(DONE)
    aws.write("algo-1-1", "early")
    aws.at_pause = [lambda: None, lambda: aws.write("algo-1-1", "late", at=9)]
    assert followed(aws)[1] == ["algo-1: early", "algo-1: late"]


@pytest.mark.parametrize("operation", ["describe_log_streams", "get_log_events", "describe_training_job"])
@pytest.mark.parametrize("codes", [[THROTTLED], [UNREACHABLE] * 3, [None, None, THROTTLED, UNREACHABLE]])
def test_no_line_is_lost_or_doubled_when_the_connection_fails(operation, codes):
    aws = Script(RUNNING, RUNNING, RUNNING, DONE, page=2)
    aws.write("algo-1-1", *"abcde")
    aws.write("algo-2-1", *"vwxyz", at=100)
    aws.fails(operation, *codes)
    _, shown, said = followed(aws)
    assert shown == [*(f"algo-1: {letter}" for letter in "abcde"), *(f"algo-2: {letter}" for letter in "vwxyz")]
    assert aws.renewed == 0
    if codes.count(UNREACHABLE) == 3:
        assert said[0].startswith("AWS does not answer (AWS cannot be asked: EndpointConnectionError: Could not connect")
        assert said[0].endswith("; asking again; the job goes on")
        assert said[1:] == ["AWS answers again"]
    elif len(codes) == 1:
        assert said == [], "what mends itself at once is not worth a word"


def test_waits_grow_but_not_without_end():
    aws = Script(DONE)
    aws.fails("describe_training_job", *[THROTTLED] * 8)
    followed(aws)
    assert aws.paused[:8] == [2, 4, 8, 16, 30, 30, 30, 30]


def test_expired_credentials_are_waited_for_with_a_hint_and_read_again():
    aws = Script(RUNNING, RUNNING, DONE)
    aws.write("algo-1-1", "before")
    aws.fails("get_log_events", None, None, EXPIRED, EXPIRED)
    aws.at_pause = [lambda: aws.write("algo-1-1", "after", at=9)]
    _, shown, said = followed(aws)
    assert shown == ["algo-1: before", "algo-1: after"]
    assert aws.renewed == 2
    assert len(said) == 2
    assert "credentials have expired" in said[0]
    assert "aws sso login" in said[0]
    assert said[1] == "AWS answers again"


def test_credentials_that_never_were_right_are_not_waited_for():
    aws = Script(RUNNING)
    aws.fails("describe_training_job", EXPIRED)
    with pytest.raises(Exception, match=EXPIRED):
        followed(aws)
    assert aws.paused == []


def test_a_log_that_may_not_be_read_leaves_the_state():
    aws = Script(RUNNING, RUNNING, DONE)
    aws.write("algo-1-1", "secret")
    aws.fails("get_log_events", DENIED)
    outcome, shown, said = followed(aws)
    assert (outcome.status, shown) == ("Completed", [])
    assert [text for text in said if "logs:GetLogEvents" in text] == said
    assert aws.asked.count("get_log_events") == 1


def test_a_job_that_may_not_be_looked_at_is_an_error_in_one_line():
    aws = Script(RUNNING)
    aws.fails("describe_training_job", DENIED)
    with pytest.raises(UserError, match=rf"^{JOB}: cannot be looked at: {DENIED}: no\. You, or launch\.role, lack a permission"):
        followed(aws)


def test_ctrl_c_comes_through():
    aws = Script(RUNNING)

    def press() -> None:
        raise KeyboardInterrupt

    aws.at_pause = [lambda: None, press]
    with pytest.raises(KeyboardInterrupt):
        followed(aws)


def test_without_a_log_only_the_state_is_asked_for():
    aws = Script(RUNNING, DONE)
    aws.write("algo-1-1", "a")
    said: list[str] = []
    assert follow(aws, JOB, None, said.append, pause=aws.pause).status == "Completed"
    assert set(aws.asked) == {"describe_training_job"}


def test_a_tail_goes_on_where_an_error_broke_it_off():
    aws = Script(RUNNING)
    aws.write("algo-1-1", "a")
    aws.write("algo-2-1", "b")
    tail = LogTail(aws, JOB)
    aws.fails("get_log_events", None, None, THROTTLED)
    with pytest.raises(Exception, match=THROTTLED):
        tail.read()
    assert tail.read() == [Line(0, "algo-1", "a"), Line(0, "algo-2", "b")]
    assert tail.read() == []


def test_the_last_lines_of_every_host():
    aws = Script(DONE)
    for host in (1, 2):
        aws.write(f"algo-{host}-1", *(f"{host}.{number}" for number in range(100)))
    tails = last_lines(aws, JOB)
    assert [(host, len(lines), lines[-1]) for host, lines in tails.items()] == [("algo-1", 60, "1.99"), ("algo-2", 60, "2.99")]
    aws.fails("get_log_events", DENIED)
    assert last_lines(aws, JOB) == {}


# States and metrics


def test_changes_of_state_are_told_once_with_the_time_since_the_start():
    starting, downloading = transition("Starting", 0, "Preparing the instances"), transition("Downloading", 3, "Downloading the image")
    told = Transitions()
    assert told.news(described(SecondaryStatusTransitions=[starting])) == ["[00:00:00] Starting: Preparing the instances"]
    assert told.news(described(SecondaryStatusTransitions=[starting])) == []
    again = {**downloading, "StatusMessage": "Training image download completed"}
    assert told.news(described(SecondaryStatusTransitions=[starting, downloading])) == ["[00:03:00] Downloading: Downloading the image"]
    assert told.news(described(SecondaryStatusTransitions=[starting, again])) == [
        "[00:03:00] Downloading: Training image download completed"
    ]
    assert told.news(described(SecondaryStatusTransitions=[starting, again, transition("Training", 75)])) == ["[01:15:00] Training"]


def test_metrics_are_read_from_the_log_as_sagemaker_reads_them():
    definitions = [{"Name": "train:loss", "Regex": "loss ([0-9.]+)"}, {"Name": "validation:loss", "Regex": "val ([0-9.]+)"}]
    assert metrics_of("step 10  loss 3.25  val 3.5", definitions) == {"train:loss": 3.25, "validation:loss": 3.5}
    assert metrics_of("nothing, loss ...", definitions) == {}
    aws = Script(described("Completed", AlgorithmSpecification={"MetricDefinitions": definitions}))
    aws.write("algo-1-1", "loss 3.5", "loss 3.0  val 3.25", "loss 2.5")
    assert followed(aws)[0].metrics == {"train:loss": 2.5, "validation:loss": 3.25}
