"""Language models of the package transformers, from configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tests.case import SAMPLES, Problem
from tests.zoo.model import LENGTH, WIDTH, WORDS, architecture, padding, states, training, words

ENCODER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 11,
}
DECODER = {**ENCODER, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def bert() -> Problem:
    types = (torch.arange(LENGTH) > 1).long().expand(SAMPLES, LENGTH)
    model = BertForMaskedLM(BertConfig(**ENCODER))
    return training(model, input_ids=words(), attention_mask=padding(), token_type_ids=types)


def bert_with_its_own_loss() -> Problem:
    """Labels go in, the loss comes out; the mean over the words of every sample, so that shares are clear."""
    model = BertForMaskedLM(BertConfig(**ENCODER, attn_implementation="eager"))
    labels = words()

    def per_sample(output: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output.logits.mT, labels, reduction="none").mean(1)

    inputs = {"input_ids": words(), "attention_mask": padding(), "labels": labels}
    return Problem(model.train(), inputs, per_sample, loss=lambda output: output.loss)


def gpt2() -> Problem:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=11, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return training(GPT2LMHeadModel(config), input_ids=words())


def gpt_neox() -> Problem:
    return training(GPTNeoXForCausalLM(GPTNeoXConfig(**ENCODER, hidden_dropout=0.1)), input_ids=words())


def llama() -> Problem:
    return training(LlamaForCausalLM(LlamaConfig(**DECODER)), input_ids=words(), attention_mask=padding())


def qwen3() -> Problem:
    return training(Qwen3ForCausalLM(Qwen3Config(**DECODER)), input_ids=words())


def gemma2() -> Problem:
    return training(Gemma2ForCausalLM(Gemma2Config(**DECODER)), input_ids=words())


def t5() -> Problem:
    config = T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=6, d_ff=20, num_layers=2, num_heads=2, relative_attention_num_buckets=8
    )
    model = T5ForConditionalGeneration(config)
    return training(model, input_ids=words(), attention_mask=padding(), decoder_input_ids=words(3))


def bart() -> Problem:
    config = BartConfig(
        vocab_size=WORDS,
        max_position_embeddings=11,
        d_model=WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=20,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_ffn_dim=20,
        decoder_attention_heads=2,
    )
    model = BartForConditionalGeneration(config)
    return training(model, input_ids=words(), attention_mask=padding(), decoder_input_ids=words(3))


def albert() -> Problem:
    config = AlbertConfig(**{**ENCODER, "num_hidden_layers": 3}, embedding_size=8)
    return training(AlbertModel(config), states, input_ids=words(), attention_mask=padding())


def deberta_v2() -> Problem:
    config = DebertaV2Config(
        **ENCODER,
        type_vocab_size=0,
        num_labels=3,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
    )
    model = DebertaV2ForSequenceClassification(config)
    return training(model, input_ids=words(), attention_mask=padding())


def xlnet() -> Problem:
    config = XLNetConfig(vocab_size=WORDS, d_model=WIDTH, n_layer=2, n_head=2, d_inner=20, num_labels=3)
    return training(XLNetForSequenceClassification(config), input_ids=words(), attention_mask=padding())


def _mixtral(experts: str) -> Problem:
    config = MixtralConfig(**DECODER, num_local_experts=4)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return training(model, input_ids=words())


def mixtral() -> Problem:
    return _mixtral("grouped_mm")


def mixtral_batched() -> Problem:
    return _mixtral("batched_mm")


def mixtral_looped() -> Problem:
    return _mixtral("eager")


def mamba() -> Problem:
    config = MambaConfig(vocab_size=WORDS, hidden_size=WIDTH, state_size=5, num_hidden_layers=2)
    return training(MambaForCausalLM(config), input_ids=words())


SOURCE = "transformers"
SINGLE = {"source": SOURCE, "dtype": torch.float32}  # their norms, rotations or states are in float32, always
MODELS = [
    architecture(bert, "BERT", SOURCE),
    architecture(bert_with_its_own_loss, "BERT, loss inside, attention written out", SOURCE),
    architecture(gpt2, "GPT-2", SOURCE),
    architecture(gpt_neox, "GPT-NeoX", SOURCE),
    architecture(llama, "Llama, grouped queries", **SINGLE),
    architecture(qwen3, "Qwen 3", **SINGLE),
    architecture(gemma2, "Gemma 2", **SINGLE),
    architecture(t5, "T5", **SINGLE),
    architecture(bart, "BART", SOURCE),
    architecture(albert, "ALBERT", SOURCE),
    architecture(deberta_v2, "DeBERTa v2", SOURCE),
    architecture(xlnet, "XLNet", **SINGLE),
    architecture(mixtral, "Mixtral, experts by grouped products", **SINGLE),
    architecture(mixtral_batched, "Mixtral, experts by batched products", **SINGLE),
    architecture(mixtral_looped, "Mixtral, experts in a loop", **SINGLE),
    architecture(mamba, "Mamba", **SINGLE),
]
