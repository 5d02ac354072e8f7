"""The embedded world: true arithmetic, disjoint splits, exact tokenizers, models that learn."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roro_ray.errors import ConfigError
from roro_ray.world.corpus import IGNORED, CorpusSpec, draw_batches, draw_document
from roro_ray.world.models import MODELS, WEIGHTS_DIR, ModelSpec
from roro_ray.world.tasks import (
    SPLITS,
    SUITES,
    Operation,
    Program,
    draw_programs,
    make_queries,
    misapply_operation,
    read_answer,
    render_query,
    render_solution,
)
from roro_ray.world.tokenizer import make_char_tokenizer, make_tokenizer
from roro_ray.world.train import main, train_model

PROGRAM = Program("chain", 36, (Operation("dbl"), Operation("mul", 4), Operation("sub", 38), Operation("set", 7)))


def test_solution_is_computed_by_hand():
    assert render_query(PROGRAM) == "Start with 36. A: double; B: times 04; C: subtract 38; D: reset to 07."
    steps = ["A: dbl 36 = 72", "B: 72 * 04 = 88", "C: 88 - 38 = 50", "D: set 07 = 07", "Answer: 07"]
    assert render_solution(PROGRAM) == steps


def test_misconception_forgets_the_carry_only_on_hard_steps():
    assert misapply_operation(Operation("mul", 4), 36, 100) == 24  # 3*4=12 -> 2, 6*4=24 -> 4
    assert misapply_operation(Operation("sub", 38), 52, 100) == 24  # 5-3=2, 2-8=-6 -> 4
    assert misapply_operation(Operation("sub", 8), 52, 100) == 44


def test_clock_counts_modulo_60():
    assert render_solution(Program("clock", 50, (Operation("add", 9), Operation("dbl"))))[-1] == "Answer: 58"


@pytest.mark.parametrize("suite", SUITES)
def test_splits_never_overlap_and_are_reproducible(suite):
    texts = {split: {q.text for q in make_queries(suite, split, 300)} for split in SPLITS}
    assert all(len(found) == 300 for found in texts.values())
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert make_queries(suite, "test", 20) == make_queries(suite, "test", 300)[:20]
    assert make_queries(suite, "train", 20, seed=1) != make_queries(suite, "train", 20, seed=0)


def test_training_documents_come_from_the_train_split_only():
    held_out = {render_query(p) for s in SUITES for p in itertools.islice(draw_programs(s, "test", 0), 500)}
    rng = random.Random(0)
    prompts = {draw_document(rng, CorpusSpec(all_easy=0.5, misconceived=0.5))[0] for _ in range(3000)}
    assert not prompts & held_out


def test_unknown_suite_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown suite 'chian'.*did you mean 'chain'"):
        make_queries("chian", "test", 1)
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        make_queries("chain", "dev", 1)


def test_read_answer():
    assert read_answer("Answer: 07") == "07"
    assert read_answer("A: dbl 36 = 72") is None
    assert read_answer("Answer: ") is None


@given(st.text(max_size=80))
def test_tokenizer_keeps_any_text(text):
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizers_read_a_whole_document_exactly():
    document = render_query(PROGRAM) + "\n\n" + "\n\n".join(render_solution(PROGRAM))
    for tokenizer in (make_tokenizer(), make_char_tokenizer()):
        assert tokenizer.decode(tokenizer.encode(document)) == document
    assert make_tokenizer().tokenize("B: 72 * 04 = 88\n\n")[0] == "B: "


def test_batches_learn_the_solution_only():
    tokenizer = make_tokenizer()
    ids, mask, labels = next(draw_batches(tokenizer, CorpusSpec(), 512, seed=0))
    learned = tokenizer.decode(ids[0][labels[0] != IGNORED])
    assert re.match(r"A: .*Answer: \d\d<eos>$", learned, re.S)
    assert torch.equal(labels[0][labels[0] != IGNORED], ids[0][labels[0] != IGNORED])
    assert mask.sum() == (ids != tokenizer.pad_token_id).sum()


@pytest.mark.timeout(120)
def test_a_tiny_model_learns_in_seconds():
    spec = ModelSpec("qwen3", 32, 1, 2, 64, CorpusSpec(all_easy=1.0), 200_000, 5e-3, lookahead=2)
    _, losses = train_model(spec, seed=0, report_every=16)
    assert losses[-1] < 0.5 * losses[0]
    _, again = train_model(spec, seed=0, report_every=16)
    assert again == losses


@pytest.mark.timeout(120)
def test_training_command_writes_a_loadable_model(tmp_path, capsys):
    main(["small", "--scale", "0.005", "--out", str(tmp_path)])
    assert "small:" in capsys.readouterr().out
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert json.loads((tmp_path / "small" / "facts.json").read_text())["seed"] == 0
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        main(["smal"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shipped_weights_say_how_they_were_made(name):
    facts = json.loads((WEIGHTS_DIR / name / "facts.json").read_text())
    assert facts["tokens"] == MODELS[name].tokens
    assert facts["seconds"] > 0
    assert (WEIGHTS_DIR / name / "model.safetensors").stat().st_size < 4_000_000
