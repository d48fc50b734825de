"""One trained adapter at several ranks: the cuts against slow references, and a run that they do not disturb."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch import Tensor, nn

from harness.cli import main
from harness.contracts import Subject, spec_of, start
from harness.method import Backbone, in_modules
from harness.metric import declared
from harness.record.record import PREDICTIONS, RunRecord
from harness.record.store import RecordStore
from harness.report.evidence.examples import example_scores
from harness.run.rank_curve import rank_curve
from harness.run.run import run_one
from harness.run.streams import TrainingData
from harness.spec import TrainSpec
from methods.debora.method import Debora
from methods.shared.truncation import best_approximation, largest, swapped

ADAPTER = "default"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def trained(method: str, folder: Path) -> Any:
    started = start(Subject(method, folder))
    started.training.run(lambda training: None)
    return started.adaptation


class TestParts:
    @pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
    @pytest.mark.parametrize(("b", "a"), [((7, 5), (5, 11)), ((7, 5, 1, 1), (5, 4, 3, 3)), ((3, 5), (5, 4))])
    def test_best_approximation(self, b: tuple[int, ...], a: tuple[int, ...], rank: int) -> None:
        B, A = random(*b), random(*a)
        found = best_approximation(B, A, rank)
        assert [factor.shape for factor in found] == [B.shape, A.shape]
        product = B.flatten(1).double() @ A.flatten(1).double()
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        cut = found[0].flatten(1).double() @ found[1].flatten(1).double()
        torch.testing.assert_close(cut, expected, rtol=0, atol=1e-5)
        error = (product - cut).square().sum()
        torch.testing.assert_close(error, S[rank:].square().sum(), rtol=1e-5, atol=1e-8)

    def test_of_rank_0_stays(self) -> None:
        found = best_approximation(random(4, 0), random(0, 6), 2)
        assert [factor.shape for factor in found] == [(4, 0), (0, 6)]

    def test_largest(self) -> None:
        values = torch.tensor([0.2, -0.9, 0.5, -0.5, 0.0])
        assert largest(values, 1).tolist() == pytest.approx([0, -0.9, 0, 0, 0])
        assert largest(values, 2).tolist() == pytest.approx([0, -0.9, 0.5, 0, 0])
        assert torch.equal(largest(values[:, None], 7), values[:, None])

    def test_swapped_undoes_itself_after_an_error(self) -> None:
        weight = nn.Parameter(torch.tensor([0.1, 0.2]))
        with contextlib.suppress(KeyError), swapped({weight: torch.zeros(2)}):
            assert weight.tolist() == [0, 0]
            raise KeyError
        assert torch.equal(weight, torch.tensor([0.1, 0.2]))


class TestMethods:
    @pytest.mark.parametrize(
        "method",
        [
            "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
            "debora[rank=4,T_max=2,n0=0,step_size=0.5,geometry=oblique]",
            "debora[rank=4,T_max=2,n0=0,step_size=0.5,geometry=stiefel]",
        ],
    )
    def test_debora_is_cut_by_its_singular_values(self, method: str, tmp_path: Path) -> None:
        adaptation = trained(method, tmp_path)
        assert len(set(adaptation.ranks().values())) > 1, "some layers have to be below the rank asked for"
        whole = {name: layer.get_delta_weight(ADAPTER).detach() for name, layer in adaptation.layers.items()}
        for rank in (1, 2):
            with adaptation.at_rank(rank):
                found = {name: layer.get_delta_weight(ADAPTER) for name, layer in adaptation.layers.items()}
            for name, update in whole.items():
                U, S, Vh = torch.linalg.svd(update, full_matrices=False)
                torch.testing.assert_close(found[name], (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-4, atol=2e-6)

    def test_debora_keeps_the_largest_components_of_a_kernel(self, tmp_path: Path) -> None:
        """The largest norms, which are neither the largest s nor the first."""
        backbone = Backbone(nn.Sequential(nn.Conv2d(5, 4, 3)), (), ("0",))
        adaptation: Any = Debora(rank=4).start(backbone, TrainSpec(batches=9), TrainingData(8, 4, 0), None)
        (layer,) = adaptation.layers.values()
        for factor, seed in zip(layer.factors(ADAPTER), range(4), strict=True):
            factor.data = torch.randn(*factor.shape, generator=torch.Generator().manual_seed(seed))
        s = layer.debora_s[ADAPTER]
        s.copy_(torch.tensor([0.3, 0.9, 0.7, 0.2]))
        layer.factors(ADAPTER)[2].data[:, 1] *= 1e-3
        parts = [
            torch.einsum("o,c,h,w->ochw", *(factor.detach()[:, i] for factor in layer.factors(ADAPTER))) * s[i]
            for i in range(4)
        ]
        kept = sorted(range(4), key=lambda i: -float(parts[i].norm()))[:2]
        assert 1 not in kept
        with adaptation.at_rank(2):
            found = layer.get_delta_weight(ADAPTER)
            adaptation.export(tmp_path)
        torch.testing.assert_close(found, parts[kept[0]] + parts[kept[1]])
        stored = load_file(tmp_path / "adapter_model.safetensors")
        A, B = (stored[f"base_model.model.0.lora_{factor}.weight"] for factor in "AB")
        assert (A.shape, B.shape) == ((2, 5, 3, 3), (4, 2, 1, 1))
        torch.testing.assert_close(torch.einsum("or,rchw->ochw", *map(torch.tensor, (B[..., 0, 0], A))), found)

    def test_adalora_keeps_the_largest_e(self, tmp_path: Path) -> None:
        adaptation = trained("adalora[init_rank=6,target_rank=3]", tmp_path)
        for layer in adaptation.layers.values():
            E, Q, P = layer.lora_E[ADAPTER][:, 0], layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            scaling = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)
            kept = E.abs().argsort(descending=True)[:2]
            expected = sum(scaling * E[i] * torch.outer(P[:, i], Q[i]) for i in kept)
            with adaptation.at_rank(2):
                torch.testing.assert_close(layer.get_delta_weight(ADAPTER), expected, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("method", ["lora[rank=4]", "lora[rank=4,rslora=true]", "pruned_lora[rank=4,keep=0.4]"])
    def test_lora_is_cut_by_its_singular_values(self, method: str, tmp_path: Path) -> None:
        adaptation = trained(method, tmp_path)
        whole = {name: (B @ A).double() for name, (B, A) in adaptation.scaled_pairs().items()}
        with adaptation.at_rank(2):
            found = {name: (B @ A).double() for name, (B, A) in adaptation.scaled_pairs().items()}
        for name, update in whole.items():
            U, S, Vh = torch.linalg.svd(update, full_matrices=False)
            torch.testing.assert_close(found[name], (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("method", ["head", "full", "lora[init=pissa]", "peft[type=ia3]"])
    def test_methods_without_a_cut(self, method: str, tmp_path: Path) -> None:
        assert rank_curve(start(Subject(method, tmp_path)).adaptation, [1], lambda rank: 0.5) == {}


class TestRun:
    def run(self, method: str, folder: Path, ranks: tuple[int, ...]) -> tuple[RunRecord, RecordStore]:
        store = RecordStore(folder)
        store.make_ready()
        spec = spec_of(Subject(method, folder))
        place = spec.place.model_copy(update={"rank_curve": ranks, "save_adapter": True})
        return run_one(spec.model_copy(update={"place": place}), store), store

    @pytest.mark.parametrize("method", ["lora[rank=4]", "debora[rank=4,T_max=2,n0=0,step_size=0.5]"])
    def test_nothing_else_of_a_run_changes(self, method: str, tmp_path: Path) -> None:
        (plain, there), (curved, here) = (self.run(method, tmp_path / str(len(r)), r) for r in ((), (8, 1, 2)))
        assert list(curved.rank_curve) == [1, 2, 8]
        assert curved.rank_curve[8] == curved.score, "no layer has a higher rank"
        assert plain.rank_curve == {}
        assert plain.result() == curved.model_copy(update={"rank_curve": {}}).result()
        assert plain.run_id == curved.run_id
        assert here.read(curved.run_id) == curved
        for path in there.folder(plain.run_id).rglob("*.safetensors"):
            again = load_file(here.folder(curved.run_id) / path.relative_to(there.folder(plain.run_id)))
            kept = load_file(path)
            assert {*again} - {*kept} <= {f"validation/rank_{rank}" for rank in (1, 2, 8)}
            assert all(np.array_equal(again[name], value) for name, value in kept.items())

    def test_predictions_at_each_rank_give_its_score(self, tmp_path: Path) -> None:
        run, store = self.run("lora[rank=4]", tmp_path, (1, 4))
        metric, path = declared(run.headline), store.verified(run.run_id, PREDICTIONS)
        assert metric is not None
        assert run.score is not None
        for rank, score in run.rank_curve.items():
            found = example_scores(path, "validation", metric, score, 40, rank)
            assert found is not None
            assert found.mean() == pytest.approx(score)
        whole = example_scores(path, "validation", metric, run.score)
        assert whole is not None
        assert np.array_equal(found, whole), "rank 4 is the whole"
        with pytest.raises(FileNotFoundError):
            example_scores(path, "validation", metric, run.score, 40, 2)

    def test_a_score_that_is_not_finite_is_left_out(self, tmp_path: Path) -> None:
        scores = iter([float("nan"), 0.5])
        adaptation = start(Subject("lora[rank=4]", tmp_path)).adaptation
        assert rank_curve(adaptation, [2, 1], lambda rank: next(scores)) == {2: 0.5}

    def test_finished_runs_without_it_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        what = ["run", "--methods", "head", "--tasks", "synthetic", "--batches", "2", "--executor", "serial"]
        assert main([*what, "--results", str(tmp_path), "--rank-curve", "1,2"]) == 0
        assert main([*what, "--results", str(tmp_path), "--rank-curve", "1,2"]) == 0
        assert "no such rank curve" not in capsys.readouterr().out
        assert main([*what, "--results", str(tmp_path), "--rank-curve", "1,4"]) == 0
        assert "1 of the finished runs have kept no such rank curve; delete their folders" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("0", "--rank-curve.0 = 0 is not allowed: it should be greater than or equal to 1"),
            ("1,two", "--rank-curve.1 = 'two' is not allowed: it should be a valid integer"),
            ("1.5", "--rank-curve.0 = 1.5 is not allowed"),
            ("-4", "--rank-curve.0 = -4 is not allowed"),
            ("", "--rank-curve '' is not allowed: give ranks, such as 1,2,4,8"),
            ("4,2,4", "--rank-curve has 4 more than once: give each rank once"),
        ],
    )
    def test_bad_ranks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str) -> None:
        what = ["--methods", "lora", "--tasks", "synthetic", "--results", str(tmp_path / "results")]
        assert main(["run", *what, f"--rank-curve={value}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "results").exists()


class TestExport:
    """An adapter cut to a rank, as it is handed on."""

    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize(
        ("method", "larger"),
        [
            ("lora[rank=4,alpha=6]", 5),
            ('lora[rank=4,rank_pattern={"query"=2,"value"=0}]', 5),
            ("pruned_lora[rank=4,keep=0.8]", 5),
            ("adalora[init_rank=6,target_rank=4]", 20),
            ("debora[rank=4,T_max=2,n0=0,step_size=0.5]", 20),
            ("debora[rank=4,T_max=2,n0=0,step_size=0.5,geometry=oblique]", 5),
        ],
    )
    def test_stock_peft_loads_the_cut_adapter(self, method: str, larger: int, rank: int, tmp_path: Path) -> None:
        started = start(Subject(method, tmp_path))
        started.training.run(lambda training: None)
        batch = started.task.collate(started.training.encoded, range(16), None)
        adaptation, ranks = started.adaptation, started.adaptation.ranks()
        for name, parameter in adaptation.model.named_parameters():
            if parameter.requires_grad and not in_modules(name, adaptation.head):
                parameter.data *= larger  # so that the update is large beside the tolerance

        def logits(model: Any) -> Tensor:
            with torch.no_grad():
                found: Tensor = model.eval()(**batch.inputs).logits
            return found

        cut = adaptation.at_rank(rank)
        assert cut is not None
        with cut:
            adaptation.export(tmp_path / "cut")
            expected = logits(adaptation.model)
        assert (logits(adaptation.model) - expected).abs().max() > 1e-4, "the cut has to change something"
        loaded: Any = PeftModel.from_pretrained(started.before.module, str(tmp_path / "cut"))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
        stored = load_file(tmp_path / "cut" / "adapter_model.safetensors")
        left = {name: len(value) for name, value in stored.items() if name.endswith(".lora_A.weight")}
        assert sorted(left.values()) == sorted(min(own, rank) for own in ranks.values() if own), "zeros are not stored"

    def test_a_start_is_not_cut(self, tmp_path: Path) -> None:
        """B is 0 there, and A is not: every component can still be trained."""
        started = start(Subject("lora[rank=4]", tmp_path))
        started.adaptation.export(tmp_path / "start")
        stored = load_file(tmp_path / "start" / "adapter_model.safetensors")
        assert {len(value) for name, value in stored.items() if name.endswith(".lora_A.weight")} == {4}

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        results = ["--results", str(tmp_path / "results")]
        what = ["--methods", "lora[rank=4],head", "--tasks", "synthetic", "--batches", "8", "--executor", "serial"]
        assert main(["run", *what, *results, "--rank-curve", "1,3", "--save-adapter"]) == 0
        store = RecordStore(tmp_path / "results")
        lora, head = sorted(store.records(), key=lambda run: run.spec.method != "lora")
        assert "adapter_rank_3/adapter_config.json" in lora.files
        assert not any("rank" in name for name in head.files)
        for run in (lora, head):
            assert main(["export", run.run_id, "--to", str(tmp_path / run.spec.method), *results]) == 0
        assert main(["export", lora.run_id, "--to", str(tmp_path / "three"), "--rank", "3", *results]) == 0
        config = json.loads((tmp_path / "three" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 3
        card = (tmp_path / "three" / "README.md").read_text()
        assert "## Cut to rank 3" in card
        assert f"| accuracy | {lora.rank_curve[3]:.4f} |" in card
        assert "query` | 3 |" in card
        assert not (tmp_path / "lora" / "adapter_rank_3").exists(), "the whole adapter is handed on alone"
        capsys.readouterr()
        for run_id, rank, message in (
            (lora.run_id, "2", f"run '{lora.run_id}' kept no adapter at rank 2, but at 1, 3"),
            (lora.run_id, "0", "--rank = '0' is not allowed: give a whole number from 1 up"),
            (lora.run_id, "two", "--rank = 'two' is not allowed"),
            (head.run_id, "3", f"run '{head.run_id}' kept no adapter at any rank: 'head' as it was set has no cut"),
        ):
            assert main(["export", run_id, "--to", str(tmp_path / "x"), "--rank", rank, *results]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
        assert not (tmp_path / "x").exists()
