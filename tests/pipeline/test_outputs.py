"""What counts as made of these settings, and what a plan says of it, over outputs that nothing was computed for."""

import pytest
import yaml

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.pipeline import halves
from notellm2_ray.pipeline import ranking_outputs as ranking
from notellm2_ray.pipeline import ranking_stages as ranking_workflow
from notellm2_ray.pipeline import recall_outputs as outputs
from notellm2_ray.pipeline.plan import plan
from notellm2_ray.pipeline.stage import run_stage
from notellm2_ray.presets import load_settings


def settings_of(workspace, *overrides):
    return load_settings(None, "demo", [f"workspace={workspace}", *overrides])


def pretend_ranking(settings):
    """Every output of the ranking half but the evaluation, empty."""
    made = [outputs.prepared(settings)]
    run_stage(made[0], lambda directory: {"notes": 1})
    makers = [ranking.sequences, ranking.tiny_mllm, ranking.image_summaries]
    for make in makers:
        run_stage(make(settings), lambda directory: {})
    for variant in ranking.preference_variants(settings):
        run_stage(ranking.preferences(ranking.for_preferences(settings, variant)), lambda directory: {})
    for each in ranking.rankers(settings):
        run_stage(ranking.ranker(each), lambda directory: {})
    for table in ranking.scored(settings):
        run_stage(ranking.scores(settings, table), lambda directory: {})


def test_scores_of_other_settings_are_not_evaluated(tmp_path):
    pretend_ranking(settings_of(tmp_path))
    other = settings_of(tmp_path, "ranker.layout=image_first")
    with pytest.raises(OutputError, match=r"untuned/uniform.*run score-candidates"):
        ranking_workflow.eval_ranking(other)


def test_a_ranker_is_not_tuned_on_preferences_of_other_settings(tmp_path):
    pretend_ranking(settings_of(tmp_path))
    with pytest.raises(OutputError, match="run summarize-preferences"):
        ranking_workflow.train_ranker(settings_of(tmp_path, "preferences.max_tokens=24"))


def test_more_bad_rows_allowed_keep_what_was_made(tmp_path):
    settings = settings_of(tmp_path)
    run_stage(outputs.prepared(settings), lambda directory: {})
    run_stage(ranking.tiny_mllm(settings), lambda directory: {})
    with pytest.raises(ValueError, match="too many"), ranking.image_summaries(settings).write():
        raise ValueError("too many")
    assert ranking.image_summaries(settings_of(tmp_path, "summaries.max_bad_share=0.2")).resumable


def test_new_weights_in_a_models_directory_are_noticed(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    settings = settings_of(tmp_path / "runs", f"summaries.model={model}", f"model.vision={model}")
    run_stage(outputs.prepared(settings), lambda directory: {})
    run_stage(outputs.pairs(settings), lambda directory: {})
    run_stage(outputs.tiny(settings), lambda directory: {})
    for make in (ranking.image_summaries, outputs.embedder):
        before = make(settings).fingerprint
        assert make(settings).fingerprint == before
        (model / "model.safetensors").write_bytes(b"another" + make.__name__.encode())
        assert make(settings).fingerprint != before


def test_new_weights_of_the_baselines_image_tower_are_noticed(tmp_path):
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "model.safetensors").write_bytes(b"one")
    settings = settings_of(tmp_path / "runs", f"ranking.image_tower={tower}", "ranking.baselines=[gru4rec_image]")
    pretend_ranking(settings)
    before = ranking.ranking_evaluation(settings).fingerprint
    (tower / "model.safetensors").write_bytes(b"another")
    assert ranking.ranking_evaluation(settings).fingerprint != before


def test_the_whole_pool_is_embedded_by_modality_whatever_is_evaluated(tmp_path):
    settings = settings_of(tmp_path, "embed.by_modality=true", "evaluate.inputs=[multimodal]")
    assert outputs.inputs_of(settings, "all") == ("multimodal", "image", "text")
    assert outputs.inputs_of(settings, "test") == ("multimodal",)
    text = settings_of(tmp_path, "embed.by_modality=true", "model.variant=text_only")
    assert outputs.inputs_of(text, "all") == ("text",)


def test_a_plan_leaves_out_what_another_seed_does_not_touch(tmp_path):
    pretend_ranking(settings_of(tmp_path))
    lines = plan(settings_of(tmp_path, "ranking.seeds=[42,43]"), "run-ranking").splitlines()
    state = {" ".join(line.split()[:3]): line for line in lines}
    assert "already there" in state["score-candidates mllm_msr-seed42 uniform"]
    assert "already there" in state["score-candidates untuned popular"]
    assert "to do" in state["score-candidates mllm_msr-seed43 uniform"]
    assert "to do" in next(line for line in lines if "train-ranker mllm_msr-seed43" in line)
    assert "block_size = 1, 2, 3, 4, 5" in plan(settings_of(tmp_path), "sweep")


@pytest.mark.parametrize(("baseline", "parts"), [("gru4rec_image", ["llm", "clip"]), ("gru4rec_summary", ["llm"])])
def test_features_of_tiny_models_are_waited_for(tmp_path, monkeypatch, baseline, parts):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text_only = "model.variant=text_only", "evaluate.variants=[text_only]"
    settings = settings_of(tmp_path, f"ranking.baselines=[{baseline}]", *text_only)
    assert not halves.side_by_side(settings)
    assert halves.side_by_side(settings_of(tmp_path))
    assert outputs.tiny_parts(settings) == parts


def test_the_engine_without_deepspeed_survives_being_written_down(tmp_path):
    settings = settings_of(tmp_path, "train.engine=plain", "tune.engine=plain")
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(halves.shared_out(settings)))
    assert load_settings(path, None, []).train.engine == "plain"


def test_controls_of_what_sees_neither_images_nor_tastes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tallrec sees neither"):
        settings_of(tmp_path, "ranking.rankers=[tallrec,mllm_msr]")
