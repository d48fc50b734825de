"""Gradient checkpointing and the evaluation's batch size: less memory, the same results."""

import pytest
import torch
import transformers

from harness.cli import main
from harness.contracts import Subject, start
from harness.contracts.methods import gradient_checkpointing_changes_no_loss
from harness.contracts.subject import spec_of
from harness.errors import InputError
from harness.method import Backbone
from harness.record.store import RecordStore
from harness.run.prediction import predict
from harness.run.run import run_one
from harness.spec import Place
from scripts.gpu_check_parts import RandomBert

AGAIN = Place(gradient_checkpointing=True)


@pytest.mark.parametrize(
    "method",
    [
        "lora[rank=4,dropout=0.3]",
        "adalora[init_rank=6,target_rank=3,tinit=2,tfinal=2,deltaT=1]",
        "debora[rank=4,T_max=2,hypergradient=path,components=3]",
        "debora[rank=4,T_max=2,hypergradient=implicit,iterations=2,components=3]",
        "debora[recipe=paper,rank=4,T_max=2,geometry=oblique]",
    ],
)
def test_losses_are_bit_equal_with_passes_of_the_method_s_own(method, tmp_path):
    gradient_checkpointing_changes_no_loss(Subject(method, tmp_path))


def test_second_derivatives_go_through_blocks_whose_attention_has_none_of_its_own(tmp_path):
    """Without dropout torch takes a fused kernel; the second pass has to do without it as the first did."""
    task = RandomBert(blocks=1, width=16, tokens=8, device="cpu")
    method = "debora[rank=2,T_max=1,hypergradient=implicit,iterations=2,components=3]"
    gradient_checkpointing_changes_no_loss(Subject(method, tmp_path, task, batches=16, batch_size=2))


def calls(method, place, tmp_path):
    """How often an update calls the first encoder layer's query."""
    started = start(Subject(method, tmp_path, place=place))
    layer = next(part for name, part in started.adaptation.model.named_modules() if name.endswith("self.query"))
    seen = []
    layer.register_forward_hook(lambda layer, args, output: seen.append(len(args[0])))
    started.training.update()
    return len(seen)


def test_a_block_is_computed_again_and_only_where_a_gradient_goes_through_it(tmp_path):
    assert calls("lora[rank=4]", Place(), tmp_path) == 1
    assert calls("lora[rank=4]", AGAIN, tmp_path) == 2
    assert calls("head", AGAIN, tmp_path) == 1


def kept_bytes(place, tmp_path):
    """Of the tensors that autograd keeps of a batch's forward pass."""
    started = start(Subject("lora[rank=4]", tmp_path, "synthetic[width=32,num_blocks=6]", place=place))
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        started.task.loss(started.adaptation.model, started.batch(range(8)), None)
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass(tmp_path):
    assert kept_bytes(AGAIN, tmp_path) < 0.3 * kept_bytes(Place(), tmp_path)


SMALL = {
    "Llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
}


def gradients(family, again):
    """Of a random language model whose matrices in blocks train and whose embeddings are frozen, with dropout. Without
    a cache of keys and values, which would lay them out otherwise, and round otherwise."""
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **SMALL[family])
    torch.manual_seed(0)
    head = "ForConditionalGeneration" if family == "T5" else "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            "embed" not in name and ".wte" not in name and ".wpe" not in name and parameter.dim() > 1
        )
    if again:
        Backbone(model, (), ()).checkpoint_activations()
    tokens = torch.arange(24).view(2, 12)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", SMALL)
def test_gradients_of_families_are_bit_equal_with_frozen_embeddings(family):
    for one, other in zip(gradients(family, True), gradients(family, False), strict=True):
        assert torch.equal(one, other)


def test_a_model_without_it_is_named():
    with pytest.raises(InputError, match="Linear has no gradient checkpointing"):
        Backbone(torch.nn.Linear(2, 2), (), ()).checkpoint_activations()


def test_a_task_whose_model_has_none_is_refused_before_anything_is_written(tmp_path, capsys):
    results = tmp_path / "results"
    what = ["run", "--methods", "lora", "--tasks", "digits", "--batches", "2", "--executor", "serial"]
    assert main([*what, "--results", str(results), "--gradient-checkpointing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --gradient-checkpointing: task 'digits': ")
    assert line.endswith("has no gradient checkpointing")
    assert not results.exists()


def test_a_method_that_hands_values_from_block_to_block_is_refused(tmp_path, capsys):
    results = tmp_path / "results"
    what = ["run", "--methods", "lora,queryable_lora", "--tasks", "synthetic", "--batches", "2"]
    assert main([*what, "--results", str(results), "--gradient-checkpointing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --gradient-checkpointing: 'queryable_lora' hands values from block to block")
    assert not results.exists()


def test_a_run_is_the_same_run_and_its_record_says_how_it_was_made(tmp_path):
    records = []
    for name, place in {"plain": Place(), "other": Place(gradient_checkpointing=True, evaluation_batch_size=5)}.items():
        store = RecordStore(tmp_path / name)
        store.make_ready()
        records.append(run_one(spec_of(Subject("lora[rank=4]", tmp_path, place=place, batches=6)), store))
    plain, other = records
    assert plain.run_id == other.run_id
    assert other.spec.place.gradient_checkpointing
    assert not plain.spec.place.gradient_checkpointing
    assert plain.result() == other.result()


def test_evaluations_have_a_batch_size_of_their_own(tmp_path, monkeypatch):
    started = start(Subject("head", tmp_path))
    task, encoded = started.task, started.training.encoded
    sizes = []
    collate = type(task).collate
    monkeypatch.setattr(type(task), "collate", lambda *args: sizes.append(len(args[2])) or collate(*args))
    arguments = (started.adaptation, task, encoded, encoded.labels, started.training.train, started.training.device)
    by_default = predict(*arguments)
    assert set(sizes) == {16}
    sizes.clear()
    assert (predict(*arguments, 50) == by_default).all()
    assert sizes == [50, 50, len(encoded) - 100]
