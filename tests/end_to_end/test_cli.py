"""The command line as a user meets it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from harness.cli import main
from harness.provenance import GROUPS
from harness.record.store import RecordStore


def sweep(tmp_path, *extra):
    where = ["--executor", "serial", "--results", str(tmp_path / "results")]
    return ["run", "--tasks", "synthetic", "--batches", "4", *where, *extra]


def test_run_makes_records_tables_and_pictures_and_says_where(tmp_path, capsys):
    assert main(sweep(tmp_path, "--methods", "head,lora[rank=2]", "--seeds", "2")) == 0
    output = capsys.readouterr().out
    assert "4 runs: 0 finished before, 4 to do" in output
    assert "lora[rank=2] · synthetic · seed 1" in output
    for name in ("leaderboard.md", "leaderboard.tex", "leaderboard.csv", "score_vs_parameters.png"):
        assert name in output
    results = tmp_path / "results"
    assert len(list((results / "runs").iterdir())) == 4
    assert "lora[rank=2]" in (results / "tables" / "leaderboard.md").read_text()
    assert (results / "pictures" / "score_vs_parameters.png").stat().st_size > 10_000


def test_a_second_time_nothing_runs_and_a_larger_sweep_runs_the_rest(tmp_path, capsys):
    main(sweep(tmp_path, "--methods", "head"))
    capsys.readouterr()
    assert main(sweep(tmp_path, "--methods", "head")) == 0
    assert "1 runs: 1 finished before, 0 to do" in capsys.readouterr().out
    assert main(sweep(tmp_path, "--methods", "head,lora[rank=2]")) == 0
    assert "2 runs: 1 finished before, 1 to do" in capsys.readouterr().out


def test_failed_runs_are_shown_counted_and_retried_on_request(tmp_path, capsys, monkeypatch):
    from methods.head import Head

    with monkeypatch.context() as broken:
        broken.setattr(Head, "start", lambda *arguments: 1 / 0)
        assert main(sweep(tmp_path, "--methods", "head,lora[rank=2]")) == 1
    output = capsys.readouterr().out
    assert "failed: ZeroDivisionError" in output
    assert "1 of 1 failed" in output
    main(sweep(tmp_path, "--methods", "head,lora[rank=2]"))
    assert "2 runs: 2 finished before, 0 to do" in capsys.readouterr().out
    assert main(sweep(tmp_path, "--methods", "head,lora[rank=2]", "--retry-failed")) == 0
    assert "2 runs: 1 finished before, 1 to do" in capsys.readouterr().out


def test_dry_run_counts_and_trains_nothing(tmp_path, capsys):
    assert (
        main(sweep(tmp_path, "--methods", "head,full,lora", "--grid", "lora.rank=2,4", "--seeds", "2", "--dry-run"))
        == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[2:] for line in lines if line and line[0].startswith(("head", "full", "lora"))}
    assert rows["head"][0] == "0"
    assert rows["lora[rank=2]"][0] == f"{2 * sum(shape for shape in SIDES):,}"
    assert rows["lora[rank=4]"][0] == f"{4 * sum(shape for shape in SIDES):,}"
    assert lines[-1][:2] == ["8", "runs"]
    assert not (tmp_path / "results").exists()


def test_dry_run_tells_the_time_from_finished_runs_or_else_from_a_timing(tmp_path, capsys, monkeypatch):
    main(sweep(tmp_path, "--methods", "head"))
    capsys.readouterr()
    timed = []
    with monkeypatch.context() as clock:
        clock.setattr("harness.plan.estimate.seconds_a_batch", lambda spec: timed.append(spec.method) or 30.0)
        assert main(sweep(tmp_path, "--methods", "full,lora", "--seeds", "3", "--tune", "5", "--dry-run")) == 0
    assert timed == ["full", "lora"]
    output = capsys.readouterr().out
    assert "training takes about 32.0 min in all, one run at a time" in output  # (6 + 10 runs) x 4 batches x 30 s
    assert main(sweep(tmp_path, "--methods", "head", "--seeds", "2", "--dry-run")) == 0
    assert "s a batch (finished runs: 1)" in capsys.readouterr().out
    assert main(sweep(tmp_path, "--methods", "full", "--dry-run")) == 0
    assert "s a batch (timed: 3 updates)" in capsys.readouterr().out
    monkeypatch.setattr("harness.plan.estimate.seconds_a_batch", lambda spec: 1 / 0)
    assert main(sweep(tmp_path, "--methods", "lora", "--dry-run")) == 0
    output = capsys.readouterr().out
    assert "time: lora on synthetic: unknown (not timed: division by zero)" in output
    assert "in all" not in output
    assert main(sweep(tmp_path, "--methods", "head", "--dry-run")) == 0
    assert "in all" not in capsys.readouterr().out
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 1


SIDES = 2 * [16 + 16] * 4 + 2 * [16 + 32] * 2  # rows and columns of the twelve linear layers of the task's BERT


def test_config_file_and_options_over_it(tmp_path, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'methods = ["head", "lora[rank=2]"]\ntasks = ["synthetic"]\nseeds = 3\n[grid]\n"lora.alpha" = [4, 8]\n'
        "[train]\nepochs = 1\nbatch_size = 8\n"
    )
    assert main(["validate", str(path)]) == 0
    assert "3 methods x 1 tasks x 3 seeds = 9 runs" in capsys.readouterr().out
    assert main(["run", "--config", str(path), "--seeds", "5,", "--batches", "3", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "3 runs (seeds 5)" in output
    assert {line.split()[-1] for line in output.splitlines() if line.startswith(("head", "lora"))} == {"3"}


def test_validate_a_record(tmp_path, capsys):
    main(sweep(tmp_path, "--methods", "head"))
    path = next((tmp_path / "results" / "runs").iterdir()) / "record.json"
    capsys.readouterr()
    assert main(["validate", str(path)]) == 0
    assert "head on synthetic, seed 0, done" in capsys.readouterr().out
    values = json.loads(path.read_text())
    values["spec"]["seed"] = 7
    path.write_text(json.dumps(values))
    assert main(["validate", str(path)]) == 2
    assert "run_id is" in capsys.readouterr().err


def test_report_again_from_the_records(tmp_path, capsys):
    main(sweep(tmp_path, "--methods", "head,lora[rank=2]"))
    table = tmp_path / "results" / "tables" / "leaderboard.md"
    before = table.read_text()
    table.unlink()
    assert main(["report", "--results", str(tmp_path / "results")]) == 0
    assert table.read_text() == before
    capsys.readouterr()
    assert main(["report", "--results", str(tmp_path / "results"), "--methods", "head"]) == 0
    assert "lora" not in capsys.readouterr().out
    assert main(["report", "--results", str(tmp_path / "results"), "--methods", "loar"]) == 2
    assert "unknown method among the records 'loar'. Did you mean 'lora'?" in capsys.readouterr().err


def test_help_and_list_import_nothing_heavy():
    program = (
        "import sys; from harness.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'peft', 'datasets', 'sklearn', 'rich', 'matplotlib'}\n"
        "heavy.add('ray')\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    for arguments in (["--help"], ["run", "--help"], ["list"], ["list", "debora"], ["list", "glue"], ["list", "smoke"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_list_teaches(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for name in ("debora", "lora", "glue", "cola", "quickstart", "smoke"):
        assert name in output
    headings = re.findall(r"^methods, (.+): (.+)\n((?:  .+\n)+)", output, re.MULTILINE)
    groups = {group: rows for group, _, rows in headings}
    assert [(group, words) for group, words, _ in headings] == [row for row in GROUPS.items() if row[0] in groups]
    told = {
        line.split()[0] for line in output.splitlines() if "Export: own format, which stock PEFT cannot load." in line
    }
    assert told >= {"hadapter", "bitfit", "full"}
    assert not told & {"lora", "debora", "peft"}
    assert re.search(r"^  pruned_lora .+ Provenance: ours: a control\.$", groups["controls"], re.MULTILINE)
    assert re.search(
        r"^  debora .+ Provenance: from the paper; no official code;", groups["ranks searched"], re.MULTILINE
    )
    assert main(["list", "lora"]) == 0
    output = capsys.readouterr().out
    assert "rank (PEFT's r): rank of every adapted layer, at most its smaller side (>= 1; default 8)" in output
    assert "init (PEFT's init_lora_weights): default, gaussian," in output
    assert "\nprovenance: PEFT's\ngroup: fixed rank\n" in output
    assert "scaled by alpha / rank, not by alpha / its own rank as in PEFT" in output
    assert "\nexport: " not in output
    assert main(["list", "hadapter"]) == 0
    assert "\nexport: own format, which stock PEFT cannot load\n" in capsys.readouterr().out


WRONG = [
    (["--methods", "lroa"], "unknown method 'lroa'. Did you mean 'lora'? Available: "),
    (["--tasks", "gleu/cola"], "unknown task 'gleu'. Did you mean 'glue'?"),
    (["--tasks", "glue/colaa"], "unknown task 'glue/colaa'. Did you mean 'glue/cola'?"),
    (["--preset", "smok"], "unknown preset 'smok'. Did you mean 'smoke'?"),
    (["--methods", "lora[rnak=4]"], "unknown parameter of lora 'rnak'. Did you mean 'rank'?"),
    (["--methods", "lora[rank=0]"], "lora.rank = 0 is not allowed: it should be greater than or equal to 1"),
    (["--methods", "lora[rank=17]"], "rank = 17 is above the smaller side of layer 'bert.encoder.layer.0"),
    (["--methods", "lora[rank=four]"], "lora.rank = 'four' is not allowed: it should be a valid integer"),
    (["--methods", "lora[rank=4"], "'lora[rank=4' has an unbalanced bracket"),
    (["--methods", "debora[tau=0]"], "debora.tau = 0 is not allowed: it should be greater than 0"),
    (["--methods", "debora[tau=-1.5]"], "debora.tau = -1.5 is not allowed"),
    (
        ["--methods", "debora[rank=4,components=49]"],
        "components = 49 is not allowed: rank 4 in 12 layers allows 1 to 48",
    ),
    (["--methods", "debora[warm_up=0.9]"], "warm_up = 0.9 should be below search_fraction"),
    (["--methods", "debora[rank=17]"], "rank = 17 is above the smaller side of layer"),
    (["--methods", 'lora[target_modules=["qurey"]]'], "unknown target module 'qurey'. Did you mean 'query'?"),
    (["--seeds", "three"], "--seeds 'three' is not allowed: give a count (3) or a list of whole numbers (0,1,2)"),
    (["--seeds", "0"], "--seeds '0' is not allowed: a count is 1 to 100,000"),
    (["--seeds", "-1"], "--seeds"),
    (["--grid", "lora.rank"], "--grid 'lora.rank' cannot be read; write method.parameter=value,value"),
    (["--grid", "lora.rnak=2"], "unknown parameter of lora 'rnak'. Did you mean 'rank'?"),
    (["--batches", "0"], "--batches = 0 is not allowed: it should be greater than or equal to 1"),
    (["--precision", "fp8"], "--precision = 'fp8' is not allowed: it should be 'fp32' or 'bf16'"),
    (["--batches", "4", "--epochs", "1"], "batches = 4 and epochs = 1.0 are both set"),
    (["--evaluation-limit", "1"], "--evaluation-limit = 1 is not allowed: it should be greater than or equal to 2"),
    (["--limit", "1"], "--limit = 1 is not allowed: it should be greater than or equal to 2"),
    (["--model", "somewhere"], "--model 'somewhere' has no use here: synthetic brings its own model"),
    (["--device", "cuda:9"], "--device 'cuda:9' is not on this machine; available: auto, cpu"),
    (["--batchs", "4"], "unknown option '--batchs'. Did you mean '--batches'?"),
    (["--config", "nowhere.toml"], "sweep file 'nowhere.toml' cannot be read"),
    (["--tasks", "synthetic/"], "unknown task 'synthetic/'"),
    (["--methods", "lora[rank=true]"], "lora.rank = True is not allowed"),
    (["--methods", "lora[target_modules=query]"], 'it should be a list, such as ["query", "value"]'),
    (["--seeds", "1000000"], "--seeds '1000000' is not allowed: a count is 1 to 100,000"),
    (["--seeds", "1,1"], "each 0 or above and only once"),
    (["--device", "meta"], "--device 'meta' is not on this machine"),
    (["--checkpoint-every", "-1"], "--checkpoint-every = -1 is not allowed"),
    (["--methods", "debora,lora[ranks_of=deborra]"], "sweep in lora.ranks_of 'deborra'. Did you mean 'debora'?"),
    (["--methods", "head,lora[ranks_of=head]"], "lora[ranks_of=head]: what it waits for has no ranks: name a method"),
    (["--methods", "lora[ranks_of=lora]"], "lora[ranks_of=lora] would wait for itself, in a circle"),
    (["--tasks", "synthetic[member=x]"], "parameter 'member' of synthetic is set by the task's name"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"--methods": "lora", "--tasks": "synthetic"}
    arguments = ["run", *(part for pair in given.items() if pair[0] not in options for part in pair), *options]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('methods = ["lora"\ntasks = 3\n', "line 2"),
        ('methods = ["lora"]\ntaks = ["digits"]\n', "line 2: unknown parameter of sweep 'taks'. Did you mean 'tasks'?"),
        ('methods = ["lora"]\ntasks = ["digits"]\n[train]\nbatchs = 3\n', "line 4"),
        ('methods = ["lora"]\n\ntasks = ["digist"]\n', "line 3: unknown task 'digist'. Did you mean 'digits'?"),
        ('methods = ["lora[rank=0]"]\ntasks = ["digits"]\n', "line 1"),
        ('methods = ["lora"]\ntasks = ["digits"]\nseeds = "many"\n', "line 3"),
        ('methods = ["lora"]\ntasks = ["digits"]\nseeds = 0\n', "line 3"),
        ('methods = ["lora"]\ntasks = ["digits"]\nseeds = true\n', "line 3"),
        ('# the rank matters\nmethods = ["lora[rank=0]"]\ntasks = ["digits"]\n', "line 2"),
        ('methods = ["lora"]\ntasks = ["digits"]\n[train]\nepochs = 1\nbatches = 4\n', "line 5"),
        ('tasks = ["digits"]\nmethods = ["lora[r=0]"]\n', "line 2: lora.r = 0"),
        (
            'methods = ["lora"]\ntasks = ["digits"]\n[grid]\n"lora.rank" = [4]\n"lora.r" = [2]\n',
            "line 5: rank and r of",
        ),
    ],
)
def test_mistakes_in_a_file_are_told_with_their_line(tmp_path, capsys, text, message):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    for arguments in (["validate", str(path)], ["run", "--config", str(path)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert message in error
        assert error.count("\n") == 1


def test_a_wrong_option_beside_a_right_file_is_not_blamed_on_the_file(tmp_path, capsys):
    path = tmp_path / "sweep.toml"
    path.write_text('methods = ["lora"]\ntasks = ["synthetic"]\n')
    for options in (["--methods", "foo"], ["--device", "meta"], ["--threads", "0"]):
        assert main(["run", "--config", str(path), *options]) == 2
        assert str(path) not in capsys.readouterr().err


def test_an_unknown_command_and_a_folder_to_validate(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["rnu"])
    assert "unknown command 'rnu'. Did you mean 'run'?" in capsys.readouterr().err
    assert main(["validate", str(tmp_path)]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_a_grid_given_twice_has_all_values(tmp_path, capsys):
    options = ["--methods", "lora", "--grid", "lora.rank=2", "--grid", "lora.rank=4", "--dry-run"]
    assert main(sweep(tmp_path, *options)) == 0
    output = capsys.readouterr().out
    assert "lora[rank=2]" in output
    assert "lora[rank=4]" in output


def test_adapters_that_were_not_kept_are_told(tmp_path, capsys):
    main(sweep(tmp_path, "--methods", "head"))
    capsys.readouterr()
    main(sweep(tmp_path, "--methods", "head", "--save-adapter"))
    assert "1 of the finished runs have kept no adapter" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    main(sweep(tmp_path, "--methods", "head"))
    shutil.rmtree(tmp_path / "results" / "tables")
    (tmp_path / "results" / "tables").write_text("a file")
    capsys.readouterr()
    assert main(["report", "--results", str(tmp_path / "results")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_missing_methods_or_tasks_say_what_to_give(capsys):
    assert main(["run", "--tasks", "digits"]) == 2
    assert "no methods: give --methods" in capsys.readouterr().err
    assert main(["run", "--methods", "lora"]) == 2
    assert "no tasks: give --tasks" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from methods.lora import Lora

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lora, "start", interrupt)
    assert main(sweep(tmp_path, "--methods", "head,lora[rank=2]")) == 130
    assert "give the same command again" in capsys.readouterr().err
    assert len(list(RecordStore(tmp_path / "results").records())) == 1


def test_results_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "results").write_text("a file")
    assert main(sweep(tmp_path, "--methods", "head")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_data_root_comes_from_the_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HARNESS_DATA_ROOT", str(tmp_path / "nowhere"))
    assert main(["run", "--methods", "head", "--tasks", "glue/cola"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_dry_run_passes_on_what_a_method_says_of_the_run(tmp_path, capsys):
    assert main(sweep(tmp_path, "--methods", "debora[rank=4,T_max=2]", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "debora[rank=4,T_max=2] on synthetic: at most " in said
    assert "the one simplex of 12 layers" in said
