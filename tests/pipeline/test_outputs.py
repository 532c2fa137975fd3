"""Which outputs count as complete for given settings, and what a dry run prints, with empty outputs."""

import re

import pytest
import yaml

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.pipeline import embedders, halves, ranking_outputs, ranking_stages, recall_outputs, recall_stages
from notellm2_ray.pipeline.dry_run import dry_run
from notellm2_ray.pipeline.stage import run_stage
from notellm2_ray.pipeline.table import STAGES, planned
from notellm2_ray.presets import load_settings


def settings_of(workspace, *overrides):
    return load_settings(None, "laptop", [f"workspace={workspace}", *overrides])


def pretend(settings, verb="run", leave_out=()):
    """Every output of a verb, empty."""
    for stage, one in planned(verb, settings):
        if stage.verb not in leave_out:
            run_stage(one, lambda directory: {"notes": 1, "train_pairs": 64})


def states(settings, verb):
    """The states of a dry run by label."""
    lines = [line for line in dry_run(settings, verb).splitlines() if line.startswith("  ")]
    return dict(re.split("  +", line.strip(), maxsplit=1) for line in lines)


@pytest.mark.parametrize("verb", ["run", "run-retrieval", "run-ranking"])
def test_a_dry_run_after_a_run_has_nothing_to_do(tmp_path, verb):
    settings = settings_of(tmp_path)
    pretend(settings, verb)
    found = states(settings, verb)
    assert len(found) > 5
    assert [label for label, state in found.items() if not state.startswith("already there")] == []


@pytest.mark.parametrize(
    "changed",
    [
        "prepare.max_bad_share=0.5",
        "prepare.rows_per_file=7",
        "pairs.partitions=3",
        "train.cpus_per_worker=8",
        "train.gradient_checkpointing=true",
        "embed.actors=2",
        "embed.max_bad_share=0.2",
        "index.gpu=true",
        "generation.engines=2",
        "generation.gpu_memory=0.5",
        "summaries.concurrent_batches=9",
        "preferences.concurrent_calls=7",
        "tune.max_failures=0",
        "ranking.sweep=context_length",
        "serve.port=9000",
        "ray.num_cpus=12",
    ],
)
def test_a_setting_of_resources_does_not_invalidate_outputs(tmp_path, changed):
    pretend(settings_of(tmp_path))
    found = states(settings_of(tmp_path, changed), "run")
    assert [label for label, state in found.items() if not state.startswith("already there")] == []


def test_settings_of_resources_are_marked_as_such():
    from notellm2_ray.core.config import nested_models, shaping
    from notellm2_ray.core.settings import Settings

    for name in ("train", "embed", "tune", "generation", "pairs", "summaries", "preferences"):
        section = nested_models(Settings.model_fields[name].annotation)[0]()
        left = [
            key for key in shaping(section) if key.startswith(("cpus_", "gpus_", "concurrent_", "max_bad", "max_fail"))
        ]
        assert left == [], name


def test_lora_is_refused_for_an_embedder_without_an_llm_before_anything_runs(tmp_path):
    settings = settings_of(tmp_path, "train.lora={rank: 4}", "evaluate.embedders=[basic,image_only]")
    with pytest.raises(ConfigError, match="model.variant=image_only trains none"):
        states(settings, "run-retrieval")


def test_a_changed_setting_invalidates_only_the_outputs_that_depend_on_it(tmp_path):
    pretend(settings_of(tmp_path))
    found = states(settings_of(tmp_path, "preferences.max_tokens=24"), "run")
    redone = {label.split()[0] for label, state in found.items() if state.startswith("to do")}
    assert redone == {"summarize-preferences", "train-ranker", "score-candidates", "eval-ranking"}


def test_preferences_without_image_summaries_do_not_wait_for_them(tmp_path):
    settings = settings_of(tmp_path, "ranking.rankers=[mllm_msr,no_image_summary]")
    pretend(settings, "run-ranking", leave_out=_from("summarize-images"))
    found = states(settings, "run-ranking")
    assert found["summarize-preferences no_image_summary"].startswith("to do (")
    assert found["summarize-preferences recurrent"].startswith("to do, after")


def _from(verb):
    """A stage and the stages after it."""
    verbs = [stage.verb for stage in STAGES]
    return verbs[verbs.index(verb) :]


def test_outputs_are_read_only_by_stages_that_need_them(tmp_path):
    """Every directory that an output reads is written by a stage that its own stage needs."""
    from notellm2_ray.pipeline.table import stage_of

    extra = (
        "evaluate.seeds=[42,43]",
        "ranking.seeds=[42,43]",
        "ranking.baselines=[random,gru4rec_image,gru4rec_summary,untuned]",
        "candidates.protocols=[uniform,published]",
    )
    settings = settings_of(tmp_path, *extra)
    written = {one.directory: one.verb for _, one in planned("run", settings)}
    for stage, one in planned("run", settings):
        mine = {stage.verb, *stage.needs, *stage.also_needs(settings)}
        for need in stage.needs:
            mine |= set(stage_of(need).needs)
        for directory in (*one.reads.values(), *one.reads_if_there.values()):
            assert directory in written, (one.label, directory)
            assert one.reads_if_there or written[directory] in mine, (one.label, directory)
    seen = set()
    for stage in STAGES:
        assert set(stage.needs) <= seen, stage.verb
        seen.add(stage.verb)


def test_a_text_only_model_needs_no_tiny_tower(tmp_path):
    model = tmp_path / "llm"
    model.mkdir()
    overrides = f"model.llm={model}", "model.variant=text_only", "evaluate.embedders=[text_only]"
    settings = settings_of(tmp_path / "runs", *overrides)
    assert embedders.tiny_parts(settings) == []
    assert not any(stage.verb == "build-tiny" for stage, _ in planned("run-retrieval", settings))
    pretend(settings, "run-retrieval")
    assert all(state.startswith("already there") for state in states(settings, "run-retrieval").values())


@pytest.mark.parametrize(
    ("rankers", "preferences", "needed"),
    [
        ("tallrec", "tiny", False),
        ("no_image_summary", "own", False),
        ("no_image_summary", "tiny", True),
        ("mllm_msr", "own", True),  # its preferences read image summaries
    ],
)
def test_the_tiny_mllm_is_trained_only_for_a_step_that_reads_it(tmp_path, rankers, preferences, needed):
    model = tmp_path / "lm"
    model.mkdir()
    written_by = model if preferences == "own" else "tiny"
    compared = f"ranking.rankers=[{rankers}]", "ranking.controls=[]", "ranking.baselines=[random,untuned_text]"
    settings = settings_of(tmp_path, f"ranker.model={model}", f"preferences.model={written_by}", *compared)
    assert ("build-tiny-mllm" in [stage.verb for stage, _ in planned("run-ranking", settings)]) == needed


def test_scores_with_other_settings_are_not_evaluated(tmp_path):
    pretend(settings_of(tmp_path), "run-ranking", leave_out=("eval-ranking",))
    other = settings_of(tmp_path, "ranker.layout=image_first")
    with pytest.raises(OutputError, match=r"untuned/uniform.*run score-candidates"):
        ranking_stages.eval_ranking(other)


def test_a_ranker_is_not_tuned_on_preferences_with_other_settings(tmp_path):
    pretend(settings_of(tmp_path), "run-ranking")
    with pytest.raises(OutputError, match="run summarize-preferences"):
        ranking_stages.train_ranker(settings_of(tmp_path, "preferences.max_tokens=24"))


def test_allowing_more_bad_rows_resumes_the_output(tmp_path):
    settings = settings_of(tmp_path)
    pretend(settings, "run-ranking", leave_out=_from("summarize-images"))
    with pytest.raises(ValueError, match="too many"), ranking_outputs.image_summaries(settings).output().write():
        raise ValueError("too many")
    more = settings_of(tmp_path, "summaries.max_bad_share=0.2")
    assert ranking_outputs.image_summaries(more).output().resumable
    assert states(more, "run-ranking")["summarize-images"].startswith("to continue")


def test_new_weights_in_a_models_directory_are_noticed(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    settings = settings_of(tmp_path / "runs", f"summaries.model={model}", f"model.vision={model}")
    pretend(settings)
    for make in (ranking_outputs.image_summaries, recall_outputs.embedder):
        assert make(settings).complete
        (model / "model.safetensors").write_bytes(b"another" + make.__name__.encode())
        assert not make(settings).complete
        pretend(settings)


def test_new_weights_of_the_baselines_image_tower_are_noticed(tmp_path):
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "model.safetensors").write_bytes(b"one")
    settings = settings_of(tmp_path / "runs", f"ranking.image_tower={tower}", "ranking.baselines=[gru4rec_image]")
    pretend(settings, "run-ranking")
    (tower / "model.safetensors").write_bytes(b"another")
    assert not ranking_outputs.ranking_evaluation(settings).complete


def test_embedding_all_notes_by_modality_does_not_depend_on_the_evaluation(tmp_path):
    settings = settings_of(tmp_path, "embed.by_modality=true", "evaluate.inputs=[multimodal]")
    assert embedders.shown_inputs(settings, "all") == ("multimodal", "image", "text")
    assert embedders.shown_inputs(settings, "test") == ("multimodal",)
    text = settings_of(tmp_path, "embed.by_modality=true", "model.variant=text_only")
    assert embedders.shown_inputs(text, "all") == ("text",)


def test_a_dry_run_leaves_out_outputs_that_do_not_depend_on_the_seed(tmp_path):
    pretend(settings_of(tmp_path), "run-ranking", leave_out=("eval-ranking",))
    found = states(settings_of(tmp_path, "ranking.seeds=[42,43]"), "run-ranking")
    assert found["score-candidates mllm_msr-seed42 uniform"].startswith("already there")
    assert found["score-candidates untuned popular"].startswith("already there")
    assert found["score-candidates mllm_msr-seed43 uniform"].startswith("to do")
    assert found["train-ranker mllm_msr-seed43"].startswith("to do")
    assert "block_size = 1, 2, 3, 4, 5" in dry_run(settings_of(tmp_path), "sweep")


def directories(settings, verb="run"):
    """Where a verb writes, below the workspace."""
    root = settings.workspace
    return {str(one.directory.relative_to(root)) for _, one in planned(verb, settings)}


def test_every_seed_has_what_is_random_of_its_own_and_the_first_seeds_paths_stay(tmp_path):
    alone = directories(settings_of(tmp_path))
    several = settings_of(tmp_path, "evaluate.seeds=[42,43]", "ranking.seeds=[42,43]")
    assert alone <= directories(several)
    assert not any(path.startswith("seeds/") for path in alone)
    own = {path for path in directories(several) if path.startswith("seeds/43/")}
    assert own == {
        f"seeds/43/{path}"
        for path in alone
        if path.split("/")[0] in ("tiny", "sequences", "tiny_mllm", "image_summaries", "preferences")
    } | {
        f"seeds/43/scores/{name.replace('untuned', 'untuned-seed43').replace('seed42', 'seed43')}"
        for name in (path.removeprefix("scores/") for path in alone if path.startswith("scores/"))
    }
    drawn = {one.directory.name: one.settings for _, one in planned("run", several) if "seeds" in one.directory.parts}
    assert drawn["tiny"]["seed"] not in (42, 43)
    assert drawn["sequences"]["seed"] == 42  # of the split
    assert drawn["sequences"]["draws"] == drawn["tiny"]["seed"]


def test_seeds_can_share_tiny_models_and_negatives_and_real_models_are_always_shared(tmp_path):
    seeds = "evaluate.seeds=[42,43]", "ranking.seeds=[42,43]"
    shared = settings_of(tmp_path, *seeds, "tiny.per_seed=false", "candidates.per_seed=false")
    assert not any(path.startswith("seeds/") for path in directories(shared))
    model = tmp_path / "model"
    model.mkdir()
    names = ("model.llm", "model.vision", "summaries.model", "preferences.model", "ranker.model")
    real = settings_of(tmp_path, *seeds, *(f"{name}={model}" for name in names))
    own = {path.split("/")[2] for path in directories(real) if path.startswith("seeds/")}
    assert own == {"sequences", "scores"}
    (preferences,) = [one for _, one in planned("run", real) if one.verb == "summarize-preferences"]
    assert preferences.reads["sequences"] == tmp_path / "sequences"


@pytest.mark.parametrize(("baseline", "parts"), [("gru4rec_image", ["llm", "clip"]), ("gru4rec_summary", ["llm"])])
def test_baselines_wait_for_the_tiny_models_that_they_read(tmp_path, monkeypatch, baseline, parts):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text_only = "model.variant=text_only", "evaluate.embedders=[text_only]"
    settings = settings_of(tmp_path, f"ranking.baselines=[{baseline}]", *text_only)
    assert not halves.side_by_side(settings)
    assert halves.side_by_side(settings_of(tmp_path))
    assert embedders.tiny_parts(settings) == parts
    assert "build-tiny" in [stage.verb for stage, _ in planned("run-ranking", settings)]


def test_settings_with_the_plain_engine_survive_yaml(tmp_path):
    settings = settings_of(tmp_path, "train.engine=plain", "tune.engine=plain")
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(halves.settings_of_half(settings)))
    assert load_settings(path, None, []).train.engine == "plain"


def test_controls_of_tallrec_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tallrec uses neither"):
        settings_of(tmp_path, "ranking.rankers=[tallrec,mllm_msr]")


HARD = (
    "embedders.hard.model={variant: notellm2}",
    "embedders.hard.train={hard_negatives: 2, negatives_of: small}",
    "embedders.small.model={variant: notellm2, embedding_dim: 16}",
    "evaluate.embedders=[hard]",
    "embedder=hard",
)


def test_an_embedder_is_trained_after_the_one_whose_negatives_it_takes(tmp_path):
    settings = settings_of(tmp_path, *HARD)
    (stage,) = [stage for stage in STAGES if stage.verb == "train-embedder"]
    assert [each.embedder_name for each in stage.in_a_run(settings)] == ["small-seed42", "hard-seed42"]
    found = states(settings, "run-retrieval")
    labels = [label for label in found if label.split()[0] in ("train-embedder", "mine-negatives")]
    assert labels == ["train-embedder small-seed42", "mine-negatives small-seed42", "train-embedder hard-seed42"]
    pretend(settings, "run-retrieval")
    assert {state.split(" (")[0] for state in states(settings, "run-retrieval").values()} == {"already there"}
    other = states(settings_of(tmp_path, *HARD, "negatives.max_rank=50"), "run-retrieval")
    redone = {label.split()[0]: state for label, state in other.items() if state.startswith("to do")}
    assert "train-embedder small-seed42" not in redone
    assert {"mine-negatives", "train-embedder"} <= set(redone)


def test_negatives_of_an_embedder_that_is_not_trained_are_refused(tmp_path):
    settings = settings_of(tmp_path, *HARD)
    with pytest.raises(OutputError, match=r"hard is trained with the negatives of small: .*embedder=small` first"):
        recall_stages.train_embedder(settings)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.hard_negatives=2", "train.negatives_of=basic"), "basic needs the negatives of basic. Give"),
        (("embedders.a.train={hard_negatives: 1, negatives_of: nobody}",), "there is no embedder 'nobody'"),
        (("train.negatives_of=basic",), "set train.hard_negatives"),
    ],
)
def test_negatives_that_cannot_be_had_are_refused(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        dry_run(settings_of(tmp_path, *overrides), "run-retrieval")


def test_a_changed_table_of_own_pairs_is_noticed_and_a_missing_one_is_not(tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("query_id,target_id\na,b\n")
    settings = settings_of(tmp_path / "runs", f"pairs.table={own}")
    pretend(settings, "prepare")
    pretend(settings, "mine-pairs")
    assert recall_outputs.pairs(settings).complete
    assert not recall_outputs.pairs(settings_of(tmp_path / "runs")).complete
    own.write_text("query_id,target_id\na,b\nb,c\n")
    assert not recall_outputs.pairs(settings).complete
    pretend(settings, "mine-pairs")
    own.unlink()
    assert recall_outputs.pairs(settings).complete


def test_outputs_from_before_hard_negatives_stay_valid(tmp_path):
    trained = recall_outputs.embedder(embedders.resolved(settings_of(tmp_path)))
    assert not {"hard_negatives", "negatives_of", "false_negative_margin"} & set(trained.settings["train"])


def test_named_embedders_are_compared_in_one_table(tmp_path):
    settings = settings_of(
        tmp_path,
        "embedders.small.model={variant: text_only, embedding_dim: 16}",
        "embedders.small.train={epochs: 5}",
        "embedders.as_it_comes={trained: false}",
        "evaluate.embedders=[basic,small,as_it_comes]",
        "evaluate.seeds=[42,43]",
    )
    names = [each.embedder_name for each in embedders.compared_embedders(settings)]
    assert names == [f"{name}-seed{seed}" for name in ("basic", "small", "as_it_comes") for seed in (42, 43)]
    assert [embedders.is_baseline(each) for each in embedders.compared_embedders(settings)] == [True] * 6
    assert not embedders.is_baseline(embedders.resolved(embedders.select(settings, "notellm2", 42)))
    small = embedders.resolved(embedders.select(settings, "small", 43))
    assert (small.model.embedding_dim, small.train.epochs, small.train.seed) == (16, 5, 43)
    assert embedders.resolved(small) == small
    assert embedders.shown_inputs(small, "test") == ("text",)
    trained = [one.name for stage, one in planned("run-retrieval", settings) if stage.verb == "train-embedder"]
    assert trained == [*names, "notellm2-seed42"]
