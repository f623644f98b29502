"""The figures of answers against the libraries' and scripts that define them."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.evaluation.scores import check_libraries, exact_match, normalised, score_answers, token_f1

rouge_scorer, sacrebleu = pytest.importorskip("rouge_score.rouge_scorer"), pytest.importorskip("sacrebleu")
squad = pytest.importorskip("lm_eval.tasks.qasper.metrics")  # "taken from the official evaluation script for v1.1 of the SQuAD dataset"
ANSWERS = ["The cat sat on the mat.", "A dog barked", "", "It rained in Paris all day long."]
REFERENCES = [["the cat sat on a mat"], ["the dog barked loudly", "A dog barked!"], ["nothing"], ["In Paris it rained the whole day."]]
TEXTS = st.text(alphabet=st.sampled_from("aA theTHE.,-'ñ0\n\t "), max_size=40)


@given(TEXTS, TEXTS)
def test_question_answering_as_squad_does_it(answer, reference):
    assert normalised(answer) == squad.normalize_answer(answer)
    assert token_f1(answer, reference) == pytest.approx(squad.f1_abstractive([answer], [reference]))
    assert exact_match(answer, reference) == (squad.normalize_answer(answer) == squad.normalize_answer(reference))


def test_question_answering_by_hand():
    scores = score_answers(["exact_match", "token_f1"], ANSWERS, REFERENCES)
    assert scores.figures["exact_match"] == pytest.approx(100 * 2 / 4)  # articles, case and punctuation apart; the second reference
    # it rained in paris all day long | in paris it rained whole day: 5 of 7 and 5 of 6
    assert [each["token_f1"] for each in scores.each] == pytest.approx([100, 100, 0, 100 * 10 / 13])
    assert scores.figures["token_f1"] == pytest.approx(100 * (2 + 10 / 13) / 4)
    assert scores.errors["exact_match"] == pytest.approx(100 * (1 / 3) ** 0.5 / 2)  # of 1, 1, 0, 0: deviation / sqrt(4)


def test_rouge_is_the_library_s_and_the_best_reference_counts():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = score_answers(["rouge"], ANSWERS, REFERENCES)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        best = [
            max(scorer.score(text, answer)[theirs].fmeasure for text in texts) for answer, texts in zip(ANSWERS, REFERENCES, strict=True)
        ]
        assert [each[ours] for each in scores.each] == pytest.approx([100 * value for value in best])
        assert scores.figures[ours] == pytest.approx(25 * sum(best))
    assert scores.figures["rouge_1"] > scores.figures["rouge_2"] > 0
    assert not scores.notes


def test_rouge_says_when_it_cannot_read_the_script():
    scores = score_answers(["rouge"], ["кот сидел"], [["кот сидел на ковре"]])
    assert scores.figures["rouge_1"] == 0
    assert "a-z" in scores.notes[0]
    assert score_answers(["rouge"], ["été"], [["un bel été dans les montagnes"]]).notes == []


def test_translation_is_sacrebleu_s():
    streams = [[texts[0] for texts in REFERENCES], [None, "A dog barked!", None, None]]
    scores = score_answers(["chrf", "bleu"], ANSWERS, REFERENCES)
    assert scores.figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, streams).score)
    assert scores.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams).score)
    assert scores.signatures["chrf"].startswith("nrefs:var|")
    assert "tok:13a" in scores.signatures["bleu"]
    one = score_answers(["chrf", "bleu"], ANSWERS, [[texts[0]] for texts in REFERENCES])
    assert one.figures["chrf"] < scores.figures["chrf"]
    assert one.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams[:1]).score)


def test_blanks_at_the_ends_do_not_count():
    padded = [f" {answer}\n" for answer in ANSWERS]
    assert score_answers(["bleu", "chrf", "rouge"], padded, REFERENCES) == score_answers(["bleu", "chrf", "rouge"], ANSWERS, REFERENCES)


@pytest.mark.parametrize(("metric", "library"), [("rouge", "rouge_score"), ("chrf", "sacrebleu"), ("bleu", "sacrebleu")])
def test_a_missing_library_is_one_sentence(monkeypatch, metric, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"train\.metrics=\[{metric}\] needs {library}: pip install 'gpt-trainer\[eval\]'"):
        check_libraries(["exact_match", metric], "train.metrics")
    check_libraries(["exact_match", "token_f1", "pass"])
