"""`xdl export`: a folder that loads where only torch and transformers are, and says what it is."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from export_support import clean_environment, config, finished_run, run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.cli import main as xdl
from xlstm_distill.__main__ import main
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.contract.schema import Data, Teacher
from xlstm_distill.export import CODE, check_destination, choose_student, code_files, export, without_machine
from xlstm_distill.model import HybridForCausalLM

TOKENS = torch.tensor([[5, 9, 200, 41, 17, 33, 8, 120, 77, 64, 90, 13, 250, 3, 6, 19, 54, 71]])


@pytest.fixture
def made(tmp_path):
    run, student = finished_run(tmp_path)
    return run, student


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def evaluate(run, scores=True):
    """What `eval` leaves behind, for the merged student and its teacher."""
    folder = JobFolder.read(run / "jobs/merge")
    names = ("fetch", "merge")
    job = JobFolder(run / "jobs/eval", folder.job.__class__("eval", "eval", {}, names), folder.config)
    job.output.mkdir(parents=True)
    job.write()
    for name, score, kl in (("teacher", 0.8, 0.0), ("merged", 0.6, 0.25)):
        (job.output / name).mkdir()
        tasks = {"recall": {"score": score, "stderr": 0.1, "higher_is_better": True, "items": 20}} if scores else {}
        heldout = {"prose": {"tokens": 2048, "perplexity": 5.5, "kl": kl, "agreement": 0.9}}
        job.finish({"scores": tasks, "heldout": heldout}, name)


def test_the_folder_holds_the_students_own_files_and_the_code_that_loading_needs(made, tmp_path):
    run, _ = made
    target = tmp_path / "out"
    export(run, target)
    source = run / "jobs/merge/output/student"
    weights = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(weights) > 1
    for name in [*weights, "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"]:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    settings = json.loads((target / "config.json").read_text())
    assert settings["auto_map"] == {
        "AutoConfig": "configuration.HybridConfig",
        "AutoModelForCausalLM": "modeling.HybridForCausalLM",
    }
    for where in settings["auto_map"].values():
        file, name = where.split(".")
        assert f"class {name}(" in (target / f"{file}.py").read_text()
    for file in target.glob("*.py"):
        first, rest = file.read_text().split("\n", 1)
        assert first == "# SPDX-License-Identifier: Apache-2.0"
        assert rest == (CODE / file.name).read_text()
    assert "Apache License" in (target / "LICENSE-CODE").read_text()
    assert (target / "generation_config.json").is_file()


def test_the_code_is_closed_under_imports_and_asks_only_for_torch_and_transformers():
    names = {file.stem for file in code_files()}
    allowed = {"torch", "transformers"} | set(sys.stdlib_module_names)
    for file in code_files():
        tree = ast.parse(file.read_text())
        optional = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                # transformers finds relative imports by a pattern, on one line and of a module, wherever they stand
                assert node.level == 1, file.name
                assert node.module in names, file.name
            elif isinstance(node, ast.ImportFrom | ast.Import) and id(node) not in optional:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {module.split(".")[0] for module in modules} <= allowed, file.name
    assert {"configuration", "modeling", "mlstm", "triton_mlstm"} <= names
    assert "__init__" not in names


def test_every_file_is_listed_with_size_and_hash(made, tmp_path):
    run, _ = made
    export(run, tmp_path / "out")
    record = json.loads((tmp_path / "out/export.json").read_text())
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"export.json"}
    assert set(record["files"]) == files
    for name, known in record["files"].items():
        assert known == {"bytes": (tmp_path / "out" / name).stat().st_size, "xxh64": hash_file(tmp_path / "out" / name)}
    assert list(record["manifests"]) == ["fetch", "tokenize", "align", "distill-math", "distill-code", "merge"]
    assert record["teacher"]["revision"] == "abc123"


def test_nothing_of_the_machine_is_in_it(made, tmp_path):
    run, _ = made
    path = run / "jobs/merge/output/student/tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"name_or_path": str(run), "tokenizer_file": "/opt/x"}
    path.write_text(json.dumps(settings))
    JobFolder.read(run / "jobs/merge").finish({})
    export(run, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        if file.suffix != ".safetensors":
            text = file.read_text()
            assert str(tmp_path) not in text, file.name
            assert "/home/" not in text, file.name
            assert "/opt/x" not in text, file.name
    assert without_machine({"a": [{"_name_or_path": "/x", "b": 1}]}) == {"a": [{"b": 1}]}


def test_the_card_says_what_the_manifests_say(made, tmp_path):
    run, student = made
    export(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    head = front_matter(card)
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "people/tiny"
    assert head["datasets"] == ["people/maths"]
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert "xlstm" in head["tags"]
    assert "This student was not evaluated." in card
    assert "| align (Stage I) | 4,096 | 0 | alignment error 0.250 of untrained |" in card
    assert "| distil code (Stage II) | 2,048 | 11 |" in card
    assert "0.5 (math), 0.5 (code)" in card
    assert "[people/maths](https://huggingface.co/datasets/people/maths) (easy, train) | 12,345 |" in card
    assert "local text files" in card
    assert "| revision | abc123 |" in card
    assert "| weights xxh64 | 0123 |" in card
    assert f"{sum(p.numel() for p in student.parameters()) / 1e6:,.1f} M parameters, stored as F32" in card
    assert f"{student.config.state_bytes() / 1e6:,.2f} MB" in card
    assert "H_kv" in card
    assert "| `window` | 8 |" in card
    assert "trust_remote_code=True" in card


def test_the_card_gives_scores_with_recovery_once_evaluated(made, tmp_path):
    run, _ = made
    evaluate(run)
    export(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| recall | 0.600 ± 0.100 | 0.800 ± 0.100 | 0.750 | 20 |" in card
    assert "Mean recovery 0.750" in card
    assert "C_0 = 0.000" in card
    assert "α* = 0.250" in card
    assert "| prose | 0.250 | – | – | 0.900 | 5.50 | 5.50 | 2,048 |" in card
    export(run, tmp_path / "expert", "math")
    assert "This student was not evaluated." in (tmp_path / "expert/README.md").read_text()


def test_scores_of_an_earlier_student_are_not_given(made, tmp_path):
    run, _ = made
    evaluate(run)
    file = run / "jobs/merge/output/student/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_length": 77}))
    JobFolder.read(run / "jobs/merge").finish({})
    export(run, tmp_path / "out")
    assert "This student was not evaluated." in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("", {"license": "other", "license_name": "see-the-teacher"}),
        ("Llama 3.1 Community License", {"license": "llama3.1"}),
        ("My Own v2", {"license": "other", "license_name": "my-own-v2"}),
    ],
)
def test_the_licence_of_the_weights_is_the_teachers(tmp_path, monkeypatch, licence, expected):
    monkeypatch.setattr("export_support.TEACHER_FACTS", {"license": licence})
    secret = "/home/somebody/teacher"
    settings = config(teacher=Teacher("tiny", "llama", "folder", secret, license=licence))
    run, _ = finished_run(tmp_path, until="align", settings=settings)
    export(run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert {key: value for key, value in front_matter(card).items() if key.startswith("license")} == expected
    assert (licence or "see its licence") in card
    assert "base_model" not in front_matter(card)
    assert secret not in card
    assert "a local folder" in card


def test_given_shards_and_a_given_student_are_named_without_their_paths(tmp_path):
    run, _ = finished_run(tmp_path, settings=config(data=Data(shards="/home/somebody/shards")))
    shutil.rmtree(run / "jobs/align")
    export(run, tmp_path / "out", "math")
    card = (tmp_path / "out/README.md").read_text()
    assert "/home" not in card
    assert "Token shards that were made elsewhere." in card
    assert "The student from which it was distilled was made elsewhere." in card


def test_the_default_is_the_merged_student_else_the_newest(tmp_path):
    run, _ = finished_run(tmp_path, until="distill-math")
    settings = config()
    assert choose_student(run, settings, "aligned").place.job == "align"
    path = run / "jobs/align/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": "2001-01-01T00:00:00+00:00"}))
    assert choose_student(run, settings).place.name == "math"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": "2101-01-01T00:00:00+00:00"}))
    assert choose_student(run, settings).place.name == "aligned"


def test_mistakes_are_one_line_and_leave_nothing(made, tmp_path, capsys):
    run, _ = made
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    shutil.rmtree(run / "jobs/distill-code")
    cases = [
        (
            [run, tmp_path / "out", "--model=nobody"],
            "--model nobody: is no student that this run makes; finished: ",
        ),
        ([run, tmp_path / "out", "--model=teacher"], "--model teacher: is no student"),
        ([run, tmp_path / "out", "--model=code"], "--model code: is not finished; finished: aligned, math, merged"),
        ([run, tmp_path / "full"], "is not empty"),
        ([run, tmp_path / "file"], "is a file"),
        ([run, tmp_path / "file/below"], "cannot be written"),
        ([run, run / "out"], "lies inside the run"),
        ([run, run / "jobs/../../run/out"], "lies inside the run"),
        ([tmp_path, tmp_path / "out"], "not a run folder"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, said in cases:
        assert main(["export", *map(str, arguments)]) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_run_has_nothing_to_export(tmp_path):
    run, _ = finished_run(tmp_path, until="tokenize")
    with pytest.raises(Mistake, match="no finished student yet"):
        export(run, tmp_path / "out")


def test_a_damaged_or_foreign_student_is_refused(made, tmp_path):
    run, _ = made
    weights = sorted((run / "jobs/merge/output/student").glob("*.safetensors"))[0]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Mistake, match=re.escape(f"{weights} has xxh64")):
        export(run, tmp_path / "out")
    weights.unlink()
    with pytest.raises(Mistake, match=r"is missing; remove .* of merge"):
        export(run, tmp_path / "out")
    settings = run / "jobs/align/output/student/config.json"
    settings.write_text('{"model_type": "llama"}')
    JobFolder.read(run / "jobs/align").finish({})
    with pytest.raises(Mistake, match="is a llama, not a hybrid xLSTM"):
        export(run, tmp_path / "out", "aligned")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_empty_folder_may_be_the_destination(made, tmp_path):
    run, _ = made
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert check_destination(run, tmp_path / "link") == tmp_path / "out"
    export(run, tmp_path / "link")
    assert (tmp_path / "out/config.json").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_the_registered_class_loads_it(made, tmp_path, trust):
    run, student = made
    export(run, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
    assert type(loaded) is HybridForCausalLM
    assert torch.equal(loaded(TOKENS).logits, student(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_the_command_takes_a_runs_name(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("launcher.launch.run_module", lambda command, arguments: print(command, *arguments) or 7)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/graph.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert xdl(["export", "mine", "out", "--model", "math"]) == 7
    assert capfd.readouterr().out == f"export --model=math -- {tmp_path}/runs/mine out\n"
    assert xdl(["export", "other", "out"]) == 2
    assert "no such run" in capfd.readouterr().err
    assert xdl(["export", "mine"]) == 2


LOAD = """
import importlib.util, sys
for name in ("xlstm_distill", "launcher", "xxhash", "triton"):
    assert importlib.util.find_spec(name) is None, name
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
tokens, *folders = sys.argv[1:]
ids = load_file(tokens)["ids"]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith("<user> hi"), text
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).window == 8
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("loaded without trust")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    out = {"logits": model(ids).logits, "again": again(ids).logits, "written": written}
    save_file({k: v.detach().contiguous() for k, v in out.items()}, folder + ".safetensors")
"""


@pytest.mark.slow
def test_a_process_with_only_torch_and_transformers_gives_the_same_logits_and_text(tmp_path):
    python = clean_environment(tmp_path / "clean")
    save_file({"ids": TOKENS}, tmp_path / "tokens.safetensors")
    cases = {
        "tiny-llama 1.0": {"tied": True},
        "qwen3": {"family": "qwen3", "feature_map": "hedgehog"},
        "olmo3": {"family": "olmo3", "gate_input": "hidden", "feature_rope": "after"},
    }
    students = {}
    for name, choices in cases.items():
        run, students[name] = finished_run(tmp_path / "runs" / name, until="align", **choices)
        export(run, tmp_path / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_python(python, LOAD, tmp_path, tmp_path / "tokens.safetensors", *(tmp_path / name for name in cases))
    for name, student in students.items():
        found = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(found["logits"], student(TOKENS).logits), name
        assert torch.equal(found["again"], found["logits"]), name
        mask = torch.ones_like(TOKENS)
        written = student.generate(TOKENS, attention_mask=mask, max_new_tokens=20, do_sample=False)
        assert torch.equal(found["written"], written), name
    torch.set_num_threads(threads)
    # What was saved there is whole by itself, and this package reads it.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3-again")
    assert type(loaded) is HybridForCausalLM


BOTH = """
import sys
from transformers import AutoModelForCausalLM
remote = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(remote).__module__.startswith("transformers_modules."), type(remote)
import xlstm_distill.model
own = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(own) is xlstm_distill.model.HybridForCausalLM, type(own)
"""


@pytest.mark.slow
def test_remote_code_and_the_package_live_in_one_process(made, tmp_path):
    run, _ = made
    export(run, tmp_path / "out")
    root = Path(__file__).parents[2]
    run_python(sys.executable, f"import sys; sys.path.insert(0, {str(root)!r})" + BOTH, tmp_path, tmp_path / "out")


def test_the_card_names_the_windows_of_layers_that_have_their_own():
    from transformers import LlamaConfig

    from xlstm_distill.evaluate.kinds import kind_of
    from xlstm_distill.model import HybridConfig

    base = LlamaConfig(num_hidden_layers=3)
    own, same = (kind_of(HybridConfig(base, window=8, layer_windows=windows)) for windows in ([8, 64, 8], None))
    assert "a sliding window of 8 tokens (64 in layer 1) and 4 attention sinks" in own.made
    assert own.reach.startswith("Beyond the last 64 tokens and the first 4,")
    assert "a sliding window of 8 tokens and 4 attention sinks" in same.made
    assert same.reach.startswith("Beyond the last 8 tokens")
