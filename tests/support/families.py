"""Tiny models of every family of transformers with a sequence classifier that is cheap to make, with random weights and
a tokenizer that treats texts as the family's own does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORPUS = ["the film was a very long and quiet story about people who live near water and never say good or bad"] * 9
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5 = ("<pad>", "</s>", "<unk>")
GPT = ("<|endoftext|>", "<pad>")
LLAMA = ("<unk>", "<s>", "</s>")
XLNET = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>")
NAMES = {"pad": "pad_token", "unk": "unk_token", "cls": "cls_token", "sep": "sep_token", "mask": "mask_token"}


@dataclass(frozen=True)
class Family:
    """config: transformers' name before "Config", with `fields` beside SIZES, of which it does not take `without`.
    kind: the tokenizer's model; single, pair: its templates; special: its special tokens, ids in turn."""

    config: str
    kind: str
    special: tuple[str, ...]
    single: str = ""
    pair: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    without: str = ""


def _bert(config: str, kind: str = "wordpiece", *, types: bool = True, without: str = "", **fields: Any) -> Family:
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if types else "[CLS] $A [SEP] $B [SEP]"
    fields = {"pad_token_id": 0, **fields}
    return Family(config, kind, BERT, "[CLS] $A [SEP]", pair, fields, {"model_input_names": names}, without)


def _roberta(config: str, kind: str = "bpe", **fields: Any) -> Family:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **fields}
    named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    return Family(config, kind, ROBERTA, "<s> $A </s>", "<s> $A </s> </s> $B </s>", ids, named)


def _gpt(config: str, *, pad: int | None = 1, **fields: Any) -> Family:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": pad, **fields}
    return Family(config, "bpe", GPT, "", "", ids, {"eos_token": "<|endoftext|>"})


def _llama(config: str, **fields: Any) -> Family:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **fields}
    named = {"bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    return Family(config, "bpe", LLAMA, "<s> $A", "<s> $A $B", ids, named)


T5_FIELDS = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
T5_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
BART_FIELDS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None}
KV = {"num_key_value_heads": 1}

FAMILIES = {
    "BERT": _bert("Bert"),
    "RoBERTa": _roberta("Roberta", type_vocab_size=1),
    "XLM-R": _roberta("XLMRoberta", "unigram", type_vocab_size=1),
    "CamemBERT": _roberta("Camembert", "unigram", type_vocab_size=1),
    "DeBERTa-v3": _bert(
        "DebertaV2",
        "unigram",
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        max_relative_positions=-1,
        type_vocab_size=0,
    ),
    "DeBERTa": _bert("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=2),
    "ELECTRA": _bert("Electra", embedding_size=32),
    "DistilBERT": _bert("DistilBert", types=False, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "MPNet": _roberta("MPNet"),
    "ALBERT": _bert("Albert", "unigram", embedding_size=16),
    "XLNet": Family(
        "XLNet",
        "unigram",
        XLNET,
        "$A:0 <sep>:0 <cls>:2",
        "$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        {
            "d_model": 32,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 64,
            "pad_token_id": 5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "padding_side": "left",
            "pad_token_type_id": 3,
        },
        without="max_position_embeddings",
    ),
    "ModernBERT": _bert(
        "ModernBert",
        "bpe",
        types=False,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
    "MobileBERT": _bert("MobileBert", embedding_size=16, intra_bottleneck_size=16),
    "SqueezeBERT": _bert("SqueezeBert", embedding_size=32),
    "RemBERT": _bert("RemBert", "unigram", input_embedding_size=16, output_embedding_size=16),
    "RoFormer": _bert("RoFormer"),
    "BigBird": _bert("BigBird", "unigram"),
    "Longformer": _roberta("Longformer", attention_window=[8, 8]),
    "Funnel": _bert(
        "Funnel", without="num_hidden_layers", n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1], num_decoder_layers=1
    ),
    "FNet": _bert("FNet"),
    "ConvBERT": _bert("ConvBert", embedding_size=32, head_ratio=1),
    "Nyströmformer": _bert("Nystromformer", segment_means_seq_len=64, num_landmarks=8),
    "GPT-2": _gpt("GPT2", n_positions=128, n_embd=32, n_layer=2, n_head=2),
    "GPT-2, no padding token": _gpt("GPT2", pad=None, n_positions=128, n_embd=32, n_layer=2, n_head=2),
    "GPT-Neo": _gpt("GPTNeo", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8),
    "GPT-NeoX": _gpt("GPTNeoX", pad=None),
    "GPT-J": _gpt("GPTJ", pad=None, n_positions=128, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    "BLOOM": _gpt("Bloom", n_layer=2, n_head=2),
    "Falcon": _gpt("Falcon", pad=None),
    "MPT": _gpt("Mpt", pad=None, d_model=32, n_heads=2, n_layers=2, max_seq_len=128),
    "OPT": Family(
        "OPT",
        "bpe",
        ROBERTA,
        "</s> $A",
        "</s> $A $B",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
        {"bos_token": "</s>", "eos_token": "</s>"},
    ),
    "Llama": _llama("Llama"),
    "Mistral": _llama("Mistral", **KV),
    "Mixtral": _llama("Mixtral", num_local_experts=2, **KV),
    "Gemma": _llama("Gemma", head_dim=16, pad_token_id=0, **KV),
    "Gemma 2": _llama("Gemma2", head_dim=16, pad_token_id=0, **KV),
    "Phi": _gpt("Phi", pad=None),
    "Phi-3": _llama("Phi3", **KV),
    "Qwen2": _gpt("Qwen2", pad=None, **KV),
    "Qwen3": _gpt("Qwen3", head_dim=16, **KV),
    "T5": Family("T5", "unigram", T5, "$A </s>", "$A </s> $B </s>", T5_FIELDS | T5_IDS, {"eos_token": "</s>"}),
    "mT5": Family("MT5", "unigram", T5, "$A </s>", "$A </s> $B </s>", T5_FIELDS | T5_IDS, {"eos_token": "</s>"}),
    "BART": _roberta("Bart", decoder_start_token_id=2, **BART_FIELDS, **BART_HEADS),
    "mBART": _roberta("MBart", "unigram", **BART_FIELDS, **BART_HEADS),
}


def write(family: str, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """The family's base model and tokenizer. `fields` go over the configuration's."""
    import torch
    import transformers

    row = FAMILIES[family]
    size = write_tokenizer(row, folder)
    config = getattr(transformers, f"{row.config}Config")
    own = {**SIZES, **row.fields, **fields}
    own.pop(row.without, None)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{row.config}Model")(config(vocab_size=size, **own))
    with torch.no_grad():  # far enough from the start that places of a text differ
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(row: Family, folder: Path) -> int:
    """Trained on CORPUS; returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special: Any = list(row.special)
    unknown = next((token for token in special if "unk" in token.lower()), None)
    letters = [chr(number) for number in range(33, 127)]
    if row.kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token=unknown, initial_alphabet=letters, show_progress=False
        )
    elif row.kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if row.single:
        used = [(token, special.index(token)) for token in special if token in f"{row.single} {row.pair}"]
        tokenizer.post_processor = processors.TemplateProcessing(row.single, row.pair, used)
    named = {NAMES[word]: token for token in special for word in NAMES if word in token.lower()}
    settings = {"model_input_names": ["input_ids", "attention_mask"], **named, **row.tokenizer}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return tokenizer.get_vocab_size()
