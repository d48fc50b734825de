"""DeBERTaV3-base as a configuration: shapes and counts without weights or files."""

from transformers import DebertaV2Config


def base_config() -> DebertaV2Config:
    """12 layers of width 768 with an FFN of 3072, as published."""
    return DebertaV2Config(
        vocab_size=128_100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        type_vocab_size=0,
        position_biased_input=False,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=768,
        layer_norm_eps=1e-7,
    )
