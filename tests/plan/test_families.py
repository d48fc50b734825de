"""For every family of models: a row's prediction is the same alone, in a batch, and in plain transformers."""

import csv
import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from harness import cli
from harness.contracts import Subject
from harness.contracts.subject import spec_of, task_of
from harness.errors import InputError
from harness.plan import preflight
from harness.plan.sweep import Sweep
from harness.plan.trial import check_rows
from harness.record.store import RecordStore
from harness.run.run import run_one
from harness.run.streams import seed_everything
from harness.spec import Place, TrainSpec
from harness.splits import make_splits
from harness.task import Examples
from tasks import padding, pretrained
from tasks.glue import Glue
from tasks.plain_text import plain_encoding
from tasks.positions import num_positions
from tests.support import families, tiny

READ = (
    "BERT,RoBERTa,XLM-R,CamemBERT,DeBERTa-v3,DeBERTa,ELECTRA,DistilBERT,MPNet,ALBERT,XLNet,ModernBERT,Longformer,GPT-2,"
    "GPT-2|no padding token,GPT-NeoX,BLOOM,Falcon,OPT,Llama,Mistral,Gemma,Phi,Qwen2,T5,BART,mBART"
)
FAMILIES = [name.replace("|", ", ") for name in READ.split(",")]
STRINGS = (
    "</s>",
    "[SEP]",
    "<|endoftext|>",
    "[MASK]",
    "<pad>",
    "<s>",
    "<sep>",
)  # special tokens of one or another family
WORDS = [
    "film",
    "was",
    "a",
    "very",
    "long",
    "and",
    "quiet",
    "story",
    "about",
    "people",
    "who",
    "live",
    "near",
    "water",
    "and",
    "never",
]


def write_table(path: Path, *, values: bool = False, texts: list[str] | None = None) -> str:
    """40 rows of 3 to 17 words; the task's name."""
    texts = texts or [f"the {' '.join(WORDS[row % 3 : 3 + row % 13])} {('bad', 'good')[row % 2]}" for row in range(40)]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows([text, row % 2 + 0.5 if values else row % 2] for row, text in enumerate(texts))
    return f"text:{path}[max_length=48]"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def model_of(place: Path, family: str) -> str:
    folder = place / family
    if not folder.exists():
        families.write(family, folder)
    return str(folder)


def checked(task: str, model: str, precision: str = "fp32") -> list[str]:
    """What is found and said before the first run."""
    sweep = Sweep.of({"methods": ["head"], "tasks": [task], "model": model}, "sweep")
    tasks = preflight.check_tasks(sweep, Place())
    return preflight.check_models(tasks, TrainSpec(precision=precision), Place())


def stock_outputs(run: Path, model: str, texts: list[str]) -> np.ndarray:
    """Plain transformers + PEFT, one row at a time, with nothing set by hand."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    if (run / "adapter" / "adapter_config.json").exists():
        base = PeftModel.from_pretrained(base, run / "adapter")
    else:
        base.load_state_dict(load_file(run / "adapter" / "trained.safetensors"), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base.eval()
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=48, return_tensors="pt") for text in texts]
        return np.array([base(**row).logits.item() for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_is_in_a_batch_is_in_plain_transformers(family, place, tmp_path):
    same_everywhere(model_of(place, family), tmp_path)


@pytest.mark.parametrize("family", ["GPT-2", "Qwen2", "BERT", "T5"])
def test_so_it_is_where_the_configuration_names_another_padding_token(family, tmp_path):
    """The end token of a decoder, another special token of an encoder: not the tokenizer's."""
    pad = 0 if family in ("GPT-2", "Qwen2") else 2
    same_everywhere(str(families.write(family, tmp_path / "model", pad_token_id=pad)), tmp_path)


def same_everywhere(model: str, tmp_path: Path) -> None:
    """Trained in batches, scored in batches; the export in plain transformers, row by row."""
    task = write_table(tmp_path / "texts.csv", values=True)
    checked(task, model)
    subject = Subject("lora[rank=2,learning_rate=1e-2]", tmp_path, task=task, batches=4)
    subject.place = Place(model=model, save_adapter=True)
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    record = run_one(spec_of(subject), store)
    if record.status == "unsupported":  # a family without linear layers
        record = run_one(spec_of(subject, method="full[learning_rate=1e-3]"), store)
    assert record.status == "done", record.traceback
    name, examples = next(iter(make_splits(task_of(task), None).evaluation.items()))
    found = load_file(store.folder(record.run_id) / "predictions.safetensors")[f"{name}/predictions"].numpy()
    expected = stock_outputs(store.folder(record.run_id), model, examples.columns["text"])
    assert len({len(text.split()) for text in examples.columns["text"]}) > 3
    assert np.ptp(expected) > 5e-4, "the rows are all alike: nothing would be seen"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX", "Qwen2"])
@pytest.mark.parametrize("pad", [0, None, -1])
def test_whatever_the_configuration_says_of_padding(family, pad, tmp_path):
    """Another token than the tokenizer's, none, or one that the model does not have."""
    model = str(families.write(family, tmp_path / "model", pad_token_id=pad))
    task = write_table(tmp_path / "texts.csv")
    said = checked(task, model)
    assert len(said) == 1, said
    assert "rows are padded with" in said[0]
    config = task_of(task).backbone(model).module.config
    assert 0 <= config.pad_token_id < config.vocab_size
    assert config.pad_token_id == pad or pad != 0
    assert checked(write_table(tmp_path / "more.csv", values=True), model) == said


def test_a_dry_run_says_it_too(place, tmp_path, capsys):
    task, model = write_table(tmp_path / "texts.csv"), model_of(place, "GPT-2, no padding token")
    options = [
        "--methods",
        "head",
        "--tasks",
        task,
        "--model",
        model,
        "--batches",
        "2",
        "--results",
        str(tmp_path / "r"),
    ]
    assert cli.main(["run", "--dry-run", *options]) == 0
    assert "names no padding token: rows are padded with 1 ('<pad>')" in capsys.readouterr().out


def test_a_token_that_rows_end_with_is_not_padding(tmp_path):
    """The tokenizer's padding token is its end token, which its template appends."""
    model = families.write("Llama", tmp_path / "model", pad_token_id=None)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    processor = tokenizer["post_processor"]
    processor["single"].append(end)
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    loaded = pretrained.load_tokenizer(str(model))
    assert loaded("good")["input_ids"][-1] == loaded.pad_token_id == 2
    assert padding.padding_token(padding.configuration(str(model)), loaded, str(model)) == 1


@pytest.mark.parametrize("family", ["GPT-2", "GPT-2, no padding token", "Llama", "BERT"])
def test_an_empty_text_is_one_token_at_least(family, place, tmp_path):
    task = task_of(write_table(tmp_path / "texts.csv"))
    model = model_of(place, family)
    texts = ["", "", "the film"]
    encoded = task.encode(examples_of(texts), model)
    module = task.backbone(model).module.eval()
    with torch.no_grad():
        together = task.outputs(module, task.collate(encoded, (0, 1, 2), None))
        alone = task.outputs(module, task.collate(encoded, (0,), None))
    torch.testing.assert_close(together[:2], alone.expand(2, 2), rtol=0, atol=1e-4)


def examples_of(*columns: list[str]) -> Examples:
    named = {f"text{number}": texts for number, texts in enumerate(columns)}
    return Examples(named, np.zeros(len(columns[0]), dtype=np.int64))


@pytest.mark.parametrize("family", ["FNet", "ConvBERT"])
def test_a_family_that_reads_its_padding_is_found_before_the_first_run(family, tmp_path):
    model = str(families.write(family, tmp_path / family, initializer_range=0.2))
    with pytest.raises(InputError, match=r"a row alone and the same row in a batch .* reads the padding") as caught:
        checked(write_table(tmp_path / "texts.csv"), model)
    assert "\n" not in str(caught.value)
    assert model in str(caught.value)


def test_a_model_that_draws_random_numbers_in_evaluation_is_found(place, tmp_path, monkeypatch):
    task = task_of(write_table(tmp_path / "texts.csv"))
    model = model_of(place, "BERT")
    monkeypatch.setattr(type(task), "outputs", lambda self, model, batch: torch.rand(len(batch.labels), 2))
    encoded = task.encode(make_splits(task, None).train, model)
    with pytest.raises(InputError, match="two passes over the same rows differ too"):
        check_rows(task, task.backbone(model).module, encoded, TrainSpec(), "model 'x'")


def test_a_batch_that_the_model_cannot_take_is_found_before_the_first_run(tmp_path):
    """BART without an end token in its template."""
    model = families.write("BART", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(InputError, match=r"cannot take a batch of its rows: .*eos") as caught:
        checked(write_table(tmp_path / "texts.csv"), str(model))
    assert "\n" not in str(caught.value)


def test_a_lower_precision_is_measured_and_said(place, tmp_path):
    (line,) = checked(write_table(tmp_path / "texts.csv"), model_of(place, "RoBERTa"), precision="bf16")
    assert "in bf16 the outputs of a row alone and in a batch differ by" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_within_texts_are_text(family, place):
    model = model_of(place, family)
    tokenizer = pretrained.load_tokenizer(model)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ordinary = ["the film was good", "a very long story, and quiet", "x < y > z / [w] | v"]
    strings = sorted({*STRINGS, *families.FAMILIES[family].special})
    texts = [*ordinary, *(f"the {string}film{string} was {string} good{string}" for string in strings)]
    for columns in ([texts], [texts, texts[::-1]]):
        found = plain_encoding(pretrained.load_tokenizer(model), columns)["input_ids"]
        template = [number for number in tokenizer(*([""] for _ in columns))["input_ids"][0] if number in special]
        for row in found:
            assert [number for number in row if number in special] == template
    few = [texts[:3], texts[:3]]
    assert plain_encoding(tokenizer, few)["input_ids"] == tokenizer(*few)["input_ids"]
    after = plain_encoding(tokenizer, [texts])["input_ids"][:3]
    assert after == pretrained.load_tokenizer(model)(ordinary)["input_ids"]


def test_end_tokens_within_texts_train_and_are_scored(place, tmp_path):
    texts = [f"the film {row} was {('bad', 'good')[row % 2]}" for row in range(40)]
    texts[7] = texts[31] = "the </s>film</s> was <s>good [SEP] <|endoftext|>"
    for family in ("T5", "BART"):
        task = write_table(tmp_path / f"{family}.csv", texts=texts)
        checked(task, model_of(place, family))
        subject = Subject("head", tmp_path, task=task, batches=12, place=Place(model=model_of(place, family)))
        store = RecordStore(tmp_path / family)
        store.make_ready()
        assert run_one(spec_of(subject), store).status == "done"


def test_special_tokens_within_texts_of_a_tokenizer_in_python(tmp_path):
    from transformers import EsmTokenizer, PhobertTokenizer

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("".join(f"{piece} 9\n" for piece in ("th@@", "e", "<@@", "s@@", ">", "e@@")))
    (tmp_path / "bpe.codes").write_text("t h 9\n")
    words = PhobertTokenizer(str(vocabulary), str(tmp_path / "bpe.codes"))
    assert not words.is_fast
    ordinary, row = plain_encoding(words, [["the e", "the <s> e"]])["input_ids"]
    assert words.convert_ids_to_tokens(row) == ["<s>", "th@@", "e", "<@@", "s@@", ">", "e", "</s>"]
    assert ordinary == words("the e")["input_ids"]
    vocabulary.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *"MKTV"]))
    esm = EsmTokenizer(str(vocabulary))
    assert plain_encoding(esm, [["MKTV"]])["input_ids"] == [[0, 5, 6, 7, 8, 2]]  # its letters are added tokens
    with pytest.raises(InputError, match=r"the text 'MK <eos> TV'.*special tokens"):
        plain_encoding(esm, [["MKTV", "MK <eos> TV"]])


POSITIONS = {"RoBERTa": 126, "MPNet": 126, "OPT": 128, "BART": 128, "GPT-2": 128, "Longformer": 126, "Llama": 128}
UNBOUNDED = ("XLNet", "T5", "mT5", "BLOOM", "DeBERTa-v3", "Funnel")


@pytest.mark.parametrize("family", ["BERT", *POSITIONS, "GPT-Neo", "GPT-J", "GPT-NeoX", "MPT", "mBART", "ModernBERT"])
def test_max_length_above_the_positions_is_one_line(family, place, tmp_path):
    task, most = write_table(tmp_path / "texts.csv"), POSITIONS.get(family, 128)
    with pytest.raises(InputError, match=rf"max_length = {most + 1} is above the {most} positions of model") as caught:
        task_of(task.replace("48", str(most + 1))).backbone(model_of(place, family), meta=True)
    assert caught.value.mention == "max_length"
    whole = task_of(task.replace("48", str(most)))
    encoded = whole.encode(examples_of([" ".join(["film"] * 200)]), model_of(place, family))
    assert whole.lengths(encoded).tolist() == [most]
    module = whole.backbone(model_of(place, family)).module.eval()
    with torch.no_grad():
        assert whole.outputs(module, whole.collate(encoded, (0,), None)).isfinite().all()


@pytest.mark.parametrize("family", UNBOUNDED)
def test_relative_positions_have_no_end(family, place, tmp_path):
    module = task_of(write_table(tmp_path / "texts.csv")).backbone(model_of(place, family), meta=True).module
    assert num_positions(module) is None


NAMES = ("contradiction", "neutral", "entailment")  # another order than GLUE's
MNLI = Glue.of({"member": "mnli", "max_length": 48}, "glue/mnli")


def write_classifier(base: str, folder: Path, names: tuple[str, ...] = NAMES, **config) -> str:
    """The model with a trained head that always says its last class; its base model's numbers are `base`'s."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    module = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), **labels, **config)
    shutil.copytree(base, folder)
    with torch.no_grad():
        *_, last = [p for name, p in module.named_parameters() if len(p) == len(names) and "model." not in name]
        last[-1] += 50.0
    module.save_pretrained(folder)
    return str(folder)


def drawn(task: Glue, model: str, seed: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The head's numbers, and what torch draws next."""
    seed_everything(seed)
    head = dict(task.backbone(model).head_parameters())
    return head, torch.rand(3)


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DeBERTa-v3", "ALBERT", "XLNet", "GPT-2", "Llama", "T5", "BART"])
def test_the_head_is_new_whether_the_checkpoint_brings_one_or_not(family, place, tmp_path):
    base = model_of(place, family)
    head, after = drawn(MNLI, base)
    fitting = write_classifier(base, tmp_path / "fitting")
    wider = write_classifier(base, tmp_path / "wider", (*NAMES, "other"))
    for model in (fitting, wider):
        found, next_drawn = drawn(MNLI, model)
        assert found.keys() == head.keys()
        for name, value in head.items():
            assert torch.equal(found[name], value), name
        assert torch.equal(next_drawn, after)
    other, _ = drawn(MNLI, fitting, seed=4)
    beside = [name for name in head if "pooler" not in name or family == "DeBERTa-v3"]
    assert all(not torch.equal(other[name], head[name]) for name in beside if head[name].dim() > 1)
    bare, own = (MNLI.backbone(model).module.state_dict() for model in (base, fitting))
    assert all(torch.equal(own[name], value) for name, value in bare.items() if name not in head)


def test_what_a_checkpoint_has_of_its_pretraining_stays(place, tmp_path):
    """BERT's pooler, in the base model; ModernBERT's dense layer before the output, of a masked language model."""
    from transformers import AutoModelForMaskedLM

    one, two = (drawn(MNLI, model_of(place, "BERT"), seed)[0] for seed in (3, 4))
    assert torch.equal(one["bert.pooler.dense.weight"], two["bert.pooler.dense.weight"])
    pretrained_model = AutoModelForMaskedLM.from_pretrained(model_of(place, "ModernBERT"))
    shutil.copytree(model_of(place, "ModernBERT"), tmp_path / "masked")
    pretrained_model.save_pretrained(tmp_path / "masked")
    head, _ = drawn(MNLI, str(tmp_path / "masked"))
    assert torch.equal(head["head.dense.weight"], pretrained_model.head.dense.weight)
    tuned = write_classifier(str(tmp_path / "masked"), tmp_path / "tuned")
    assert not torch.equal(drawn(MNLI, tuned)[0]["head.dense.weight"], pretrained_model.head.dense.weight)


def test_a_head_of_images_is_new_too(tmp_path):
    model = str(tiny.write_resnet(tmp_path / "resnet"))  # it brings one for 3 classes
    heads = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        heads.append(dict(pretrained.load_backbone(model, "AutoModelForImageClassification", 3).head_parameters()))
    name = "classifier.1.weight"
    assert torch.equal(heads[0][name], heads[1][name])
    assert not torch.equal(heads[0][name], heads[2][name])


def kept(member: str = "mnli") -> Glue:
    return Glue.of({"member": member, "head": "keep", "max_length": 48}, f"glue/{member}")


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "XLNet", "GPT-2", "BART"])
def test_a_kept_head_says_the_same_classes(family, place, tmp_path):
    model = write_classifier(model_of(place, family), tmp_path / "model", ("CONTRADICTION", "neutral", "Entailment"))
    task = kept()
    encoded = task.encode(examples_of(["the film was good"] * 3, ["a story", "good", "bad or good"]), model)
    module = task.backbone(model).module.eval()
    batch = task.collate(encoded, (0, 1, 2), None)
    own = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        expected = own(**task.collate(encoded, (1,), None).inputs).logits[0]
        torch.testing.assert_close(module(**batch.inputs).logits[1], expected[[2, 1, 0]], rtol=0, atol=1e-4)
    said = own.config.id2label[int(expected.argmax())]
    assert task.class_names[task.predict(module, batch)[1]] == said.lower()
    assert task.backbone(model, meta=True).head == task.backbone(model).head


def test_a_head_that_cannot_be_kept_is_one_line(place, tmp_path):
    base = model_of(place, "BERT")
    cases = {
        "unnamed": (
            ("LABEL_0", "LABEL_1", "LABEL_2"),
            "mnli",
            "LABEL_0, LABEL_1, LABEL_2, the task entailment, neutral",
        ),
        "fewer": (("entailment", "not_entailment"), "mnli", "should have the same names"),
        "twice": (("entailment", "neutral", "Neutral"), "mnli", "should have the same names"),
    }
    for name, (names, member, piece) in cases.items():
        model = write_classifier(base, tmp_path / name, names)
        for meta in (False, True):
            with pytest.raises(InputError, match=piece) as caught:
                kept(member).backbone(model, meta=meta)
            assert "\n" not in str(caught.value)
            assert caught.value.mention == "head"
    with pytest.raises(InputError, match="should have the same names"):
        kept().backbone(base)
    config = json.loads((Path(base) / "config.json").read_text())
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(MNLI.class_names))}))
    with pytest.raises(InputError, match="has no head of its own"):
        kept().backbone(str(bare))
    kept("stsb").backbone(write_classifier(base, tmp_path / "score", ("LABEL_0",)))
    with pytest.raises(InputError, match="has no head of its own"):
        kept("stsb").backbone(write_classifier(base, tmp_path / "classes"))


def test_a_backbone_in_another_shape_is_not_drawn_in_silence(place, tmp_path):
    model = shutil.copytree(model_of(place, "BERT"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(InputError, match="of its backbone's tensors"):
        MNLI.backbone(str(model))


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_what_transformers_would_load_in_secret_is_refused(name, place, tmp_path):
    model = shutil.copytree(model_of(place, "BERT"), tmp_path / "model")
    for put in (lambda path: path.write_text("{}"), os.mkfifo):
        put(model / name)
        for ask in (pretrained.fingerprint, MNLI.backbone):
            with pytest.raises(InputError, match=f"holds {name} beside the model's own weights") as caught:
                ask(str(model))
            assert "\n" not in str(caught.value)
        (model / name).unlink()


def test_an_adapter_that_peft_saved_into_the_model(place, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = shutil.copytree(model_of(place, "BERT"), tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    get_peft_model(base, LoraConfig(target_modules=["query"], init_lora_weights=False)).save_pretrained(model)
    with pytest.raises(InputError, match=r"holds adapter_config\.json"):
        checked(write_table(tmp_path / "texts.csv"), str(model))


FLIPPED = (
    "config.json",
    "config.5.0.0.json",
    "tokenizer.json",
    "tokenizer.5.0.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "spiece.model",
    "model.safetensors",
)
INERT = (
    "generation_config.json",
    "chat_template.jinja",
    "adapter_model.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tf_model.h5",
    "training_args.bin",
    "optimizer.pt",
    "modeling_own.py",
    "original/model.safetensors",
    "additional_chat_templates/tool.jinja",
    "README.md",
)


@pytest.mark.parametrize("name", [*FLIPPED, *INERT])
def test_every_file_is_in_the_fingerprint_or_without_effect(name, place, tmp_path):
    model = shutil.copytree(model_of(place, "BERT"), tmp_path / "model")
    before = pretrained.fingerprint(str(model))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes((model / name).read_bytes() + b" " if (model / name).exists() else b"damaged")
    if name in FLIPPED:
        assert pretrained.fingerprint(str(model)) != before
        return
    assert pretrained.fingerprint(str(model)) == before
    texts = examples_of(["the film was good", "bad"], ["story", "a quiet story"])
    (one, first), (two, second) = (outputs(source, texts) for source in (model_of(place, "BERT"), str(model)))
    assert torch.equal(one, two)
    assert torch.equal(first, second)


def outputs(model: str, texts: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids, and what a new head of seed 0 says."""
    seed_everything(0)
    module = MNLI.backbone(model).module.eval()
    batch = MNLI.collate(MNLI.encode(texts, model), range(len(texts)), None)
    with torch.no_grad():
        return batch.inputs["input_ids"], MNLI.outputs(module, batch)


def test_weights_under_names_of_their_own_are_in_the_fingerprint(place, tmp_path):
    """Shards of an index, and the file that the configuration names."""
    base = Path(model_of(place, "BERT"))
    sharded, named = (shutil.copytree(base, tmp_path / name) for name in ("sharded", "named"))
    (sharded / "model.safetensors").rename(sharded / "part.safetensors")
    keys = load_file(sharded / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "part.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(named / "model.safetensors", named / "own.safetensors")
    config = json.loads((named / "config.json").read_text()) | {"transformers_weights": "own.safetensors"}
    (named / "config.json").write_text(json.dumps(config))
    for model, name in ((sharded, "part.safetensors"), (named, "own.safetensors")):
        before, (_, plain) = pretrained.fingerprint(str(model)), outputs(str(model), examples_of(["good"], ["bad"]))
        save_file({key: value + 1 for key, value in keys.items()}, model / name, {"format": "pt"})
        assert not torch.equal(outputs(str(model), examples_of(["good"], ["bad"]))[1], plain)
        assert pretrained.fingerprint(str(model)) != before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("device", [False, True])
def test_pipes_and_devices_do_not_hang(name, device, place, tmp_path):
    model = shutil.copytree(model_of(place, "BERT"), tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/dev/zero") if device else os.mkfifo(model / name)
    if name == "vocab.txt":  # not needed beside tokenizer.json
        assert pretrained.fingerprint(str(model)) == pretrained.fingerprint(model_of(place, "BERT"))
        return
    with pytest.raises(InputError):
        checked(write_table(tmp_path / "texts.csv"), str(model))


def test_every_name_that_transformers_reads_a_tokenizer_from_is_known():
    """Of this version: its modules say them as VOCAB_FILES_NAMES."""
    import transformers

    text = "".join(path.read_text() for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"))
    tables = re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", text, re.DOTALL | re.MULTILINE)
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    assert len(names) > 20
    assert {name for name in names if not any(fnmatch.fnmatch(name, part) for part in pretrained.PARTS)} == set()


@pytest.mark.parametrize("family", ["DeBERTa", "Longformer"])
def test_a_model_may_change_what_its_layers_give_in_place(family, place, tmp_path):
    task = write_table(tmp_path / "texts.csv")
    subject = Subject("debora[rank=2,T_max=2,n0=0]", tmp_path, task=task, batches=4)
    subject.place = Place(model=model_of(place, family))
    store = RecordStore(tmp_path / "results")
    store.make_ready()
    record = run_one(spec_of(subject), store)
    assert record.status == "done", record.traceback
