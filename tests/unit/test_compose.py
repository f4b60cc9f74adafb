"""`configs/` and `key=value` become a checked configuration that knows where each value came from."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.checks import misplaced, problems, seconds
from launcher.compose import compose, config_folders, options, parse
from launcher.keys import hint_of, known_keys, leaf_keys
from launcher.show import config_text
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Config, Placement, build

TEACHERS = [
    "smollm2-135m",
    "smollm2-135m-hub",
    "llama-3.1-8b",
    "llama-3.1-8b-instruct",
    "llama-3.1-70b-instruct",
    "qwen2.5-1.5b",
    "qwen2.5-7b-instruct",
    "olmo-3-7b",
]


def test_there_are_at_most_150_keys_and_their_number_is_pinned() -> None:
    assert len(leaf_keys()) == 144
    assert "align.lr" in leaf_keys()
    assert "SOURCE.answer" in leaf_keys()
    assert "PLACEMENT.segments" in leaf_keys()


def test_every_shipped_teacher_composes_with_the_recipe_that_its_file_names() -> None:
    assert options("teacher", config_folders()) == sorted(TEACHERS)
    for teacher in TEACHERS:
        resolved = compose([f"teacher={teacher}"])
        named = yaml.safe_load((config_folders()[-1] / f"teacher/{teacher}.yaml").read_text())["recipe"]
        assert resolved.choices["recipe"] == named
        assert resolved.config.teacher.name == teacher
        assert resolved.config.experts
        assert not list(misplaced(resolved.config))


def test_a_recipe_on_the_command_line_wins_over_the_teachers() -> None:
    resolved = compose(["teacher=smollm2-135m-hub", "recipe=llama"])
    assert resolved.choices["recipe"] == "llama"
    assert resolved.config.student.window == 512
    assert compose(["teacher.recipe=llama"]).config.student.window == 512


@pytest.mark.parametrize(
    ("teacher", "expert", "weights", "merge"),
    [
        ("llama-3.1-8b-instruct", "math", [0.5, 0.25, 0.25], 0.35),
        ("llama-3.1-8b-instruct", "code", [0.64, 0.21, 0.01, 0.11, 0.03], 0.35),
        ("llama-3.1-8b-instruct", "stem", [1.0], 0.2),
        ("llama-3.1-8b-instruct", "chat", [0.9, 0.1], 0.1),
        ("qwen2.5-7b-instruct", "math", [0.76, 0.2, 0.04], 0.2),
        ("qwen2.5-7b-instruct", "code", [0.6, 0.2, 0.012, 0.12, 0.068], 0.4),
        ("qwen2.5-7b-instruct", "stem", [0.906, 0.034, 0.06], 0.15),
        ("qwen2.5-7b-instruct", "chat", [0.88, 0.08, 0.04], 0.25),
    ],
)
def test_the_experts_have_the_papers_mixtures_and_merge_weights(
    teacher: str, expert: str, weights: list[float], merge: float
) -> None:
    found = compose([f"teacher={teacher}"]).config.expert[expert]
    assert [source.weight for source in found.sources.values()] == weights
    assert found.merge_weight == merge


def test_the_papers_numbers_stand_in_the_recipes() -> None:
    qwen = compose(["teacher=qwen2.5-7b-instruct"]).config
    assert (qwen.distill.lr, qwen.cache.top_k, qwen.align.tokens) == (7e-7, 256, 655_360_000)
    olmo = compose(["teacher=olmo-3-7b"]).config
    assert (olmo.distill.tokens, olmo.student.window, olmo.data.sequence) == (20_000_000_000, 512, 4096)
    assert olmo.data.sources["dolma3"].path == "allenai/dolma3_dolmino_mix-100B-1025"


def test_each_value_knows_the_file_it_came_from() -> None:
    origins = compose(["align.lr=3e-3", "experts=[math]"], {"name": "x"}).origins
    assert origins["teacher.vocab_size"] == "configs/teacher/smollm2-135m.yaml"
    assert origins["student.window"] == "configs/recipe/demo.yaml"
    assert origins["data.sources.demo_math.kind"] == "configs/data/demo.yaml"
    assert origins["expert.code.merge_weight"] == "configs/expert/demo/code.yaml"
    assert origins["align.lr"] == origins["experts"] == origins["name"] == "command line"
    assert origins["adamw.beta1"] == "default"
    part = compose(["data={validation: 0.2, sources: {demo_math: {weight: 1, kind: demo, path: math}}}"])
    assert part.origins["data.validation"] == part.origins["data.sources.demo_math.kind"] == "command line"
    assert part.origins["data.sequence"] == "configs/recipe/demo.yaml"
    assert part.config.data.sequence == 512
    assert not [key for key in part.origins if "demo_code" in key and key.startswith("data.")]


def test_the_printed_configuration_is_yaml_that_gives_the_same_configuration_back() -> None:
    resolved = compose(["teacher=qwen2.5-7b-instruct", "align.lr=3e-3", "name=007"])
    text = config_text(resolved)
    assert build(Config, yaml.safe_load(text)) == resolved.config
    assert "  lr: 0.003" in text
    assert "# command line" in text
    assert all("  # " in line for line in text.splitlines() if not line.rstrip().endswith(":"))


def test_values_take_the_type_of_the_schema() -> None:
    config = compose(["name=007", "teacher.revision=1e3", "align.tokens=1e6", "align.clip=0"]).config
    assert config.name == "007"
    assert config.teacher.revision == "1e3"
    assert config.align.tokens == 1_000_000
    assert config.align.clip == 0.0


@pytest.mark.parametrize(
    "text", ["experts=math,code", "experts=[math,code]", "experts=[math, code]", "experts='math,code'"]
)
def test_experts_are_plain_words_however_they_are_written(text: str) -> None:
    assert compose([text]).config.experts == ("math", "code")


def test_a_group_that_the_user_names_wins_over_the_recipes_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/wide.yaml").write_text("window: 256\n")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/site.yaml").write_text(
        "kind: slurm\nsbatch: {account: me}\nstages:\n  align: {gpus_per_node: 4}\n"
    )
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path))
    resolved = compose(["teacher=llama-3.1-8b", "student=wide", "cluster=site"])
    assert resolved.config.student.window == 256
    assert resolved.config.cluster.stages["align"].gpus_per_node == 4
    assert resolved.config.cluster.stages["distill"].gpus_per_node == 8
    assert resolved.origins["student.window"] == str(tmp_path / "student/wide.yaml")


@pytest.mark.parametrize("written", ["12:00:00", "1:30:00", "00:20:00", "1-00:00:00", "90", "'12:00:00'"])
def test_a_time_in_a_file_is_the_time_that_is_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """YAML 1.1 takes an unquoted 12:00:00 for 43200."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/site.yaml").write_text(f"kind: slurm\nstages: {{distill: {{time: {written}}}}}\n")
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path))
    assert compose(["cluster=site"]).config.cluster.stages["distill"].time == written.strip("'")


def test_the_users_folder_is_searched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/demo.yaml").write_text("samples: 3\n")
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path))
    resolved = compose([])
    assert resolved.config.eval.samples == 3
    assert resolved.origins["eval.samples"] == str(tmp_path / "eval/demo.yaml")


def test_a_missing_folder_of_the_user_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDL_CONFIG_DIR", "/nowhere/at/all")
    with pytest.raises(Mistake, match="XDL_CONFIG_DIR=/nowhere/at/all"):
        compose([])


def test_a_broken_file_of_the_user_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/mine.yaml").write_text("samples: [1\n  - {")
    monkeypatch.setenv("XDL_CONFIG_DIR", str(tmp_path))
    with pytest.raises(Mistake) as caught:
        compose(["eval=mine"])
    assert "\n" not in str(caught.value)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["data.shards=shards", "student.init_from=a/b", "stage=distill"]).config
    assert config.data.shards == str(tmp_path / "shards")
    assert config.student.init_from == str(tmp_path / "a/b")
    own = ["data.sources={own: {kind: jsonl, path: x/*.jsonl, weight: 1}}", "~data.sources.demo_math"]
    own.append("~data.sources.demo_code")
    assert compose(own[1:] + own[:1]).config.data.sources["own"].path == str(tmp_path / "x/*.jsonl")


BAD = [
    (["algin.lr=1"], "algin.lr", "align.lr"),
    (["student.widow=3"], "student.widow", "student.window"),
    (["cluster.stages.align.node=3"], "cluster.stages.align.node", "nodes"),
    (["cluster.stages.aling.nodes=3"], "aling", "align"),
    (["data.sources.demo_math.weigth=1"], "weigth", "weight"),
    (["hydra.run.dir=x"], "hydra.run.dir", "no such key"),
    (["align.lr=abc"], "align.lr=abc", "a number"),
    (["align.batch=2.5"], "align.batch=2.5", "whole number"),
    (["strategy.activation_checkpointing=1"], "activation_checkpointing", "true or false"),
    (["student=3"], "student=3", "hybrid"),
    (["teacher=lama-3.1-8b"], "teacher=lama-3.1-8b", "llama-3.1-8b"),
    (["recipe=demos"], "recipe=demos", "demo"),
    (["stage=align,distill"], "stage=align,distill", "pipeline"),
    (["stage=aligned"], "stage=aligned", "align"),
    (["experts=math,cod"], "experts=cod", "code"),
    (["experts=[math,math]"], "experts", "twice"),
    (["experts="], "experts", "at least one"),
    (["cache.top_k=99999"], "cache.top_k=99999", "49152"),
    (["cache.top_k=0"], "cache.top_k=0", "1 or more"),
    (["data.sequence=500", "student.chunk=64"], "data.sequence=500", "multiple of student.chunk=64"),
    (
        ["+eval.texts.q={kind: jsonl, path: /q, parts: 4}"],
        "eval.texts.q.parts=4",
        "they are read by every piece, whole; expected 1",
    ),
    (["data.sequence=16384"], "data.sequence=16384", "8192"),
    (["data.sources.demo_math.weight=0.6"], "data.sources", "sum to 1"),
    (["expert.math.sources.demo_math.weight=.5"], "expert.math.sources", "sum to 1"),
    (["data.sources.demo_math.weight=nan"], "data.sources", "sum to 1"),
    (["data.validation=1"], "data.validation=1.0", "between 0 and 1"),
    (["data.validation=0"], "data.validation=0.0", "between 0 and 1"),
    (["align.micro_batch=0"], "align.micro_batch=0", "1 or more"),
    (["align.lr=0"], "align.lr=0.0", "more than 0"),
    (["align.lr=nan"], "align.lr=nan", "more than 0"),
    (["align.min_lr=1"], "align.min_lr=1.0", "0 to"),
    (["align.warmup=1"], "align.warmup=1.0", "1 excluded"),
    (["align.tokens=0"], "align.tokens=0", "1 or more"),
    (["align.tokens=511"], "align.tokens=511", "512 or more"),
    (["seed=-1"], "seed=-1", "0 or more"),
    (["eval.tasks=[local_clooze_demo_math]"], "eval.tasks=local_clooze_demo_math", "local_cloze_demo_math"),
    (["distill.gamma=-1"], "distill.gamma=-1.0", "0 or more"),
    (["distill.gamma=0", "distill.beta=0"], "distill.gamma=0.0", "not both 0"),
    (["distill.loss=full"], "distill.loss=full", "distill.targets=online"),
    (["distill.loss=random", "distill.targets=online"], "distill.loss=random", "distill.loss=full"),
    (
        ["cache.sampler=random", "distill.loss=random", "distill.divergence=jsd"],
        "distill.divergence=jsd",
        "use forward",
    ),
    (["distill.temperature=0"], "distill.temperature=0.0", "more than 0"),
    (["distill.temperature=2"], "distill.temperature=2.0", "distill.loss=topk, or distill.targets=online"),
    (
        ["cache.sampler=random", "distill.temperature=2", "distill.loss=random"],
        "distill.temperature=2.0",
        "distill.temperature=1",
    ),
    (["student.window=0"], "student.window=0", "1 or more"),
    (["student.sinks=-1"], "student.sinks=-1", "0 or more"),
    (["expert.math.sources.demo_math.path=code"], "demo_math.path", "two names"),
    (["data.sources.demo_math.path=poems"], "demo_math.path", "math, code, prose"),
    (["data.sources.new.weight=0"], "data.sources.new.path", "empty"),
    (["teacher=olmo-3-7b", "data.sources.dolma3.format=chat"], "format=chat", "no chat template"),
    (["name=-x"], "name='-x'", "leading dash"),
    (["name=a/b"], "name='a/b'", "no slash"),
    (["name=.hidden"], "name='.hidden'", "dot"),
    (["name=" + "x" * 300], "name=", "at most 100"),
    (["strategy=single", "cluster.stages.align.gpus_per_node=2"], "strategy.name=single", "2 ranks"),
    (["cluster.stages.merge.nodes=2"], "cluster.stages.merge", "one rank"),
    (["cluster.stages.align.time=soon"], "time=soon", "notation"),
    (["cluster.sbatch.Account=x"], "cluster.sbatch.Account", "long name"),
    (["cluster.sbatch.nodes=2"], "cluster.sbatch.nodes", "cluster.stages"),
    (["cluster.sbatch.dependency=1"], "cluster.sbatch.dependency", "made by xdl"),
    (["cluster.sbatch.account='a\nb'"], "cluster.sbatch.account", "not fit for sbatch"),
    (["cluster.container=apptainer"], "cluster.image", "names an image"),
    (["cluster.image=x.sif"], "cluster.image", "set pyxis or apptainer"),
    (["cluster.scratch=here"], "cluster.scratch", "absolute"),
    (["eval.models=[teacher,marged]"], "eval.models=marged", "merged"),
    (["stage=cache", "distill.targets=online"], "stage=cache", "distill.targets=cached"),
    (["stage=tokenize", "data.shards=x"], "stage=tokenize", "data.shards"),
    (["seed=1,2"], "seed=1,2", "[a,b]"),
    (["align.lr=["], "align.lr=[", "quote"),
    (["name=a\nb"], "a\\nb", ""),
    (["foo"], "foo", "key=value"),
    (["--nodes"], "--nodes", "key=value"),
    (["~nothing.here"], "nothing.here", "nothing to delete"),
    (["name=${oops}"], "oops", ""),
    (["student.window=null"], "student.window=None", "whole number"),
    (["student.window={a: 1}"], "student.window", "whole number"),
    (["experts.math=1"], "experts.math", "no such key"),
]


@pytest.mark.parametrize(("overrides", "named", "hint"), BAD, ids=[" ".join(case[0])[:40] for case in BAD])
def test_a_mistake_is_one_line_with_the_key_the_value_and_a_way_out(
    overrides: list[str], named: str, hint: str
) -> None:
    with pytest.raises(Mistake) as caught:
        compose(overrides)
    message = str(caught.value)
    assert named in message
    assert hint in message
    assert "\n" not in message


def test_a_name_with_a_control_character_is_refused_where_no_grammar_looks() -> None:
    for name in ("a\nb", "a\0b", "", "-rf"):
        if name:
            with pytest.raises(Mistake, match="not fit for a folder"):
                compose([], {"name": name})


def test_a_batch_that_the_ranks_cannot_share_is_told() -> None:
    config = compose(["align.batch=4", "align.micro_batch=4"], {"cluster.stages.align.nodes": 8}).config
    assert list(misplaced(config)) == ["align.batch=4: 8 ranks need a sample each; expected 8 or more"]


def test_all_problems_of_a_configuration_can_be_listed() -> None:
    config = compose([]).config
    bad = replace(config, experts=("nobody",), student=replace(config.student, window=0), name="/")
    assert len(list(problems(bad))) == 3


def test_keys_are_found_by_path() -> None:
    assert hint_of("align.lr") is float
    assert hint_of("cluster.stages.anything.nodes") is int
    assert hint_of("cluster.stages.anything") is Placement
    assert hint_of("align.lr.more") is None
    assert hint_of("nothing") is None
    assert "cluster.stages.NAME.nodes" in known_keys()


def test_the_command_line_is_sorted_into_choices_values_and_deletions() -> None:
    given = parse(["teacher=olmo-3-7b", "++align.lr=1", "~data.sources.x", "stage=eval"], config_folders())
    assert given.choices == {"teacher": "olmo-3-7b"}
    assert given.values == {"align.lr": 1, "stage": "eval"}
    assert given.deleted == ("data.sources.x",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("4:30", 270),
        ("04:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30:10", 131410),
        ("x", 0),
        ("1:2:3:4", 0),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("given", "loss", "sampler"),
    [
        ([], "random", "hybrid"),
        (["distill.targets=online"], "full", "topk"),
        (["distill.targets=online", "distill.loss=topk"], "topk", "topk"),
        (["cache.sampler=topk"], "topk_tail", "topk"),
        (["cache.sampler=random"], "random", "random"),
        (["distill.loss=random"], "random", "hybrid"),
        (["distill.loss=topk"], "topk", "topk"),
        (["distill.divergence=jsd"], "topk_tail", "topk"),
        (["recipe=llama"], "topk_tail", "topk"),
    ],
)
def test_loss_and_sampler_follow_each_other(given: list[str], loss: str, sampler: str) -> None:
    config = compose(given).config
    assert (config.loss, config.sampler) == (loss, sampler)
