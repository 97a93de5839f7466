"""Rows of an encoder-decoder are what transformers' tokenizer and collator make of them; labels alone are learnt."""

import json

import numpy as np
import pytest
import tokenizers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from jaxtune.config import get_default
from jaxtune.data.batches import eval_batches, real_tokens, stream_batches
from jaxtune.data.examples import prompt_and_reference
from jaxtune.data.formats import make_format
from jaxtune.data.load import load_dataset, load_prompts, report, stream_examples
from jaxtune.data.seq2seq import EncoderDecoder, Lengths, collate, sides
from jaxtune.data.sources import Row
from jaxtune.data.splits import read_prompts, read_splits, train_batches
from jaxtune.data.virtual import Virtual
from jaxtune.errors import DataError, UserError
from jaxtune.models import decoder_start
from jaxtune.tokenizer import load_tokenizer

PLAIN = {"format": "prompt_completion", "prompt": "Say: {q}", "completion": "{a}"}
ROWS = [
    {"q": "how are you today", "a": "fine"},
    {"q": "x", "a": "a longer answer than the question was"},
    {"q": "", "a": "nothing was asked"},
    {"q": "how " * 30, "a": "fine " * 20},
    {"q": "ends itself</s>", "a": "so does this</s>"},
]


def small_t5_tokenizer(folder):
    """Saves a tokenizer with T5's special tokens that adds </s>, as transformers' T5 tokenizers do."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["how are you today fine answer question"] * 9, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_t5_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(source, **changes):
    c = get_default().data
    for key, value in {"train": source, "max_length": 20, "shuffle": False, **PLAIN, **changes}.items():
        c[key] = value
    return c


def reference(folder, rows, max_length, max_target_length, length):
    """What transformers makes of prompts and completions: its tokenizer, its collator, T5's own shift."""
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    config = T5Config(vocab_size=8, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1, decoder_start_token_id=0)
    collator = DataCollatorForSeq2Seq(theirs, T5ForConditionalGeneration(config), padding="longest")
    features = []
    for prompt, completion in rows:
        feature = theirs(prompt, max_length=max_length, truncation=True)
        features.append({k: feature[k] for k in ("input_ids", "attention_mask")})
        features[-1]["labels"] = theirs(text_target=completion, max_length=max_target_length, truncation=True).input_ids
    batch = {k: v.numpy() for k, v in collator(features).items()}
    wide = {"input_ids": length.source, "attention_mask": length.source}
    fill = {"labels": -100}
    for name, value in batch.items():
        padding = wide.get(name, length.target) - value.shape[1]
        batch[name] = np.pad(value, ((0, 0), (0, padding)), constant_values=fill.get(name, 0))
    return batch


def agrees(batch, theirs):
    assert batch["source_tokens"].tolist() == theirs["input_ids"].tolist()
    assert batch["source_segment_ids"].tolist() == theirs["attention_mask"].tolist()
    learnt = theirs["labels"] != -100
    assert np.array_equal(batch["weights"] == 1, learnt) and np.array_equal(batch["segment_ids"] == 1, learnt)
    assert np.array_equal(batch["targets"], np.where(learnt, theirs["labels"], 0))
    assert np.array_equal(batch["tokens"], np.where(learnt, theirs["decoder_input_ids"], 0))
    assert np.array_equal(batch["positions"], np.where(learnt, np.arange(learnt.shape[1]), 0))


def test_a_batch_is_transformers_own(folder, tokenizer, tmp_path):
    source = write(tmp_path, ROWS[:4])
    rows, held, length = read_splits(settings(source, max_target_length=12), tokenizer, lambda text: None, start_id=0)
    assert held is None and length == Lengths(32, 32, 0)
    (batch,) = eval_batches(rows, 4, length)
    texts = [(f"Say: {row['q']}", row["a"]) for row in ROWS[:4]]
    agrees(batch, reference(folder, texts, 20, 12, length))
    assert real_tokens(batch) == rows.counts.tokens
    counts = rows.counts
    cut = [sum(len(tokenizer.encode(row[i])) >= most for row in texts) for i, most in ((0, 20), (1, 12))]
    assert (counts.truncated, counts.target_truncated) == tuple(cut) == (1, 3)
    assert (counts.longest, counts.longest_target) == (20, 12)
    assert counts.target_tokens == int(batch["weights"].sum()) and counts.shifted == counts.unstopped == 0
    assert report(counts) == [
        f"4 of 4 rows, {counts.tokens} tokens, {counts.target_tokens} of them learnt, longest prompt 20, longest "
        "answer 12",
        "1 prompts cut at data.max_length",
        "3 answers cut at data.max_target_length",
    ]


def test_real_dialogues_are_transformers_own(shared, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared / "tokenizers/t5" / name).read_bytes())
    tokenizer, source = load_tokenizer(tmp_path), shared / "dialogsum" / "train.jsonl"
    shape = {"prompt": "Summarize the following conversation.\n\n{dialogue}\n\nSummary: ", "completion": "{summary}"}
    c = settings(str(source), max_length=256, max_target_length=64, max_train_rows=40, **shape)
    rows, _, length = read_splits(c, tokenizer, lambda text: None, start_id=0)
    assert rows.counts.truncated > 4 and rows.counts.target_truncated > 0
    (batch,) = eval_batches(rows, 40, length)
    read = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:40]]
    texts = [(shape["prompt"].format(**row), row["summary"]) for row in read]
    agrees(batch, reference(tmp_path, texts, 256, 64, length))
    (asked, *_) = read_prompts(c, tokenizer, 40, start_id=0)
    assert asked.ids == batch["source_tokens"][0][batch["source_segment_ids"][0] == 1].tolist()
    assert (asked.reference, asked.row_id) == (read[0]["summary"], read[0]["id"])


def test_sides_are_cut_each_by_itself(tokenizer, tmp_path):
    source = write(tmp_path, ROWS)
    shape = {**PLAIN, "max_length": 10, "seq2seq": EncoderDecoder(0, 6)}
    whole = [tokenizer.encode(f"Say: {row['q']}") for row in ROWS]
    answers = [tokenizer.encode(row["a"]) for row in ROWS]
    for truncation in ("right", "left"):
        dataset = load_dataset(source, tokenizer, truncation=truncation, **shape)
        for i in range(4):
            tokens, mask = dataset.example(i)
            kept = whole[i][:9] if truncation == "right" else whole[i][-9:]
            assert tokens[~mask].tolist() == [*(kept if len(whole[i]) > 9 else whole[i]), 1]
            assert tokens[mask].tolist() == [*answers[i][:5], 1] and not mask[: len(tokens[~mask])].any()
    dropped = load_dataset(source, tokenizer, truncation="drop", **shape)
    assert dropped.rows.tolist() == [i + 1 for i in range(5) if len(whole[i]) + (whole[i][-1] != 1) <= 10]
    assert dropped.counts.dropped == {"longer than data.max_length": 5 - len(dropped)} and len(dropped) < 5
    # What says </s> itself is not closed twice.
    tokens, mask = load_dataset(source, tokenizer, **PLAIN, seq2seq=EncoderDecoder(0, 99)).example(4)
    assert tokens[~mask].tolist() == whole[4] and tokens[mask].tolist() == answers[4]
    assert [(t == 1).sum() for t in (tokens[~mask], tokens[mask])] == [1, 1]


def test_prompts_go_to_the_encoder(tokenizer, tmp_path):
    source = write(tmp_path, ROWS)
    shape = {**PLAIN, "max_length": 10, "seq2seq": EncoderDecoder(0, 6), "virtual": Virtual(3)}
    for truncation in ("right", "left", "drop"):
        dataset = load_dataset(source, tokenizer, truncation=truncation, **shape)
        asked = load_prompts(source, tokenizer, count=9, truncation=truncation, **shape)
        assert [p.row for p in asked] == dataset.rows.tolist()
        for i, prompt in enumerate(asked):
            tokens, mask = dataset.example(i)
            assert prompt.ids == tokens[~mask].tolist() and prompt.ids[:3] == [-1, -2, -3] and prompt.ids[-1] == 1
            row = ROWS[prompt.row - 1]
            assert (prompt.question, prompt.reference, prompt.references) == (f"Say: {row['q']}", row["a"], [row["a"]])


def test_streams_and_the_order_of_rows_know_no_difference(tokenizer, tmp_path):
    rows = [{"q": f"how {'are ' * (i % 5)}", "a": f"fine {i}"} for i in range(30)]
    c = settings(write(tmp_path, rows))
    data, _, length = read_splits(c, tokenizer, lambda text: None, start_id=0)
    how = {"batch_size": 8, "start_row": 8, "stop_row": 45, "length": length}
    given = list(train_batches(data, seed=1, shuffle=True, **how))
    assert [cursor for _, cursor in given] == [16, 24, 32, 40, 45]
    for share in range(2):
        part = list(train_batches(data, seed=1, shuffle=True, **how, process_index=share, process_count=2))
        for (batch, _), (mine, _) in zip(given, part, strict=True):
            assert {k: v[share * 4 : share * 4 + 4].tolist() for k, v in batch.items()} == {
                k: v.tolist() for k, v in mine.items()
            }
    two = EncoderDecoder(0, 20)

    def opens():
        return stream_examples(c.train, tokenizer, max_length=20, seq2seq=two, **PLAIN)

    streamed = list(stream_batches(opens, **how))
    for (batch, at), (same, _) in zip(streamed, train_batches(data, seed=0, shuffle=False, **how), strict=True):
        assert all(np.array_equal(batch[k], same[k]) for k in batch) and at
    c.streaming = True
    stream, _, length = read_splits(c, tokenizer, lambda text: None, start_id=0)
    assert length == Lengths(32, 32, 0) and len(list(stream.open())) == 30


# --- virtual tokens ---


def test_virtual_tokens_of_both_sides(tokenizer, tmp_path):
    """As peft numbers the rows of `prompt_embeddings`: of task t, 2P from 2Pt on, the encoder's first."""
    source = write(tmp_path, [row | {"t": i % 2} for i, row in enumerate(ROWS[:3])])
    c = settings(source, task_id="t", max_length=30)
    virtual = Virtual(3, 2, decoder=True)
    rows, _, length = read_splits(c, tokenizer, lambda text: None, virtual, start_id=0)
    up = [-(-(most + 3) // 32) * 32 for most in (rows.counts.longest, rows.counts.longest_target)]
    assert length == Lengths(*up, 0, 3)
    (batch,) = eval_batches(rows, 4, length)
    plain, _, narrow = read_splits(settings(source, max_length=30), tokenizer, lambda text: None, start_id=0)
    (bare,) = eval_batches(plain, 4, narrow)
    for i, task in enumerate((0, 1, 0)):
        assert (-1 - batch["source_tokens"][i, :3]).tolist() == [6 * task + k for k in range(3)]
        assert (-1 - batch["tokens"][i, :3]).tolist() == [6 * task + 3 + k for k in range(3)]
        assert batch["tokens"][i, 3] == 0 and not batch["weights"][i, :3].any()
        for name in ("tokens", "targets", "weights", "segment_ids"):
            width = min(bare[name].shape[1], batch[name].shape[1] - 3)
            assert np.array_equal(batch[name][i, 3 : 3 + width], bare[name][i, :width])
        assert np.array_equal(batch["source_tokens"][i, 3:30], bare["source_tokens"][i, :27])
        n = int(batch["segment_ids"][i].sum())
        assert batch["positions"][i, :n].tolist() == list(range(n)) and batch["segment_ids"][i, :n].all()
    assert not any(v[3].any() for v in batch.values())
    assert plain.counts == rows.counts and rows.fingerprint != plain.fingerprint
    assert virtual.task_of(batch["source_tokens"][:, 0]).tolist() == [0, 1, 0, 0]
    # Other prompts leave the decoder alone, and have their ids as everywhere.
    rows, _, length = read_splits(settings(source), tokenizer, lambda text: None, Virtual(3), start_id=0)
    (batch,) = eval_batches(rows, 4, length)
    assert length.virtual == 0 and batch["source_tokens"][1, :3].tolist() == [-1, -2, -3]
    assert (batch["tokens"] >= 0).all() and batch["weights"][:3, 0].all()
    assert Virtual(3, 2).ids(1).tolist() == [-4, -5, -6] and not len(Virtual(3, 2).decoder_ids(1))


# --- refusals ---


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, r"`data\.format` is messages, .* Set `data\.format` to prompt_completion"),
        ({"format": "text"}, r"`data\.format` is text"),
        ({**PLAIN, "chat_template": "chatml"}, r"`data\.chat_template` is 'chatml'.*`data\.chat_template` to None"),
    ],
)
def test_formats_of_decoders_are_refused(columns, says, tokenizer, tmp_path):
    source = write(tmp_path, ROWS)
    for opens in (load_dataset, stream_examples, load_prompts):
        count = {"count": 1} if opens is load_prompts else {}
        with pytest.raises(UserError, match=says):
            opens(source, tokenizer, seq2seq=EncoderDecoder(0, 9), **columns, **count)


def test_the_length_of_targets_belongs_to_encoder_decoders(tokenizer, tmp_path):
    assert sides(0, 40, None) == EncoderDecoder(0, 40) and sides(7, 40, 5) == EncoderDecoder(7, 5)
    assert sides(None, 40, None) is None
    with pytest.raises(UserError, match=r"`data\.max_target_length` is 8, and this model has no encoder"):
        read_splits(settings(write(tmp_path, ROWS), max_target_length=8), tokenizer, lambda text: None)
    with pytest.raises(UserError, match="The least it can be is 2"):
        sides(0, 40, 1)
    assert decoder_start({"model_type": "t5", "decoder_start_token_id": 3}) == 3
    assert decoder_start({"model_type": "t5"}) == 0 and decoder_start({"model_type": "gemma2"}) is None


def test_rows_that_cannot_be_used(tokenizer, tmp_path):
    rows = [{"q": "a", "a": " "}, {"q": None, "a": "b"}, ROWS[0]]
    shape = {**PLAIN, "seq2seq": EncoderDecoder(0, 9)}
    with pytest.raises(DataError, match=r"rows\.jsonl:2:q: it is null"):
        load_dataset(write(tmp_path, rows), tokenizer, **shape)
    dataset = load_dataset(write(tmp_path, rows), tokenizer, on_bad_row="skip", **shape)
    assert dataset.rows.tolist() == [3] and dataset.counts.dropped == {"bad row": 1, "no text to learn": 1}


def test_rows_that_do_not_fit_are_an_error():
    row = (np.array([5, 6, 1, 7, 1]), np.array([False, False, False, True, True]))
    assert collate([row], 1, Lengths(3, 2, 0))["tokens"].tolist() == [[0, 7]]
    for lengths in (Lengths(2, 2, 0), Lengths(3, 1, 0), Lengths(3, 2, 0, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            collate([row], 1, lengths)
    with pytest.raises(ValueError, match="do not fit"):
        collate([row, row], 1, Lengths(3, 2, 0))


# --- classes and answers, for any model ---


def test_a_class_stands_for_its_name(tokenizer):
    shape = {"format": "prompt_completion", "prompt": "{sentence} {label_text}", "completion": "{label}"}
    names = ("negative", "positive")
    form = make_format(tokenizer, label_names=names, **shape)
    row = {"sentence": "s", "label_text": 3}
    for value, name in ((0, "negative"), (1, "positive"), ("1", "positive")):
        asked = prompt_and_reference(Row(1, {**row, "label": value, "id": 7}), tokenizer, form)
        assert (asked.text, asked.reference, asked.references, asked.row_id) == ("s 3", name, [name], "7")
    bad = {2: "it is 2; a class is an integer from 0 to 1", -1: r"often have none \(-1\)", "neg": "of type str"}
    for value, why in [*bad.items(), (True, "it is True"), (1.0, "of type float"), (None, "null")]:
        with pytest.raises(DataError, match=f"3:label: .*{why}"):
            prompt_and_reference(Row(3, {**row, "label": value}), tokenizer, form)
    # Another column, in a text; and without names a class is a number.
    form = make_format(tokenizer, format="text", text="{x} is {mood}", label_column="mood", label_names=list(names))
    assert form.label_names == names
    plain = prompt_and_reference(Row(1, {**row, "label": -1}), tokenizer, make_format(tokenizer, **shape))
    assert plain.reference == "-1" and plain.row_id is None
    for bad in ("negative", (), ("a", "a"), ("a", 1), ("a", ""), 3):
        with pytest.raises(UserError, match="a list of different names"):
            make_format(tokenizer, label_names=bad, **shape)
    with pytest.raises(UserError, match=r"no template names its column \{mood\}"):
        make_format(tokenizer, label_names=names, label_column="mood", **shape)
    with pytest.raises(UserError, match="no template names its column"):
        make_format(tokenizer, format="text", label_names=names)


def test_answers_stand_for_the_first_and_all_are_right(tokenizer, tmp_path):
    shape = {"format": "prompt_completion", "prompt": "{question}\n", "completion": "A: {answers}"}
    answered = {"question": "q", "id": "x1", "answers": {"text": ["one", "uno"], "answer_start": [0, 4]}}
    without = {"question": "r", "id": 2, "answers": {"text": [], "answer_start": []}}
    source = write(tmp_path, [answered, without])
    with pytest.raises(DataError, match=r"rows\.jsonl:2:answers: it has no answer\. Set `data\.no_answer`"):
        load_dataset(source, tokenizer, **shape)
    assert len(load_dataset(source, tokenizer, on_bad_row="skip", **shape)) == 1
    found = load_prompts(source, tokenizer, count=9, no_answer="unanswerable", **shape)
    assert [(p.reference, p.references, p.row_id) for p in found] == [
        ("A: one", ["A: one", "A: uno"], "x1"),
        ("A: unanswerable", [], "2"),
    ]
    assert [p.row for p in load_prompts(source, tokenizer, count=9, **shape)] == [1]
    dataset = load_dataset(source, tokenizer, no_answer="unanswerable", **shape)
    for i, answer in enumerate(("A: one", "A: unanswerable")):
        tokens, mask = dataset.example(i)
        assert tokenizer.decode(tokens[mask]) == answer
    # With the encoder's data and a chat template, too.
    two = load_prompts(source, tokenizer, count=9, no_answer="-", seq2seq=EncoderDecoder(0, 9), **shape)
    assert [p.references for p in two] == [["A: one", "A: uno"], []] and two[1].reference == "A: -"
    chat = load_prompts(source, tokenizer, count=9, no_answer="-", chat_template="chatml", **shape)
    assert [p.references for p in chat] == [["A: one", "A: uno"], []] and chat[0].reference == "A: one"
    odd = write(tmp_path, [{"question": "q", "answers": {"text": ["a", None]}}, {"question": "q", "answers": {"t": 1}}])
    with pytest.raises(DataError, match=r"1:answers\.text\[1\]: it is null.*\n.*2:answers: it is of type dict"):
        load_dataset(odd, tokenizer, **shape)


@pytest.mark.parametrize(
    ("name", "no_answer"), [("squad_v2", "unanswerable"), ("persian_qa", "بدون پاسخ"), ("pquad", "بدون پاسخ")]
)
def test_real_questions(shared, tokenizer, name, no_answer):
    source = shared / name / "train.jsonl"
    shape = {"format": "prompt_completion", "prompt": "{context}\n{question}\n", "completion": "{answers}"}
    found = load_prompts(str(source), tokenizer, count=10**6, max_length=10**6, no_answer=no_answer, **shape)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert [(p.references, p.row_id) for p in found] == [(row["answers"]["text"], str(row["id"])) for row in rows]
    assert [p.reference for p in found] == [(row["answers"]["text"] or [no_answer])[0] for row in rows]
    assert any(not p.references for p in found) and any(p.references for p in found)
