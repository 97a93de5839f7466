"""Metrics equal the scripts that others publish their numbers with, on English; and they see Persian."""

import json
import random
import subprocess
import sys

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from jaxtune import evaluate, scores
from jaxtune.errors import DataError, MissingInputError, UserError
from jaxtune.scores import chrf, exact_match, files, labels, persian, rouge, squad_v2

ONE = {"precision": 1.0, "recall": 1.0, "fmeasure": 1.0}
SAME = ["The cat sat.", "می‌رود، ۱۲ کیلو «کتاب»؟", "Über café 1.5", "हिन्दी में", "слово и дело", "猫 12 جدید"]


def row(prediction, *references):
    return {"prediction": prediction, "references": list(references)}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Persian ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("كتاب‌هاي علي", "کتاب های علی"),
        ("٠١٢ ۷۸۹ 3", "012 789 3"),
        ("خانۀ، خانهٔ؛ دانشکدة؟", "خانه, خانه; دانشکده?"),
        ("«مُعَلِّم» ۵٪ ۱٫۵ ۱٬۰۰۰", '"معلم" 5% 1.5 1,000'),
        ("مســـئول رئیس مؤثر تأثیر", "مسیول رییس موثر تاثیر"),
        ("آب آ", "آب آ"),
        ("\u200fسلام\u200e \u2067دنیا\u2069", "سلام دنیا"),
        ("\u200f12\u200f", "12"),
        ("ﻻله ﻣﯽ", "لاله می"),
        ("یک  ‌ دو\nسه", "یک دو\nسه"),
        ("café é ü سلام", "café é ü سلام"),
    ],
)
def test_persian_has_one_spelling(text, expected):
    assert persian.normalise(text) == expected


def test_normalising_twice_is_normalising_once():
    letters = [chr(c) for c in range(0x20, 0x11000) if not 0xD800 <= c < 0xE000]
    random.Random(0).shuffle(letters)
    for start in range(0, len(letters), 40):
        once = persian.normalise("ا" + "".join(letters[start : start + 40]))
        assert persian.normalise(once) == once


@pytest.mark.parametrize(
    "text", ["«Où ça ?» – naïve… ‘don’t’", "e\u0301 ¬ \u00a0 x", "Ω 猫 हिन्दी 👨\u200d👩\u200d👧", ""]
)
def test_text_without_persian_is_untouched(text):
    assert persian.normalise(text) == text


# --- all of them ---


@pytest.mark.parametrize("text", SAME)
def test_equal_texts_score_full(text):
    assert rouge.score([row(text, text)])["rouge1"] == ONE
    assert chrf.score([row(text, text)])["chrf"] == pytest.approx(100.0)
    assert squad_v2.score([{"id": "0", "prediction": text, "answers": {"text": [text]}}])["exact"] == 100.0
    assert labels.score([row(text, text)])["macro_f1"] == exact_match.score([row(text, text)])["exact_match"] == 1.0


def test_persian_spelt_in_two_ways_is_the_same():
    rows = [{"id": "0", **row("«كتاب‌های» ١٢", "کتاب های ۱۲"), "answers": {"text": ["کتاب های ۱۲"]}}]
    rows += [{"id": "1", **row("«12»؟", "۱۲"), "answers": {"text": ["۱۲"]}}]
    assert [rouge.score(rows)["rougeL"], squad_v2.score(rows)["exact"]] == [ONE, 100.0]
    assert chrf.score([row("كتاب‌های ١٢", "کتاب های 12")])["chrf"] == pytest.approx(100.0)
    assert labels.score([row(" كافي", "کافی"), row("۱", "1")])["accuracy"] == 1.0
    assert exact_match.score([row("كافي", "کافی"), row(" 12\n", "x", "12")]) == {"exact_match": 0.5, "total": 2}


def test_the_order_of_rows_changes_nothing():
    chance = random.Random(3)
    words = ["the", "cat", "sat", "on", "a", "mat", "گربه", "روی", "میز", "۱۲"]
    texts = [" ".join(chance.choices(words, k=chance.randrange(1, 7))) for _ in range(40)]
    rows = [{"id": str(n), **row(texts[n], *texts[n + 1 : n + 2 + n % 3])} for n in range(37)]
    mixed = chance.sample(rows, len(rows))
    for name, metric in scores.METRICS.items():
        assert scores.flat(metric.score(mixed)) == pytest.approx(scores.flat(metric.score(rows)), rel=1e-12), name
        with pytest.raises(DataError, match="no rows"):
            metric.score([])


def test_flat_has_one_number_a_key():
    rows = [{"id": "0", **row("a cat", "the cat")}]
    found = {name: list(scores.flat(metric.score(rows))) for name, metric in scores.METRICS.items()}
    assert found["rouge"] == list(rouge.TYPES) and found["chrf"] == ["chrf", "chrf++"]
    assert found["accuracy"] == ["accuracy", "macro_f1", "weighted_f1"] and found["exact_match"] == ["exact_match"]
    assert found["squad_v2"] == ["exact", "f1", "HasAns_exact", "HasAns_f1"]
    assert scores.flat(rouge.score(rows))["rouge1"] == 0.5  # F, not recall


# --- ROUGE ---


def test_rouge_is_that_of_its_published_cases(shared):
    cases = json.loads((shared / "rouge" / "published_cases.json").read_text())["cases"]
    for case in cases:
        targets = case["target"] if isinstance(case["target"], list) else [case["target"]]
        found = rouge.score([row(case["prediction"], *targets)], stemmer=case["use_stemmer"])[case["rouge_type"]]
        assert found == pytest.approx(case["expected"], abs=10 ** -case["places"]), case["name"]
    assert len(cases) == 24


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_of_real_summaries(shared, stemmer):
    gold = read(shared / "rouge" / "dialogsum_bart_gold.jsonl")
    suffix = "stem" if stemmer else "nostem"
    for one in gold:  # rounded to nine places there
        best, mean = (rouge.score([one], stemmer=stemmer, references=how) for how in ("max", "mean"))
        assert mean["references"] == "mean" and "references" not in best
        for kind in rouge.TYPES:
            assert list(best[kind].values()) == pytest.approx(one[f"score_multi_{suffix}"][kind], abs=1e-9)
            each = [scores[kind] for scores in one[f"per_reference_{suffix}"]]
            means = [sum(part) / len(each) for part in zip(*each, strict=True)]
            assert list(mean[kind].values()) == pytest.approx(means, abs=1e-9)
    total = rouge.score(gold, stemmer=stemmer)["rougeL"]["fmeasure"]
    assert total == pytest.approx(sum(one[f"score_multi_{suffix}"]["rougeL"][2] for one in gold) / len(gold), abs=1e-9)


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_of_latin_script_is_rouge_scores_own(stemmer):
    letters = "abcxyz ABC 0123\n -_.,'éÉüßñİıſ’“”–«»²½ªºµﬁ①ⅷℓʼＡ１𝐀\u0301\u200b\u00ad\u00a0"
    chance, theirs = random.Random(0), RougeScorer(rouge.TYPES, use_stemmer=stemmer)
    for _ in range(200):
        target, prediction = ("".join(chance.choices(letters, k=40)) + " running cats" for _ in range(2))
        ours = rouge.score([row(prediction, target)], stemmer=stemmer)
        assert {kind: tuple(ours[kind].values()) for kind in ours} == theirs.score(target, prediction)


def test_rouge_of_persian(shared):
    for one in json.loads((shared / "rouge" / "persian_default_tokenizer.json").read_text()):
        assert rouge.score([row(one["text"], one["text"])])["rouge2"] == ONE
    words, applied = rouge.Words(), 0
    for one in read(shared / "rouge" / "persian_whitespace_gold.jsonl"):
        spelt = {word: words.tokenize(word) for word in (one["target"] + " " + one["prediction"]).split()}
        # Of words between spaces that is the gold: where none of them is two to us, or differs in punctuation alone.
        if all(len(w) == 1 for w in spelt.values()) and len({*map(tuple, spelt.values())}) == len(spelt):
            applied += 1
            found = rouge.score([row(one["prediction"], one["target"])])
            for kind in rouge.TYPES:
                assert list(found[kind].values()) == pytest.approx(one["scores"][kind], abs=1e-9)
    assert applied >= 3


def test_rouge_sees_more_of_persian_than_its_digits():
    found = rouge.score([row("گربه روی میز 2025 GPT", "هوا فردا سرد است 2025 GPT")])
    assert found["rouge1"] == pytest.approx({"precision": 2 / 5, "recall": 2 / 6, "fmeasure": 4 / 11})
    assert found["rouge2"] == pytest.approx({"precision": 1 / 4, "recall": 1 / 5, "fmeasure": 2 / 9})
    assert rouge.score([row("می‌رود", "می رود")])["rouge2"] == ONE
    # rougeLsum takes sentences by themselves, rougeL the text as a whole.
    found = rouge.score([row("دو سه\nیک", "یک\nدو سه")])
    assert found["rougeLsum"] == ONE and found["rougeL"]["fmeasure"] == pytest.approx(2 / 3)


# --- chrF ---


def test_chrf_is_sacrebleus():
    predictions = ["the cat sat on the mat", "a dog, (barking)", ""]
    first, second = ["the cat is on a mat", "dogs bark", "x"], ["cat on mat", "a dog (barks)", "nothing"]
    found = chrf.score([row(*texts) for texts in zip(predictions, first, second, strict=True)])
    for name, order in {"chrf": 0, "chrf++": 2}.items():
        assert found[name] == sacrebleu.corpus_chrf(predictions, [first, second], word_order=order).score
        assert found[f"{name}_signature"].startswith(f"nrefs:2|case:mixed|eff:yes|nc:6|nw:{order}|space:no|version:")
    # With fewer references in a row: as if that row had one of them twice, since the best counts.
    ragged = chrf.score([row(predictions[0], first[0], second[0]), row(predictions[1], first[1])])
    assert ragged["chrf"] == sacrebleu.corpus_chrf(predictions[:2], [first[:2], [second[0], first[1]]]).score
    assert ragged["chrf_signature"].startswith("nrefs:var|")


# --- SQuAD ---


def test_squad_is_the_official_scripts(shared):
    systems = json.loads((shared / "squad_v2" / "system_predictions.json").read_text())
    expected = json.loads((shared / "squad_v2" / "official_eval_expected.json").read_text())
    articles = json.loads((shared / "squad_v2" / "squad_format.json").read_text())["data"]
    questions = [question for a in articles for paragraph in a["paragraphs"] for question in paragraph["qas"]]
    for system, predictions in systems.items():
        rows = [{**question, "prediction": predictions[question["id"]]} for question in questions]
        assert squad_v2.score(rows) == expected[system]  # to the bit, as the rows are in the script's order
    by_id = {one["id"]: one for one in read(shared / "squad_v2" / "eval.jsonl")}  # as the Hub has the same questions
    assert squad_v2.score([{**by_id[one["id"]], "prediction": one["prediction"]} for one in rows]) == expected[system]


# What the script says about these, with these probabilities as its --na-prob-file.
SQUAD = [
    ("The Cat!", ["cat", "a black cat"], 0.1),
    ("black cat sat", ["the black cat"], 0.4),
    ("", [], 0.9),
    ("guess", [], 0.95),
    ("", ["Paris"], 0.7),
    ("in Paris", ["Paris", "the"], 0.2),
    ("a", ["the"], 0.3),
    ("right", ["right"], 1.5),
]
SAID = {"exact": 37.5, "f1": 55.833333333333336, "total": 8}
SAID |= {"HasAns_exact": 33.333333333333336, "HasAns_f1": 57.77777777777778, "HasAns_total": 6}
SAID |= {"NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2}
SAID |= {"best_exact": 50.0, "best_exact_thresh": 0.3, "best_f1": 68.33333333333333, "best_f1_thresh": 0.4}


def test_squad_with_probabilities_of_no_answer():
    rows = [
        {"id": str(n), "prediction": text, "answers": {"text": answers}, "no_answer_probability": p}
        for n, (text, answers, p) in enumerate(SQUAD)
    ]
    assert squad_v2.score(rows) == SAID and list(squad_v2.score(rows)) == list(SAID)
    with pytest.raises(DataError, match="7 of 8 rows"):
        squad_v2.score([*rows[:-1], {k: v for k, v in rows[-1].items() if k != "no_answer_probability"}])
    # Without, no threshold is applied or sought; a question without prediction is left out.
    rows = [{k: v for k, v in one.items() if k != "no_answer_probability"} for one in rows]
    found = squad_v2.score([*rows, {"id": "8", "prediction": None, "answers": {"text": []}}])
    assert (found["exact"], found["total"], found.pop("missing"), "best_exact" in found) == (50.0, 8, 1, False)
    assert found == squad_v2.score(rows)


# --- labels ---


def test_labels_as_scikit_learn_has_them():
    golds = ["positive", "positive", "negative", "negative", "neutral", "positive", "negative", "neutral"]
    predictions = ["Positive ", "negative", "negative", "I think so", "positive", "POSITIVE", "positive", ""]
    rows = [row(p, gold) for p, gold in zip(predictions, golds, strict=True)]
    found = labels.score(rows)
    # accuracy_score; f1_score(average="macro" and "weighted"), precision_recall_fscore_support of the three labels.
    assert (found["accuracy"], found["other"], found["total"]) == (0.375, 2, 8)
    assert (found["macro_f1"], found["weighted_f1"]) == pytest.approx((0.3238095238095238, 0.3642857142857143))
    assert {label: list(parts.values()) for label, parts in found["labels"].items()} == {
        "negative": pytest.approx([0.5, 1 / 3, 0.4, 3]),
        "neutral": [0.0, 0.0, 0.0, 2],
        "positive": pytest.approx([0.5, 2 / 3, 0.5714285714285714, 3]),
    }
    with_mixed = labels.score(rows, labels=["positive", "neutral", "Negative", "mixed"])
    assert with_mixed["macro_f1"] == pytest.approx(0.24285714285714285)
    assert with_mixed["weighted_f1"] == found["weighted_f1"]
    with pytest.raises(DataError, match="'neutral' of a reference is none of: negative, positive"):
        labels.score(rows, labels=["positive", "negative"])
    assert labels.score([row("b", "a", "b"), row("c", "a", "b")])["labels"]["b"]["support"] == 1


# --- a file ---


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "answers.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def test_a_file_is_scored_on_the_screen_or_as_json(written, capsys):
    rows = [{"id": "0", **row("یک دو", "یک", "دو دو سه")}, {"id": "1", **row("a cat", "the cat")}]
    path = written(rows[0], "", rows[1])
    assert evaluate.main(["--predictions", path, "--metric", "rouge", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == rouge.score(rows) and "rougeLsum" in said.err
    assert evaluate.main(["--predictions", path, "--metric=rouge", "--references=mean", "--stemmer"]) == 0
    out = capsys.readouterr().out
    assert "references   mean" in out and "rouge1         0.5000   0.5833     0.5167" in out
    words = ["--predictions", path, "--metric", "accuracy,squad_v2,accuracy", "--labels=یک,the cat", "--json"]
    assert evaluate.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["accuracy", "squad_v2"] and found["squad_v2"] == squad_v2.score(rows)
    assert found["accuracy"] == labels.score(rows, labels=["یک", "the cat"])


SQUAD_ROW = {"id": "7", "prediction": "x", "answers": {"text": ["x"], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("metric", "bad", "said"),
    [
        ("rouge", {"prediction": "x", "reference": ["x"]}, "`references` is missing. Did you mean `reference`?"),
        ("chrf", {"references": ["x"]}, "`prediction` is missing. The row has: references."),
        ("rouge", row(3, "x"), "`prediction` is a number; it takes text."),
        ("accuracy", row(None, "x"), "`prediction` is null"),
        ("rouge", row("x"), "`references` is empty."),
        ("exact_match", row("x", "a", None), "`references`: item 2 is null"),
        ("rouge", {"prediction": "x", "references": {"a": 1}}, "`references` is an object; it takes a list of texts"),
        ("rouge", '{"prediction": "\\ud800", "references": ["x"]}', "lone surrogate"),
        ("rouge", '{"prediction": "x"', "is not JSON"),
        ("rouge", "[1]", "is a list, not an object with named fields."),
        ("squad_v2", row("x", "x"), "`id` is missing. The row has: prediction, references."),
        ("squad_v2", SQUAD_ROW, "`id` is that of line 1"),
        ("squad_v2", {**SQUAD_ROW, "id": "8", "answers": {"texts": []}}, '`answers` has no "text"'),
        ("squad_v2", {**SQUAD_ROW, "id": "8", "answers": "x"}, "`answers` is text; it takes"),
        ("squad_v2", {**SQUAD_ROW, "id": "8", "answers": [{"answer_start": 1}]}, "`answers`: item 1 is null"),
        ("squad_v2", {**SQUAD_ROW, "id": "8", "no_answer_probability": "0.5"}, "takes a finite number."),
    ],
)
def test_bad_rows_are_named_by_line_and_field(written, metric, bad, said):
    good = SQUAD_ROW if metric == "squad_v2" else row("x", "x")
    with pytest.raises(DataError) as refused:
        evaluate.main(["--predictions", written(good, "", bad), "--metric", metric])
    head, what, shape = str(refused.value).splitlines()
    assert head.endswith("1 of 2 rows cannot be scored.") and what.startswith("  line 3: ") and said in what
    assert shape.startswith(f"{metric} takes rows such as")


def test_a_file_of_bad_rows_fits_a_screen(written):
    with pytest.raises(DataError, match="… and 295 more") as refused:
        files.read(written(*[{"prediction": "\u001b[31m"}] * 300), ["rouge"])
    assert len(str(refused.value).splitlines()) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metric", "roug"], "no metric 'roug'. There are: rouge, chrf, .* Did you mean `rouge`"),
        (["--metric", ","], "names none. There are: rouge"),
        ([], "--metric is missing. There are: rouge"),
        (["--metric", "chrf", "--stemmer"], "--stemmer is for rouge; --metric names chrf"),
        (["--metric", "rouge", "--model", "x"], "--model is for answers of a model"),
        (["--metric", "rouge", "--references", "first"], "'max', 'mean'"),
        (["--metrics", "rouge"], "Unknown argument '--metrics'. Did you mean `--metric`"),
    ],
)
def test_bad_commands_are_refused(written, words, said):
    with pytest.raises(UserError, match=said) as refused:
        evaluate.main(["--predictions", written(row("x", "x")), *words])
    assert refused.value.exit_code == 64


def test_missing_files_and_nothing_to_score(tmp_path, written):
    with pytest.raises(MissingInputError, match="There is no file"):
        evaluate.main(["--predictions", str(tmp_path / "none.jsonl"), "--metric", "rouge"])
    with pytest.raises(MissingInputError, match="There is no file"):  # and no dataset of the Hub is looked for
        evaluate.main(["--predictions", "answers", "--metric", "rouge"])
    with pytest.raises(DataError, match="has no rows"):
        evaluate.main(["--predictions", written(""), "--metric", "rouge"])
    with pytest.raises(UserError, match=r"There is nothing to score\. Give --predictions FILE"):
        evaluate.main(["--metric", "rouge"])


def test_a_file_is_scored_without_jax(written):
    code = "import sys; from jaxtune import evaluate; evaluate.main(sys.argv[1:])\n"
    code += "print(sorted({'jax', 'jaxlib', 'flax', 'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    words = ["--predictions", written(row("یک", "یک")), "--metric", "rouge,chrf,accuracy,exact_match"]
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr
