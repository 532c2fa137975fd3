"""Settings: a mistyped key or value is named, with the nearest right one."""

import pytest
import yaml

from notellm2_ray.cli import knobs, pipeline_verbs
from notellm2_ray.core.config import Frozen, added, apply_overrides, build, load_yaml, shaping, to_plain
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import Settings
from notellm2_ray.presets import PRESETS, load_settings


def resolve(*overrides: str) -> Settings:
    return build(Settings, apply_overrides({}, [part for one in overrides for part in one.split()]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.step=3", "unknown setting 'train.step'; did you mean 'train."),
        ("zero_stage=1", "did you mean 'train.zero_stage'"),
        ("evaluate.variants=[basic]", "setting 'evaluate.variants' is now called 'evaluate.embedders'"),
        ("ranker.prompt_language=zh", "setting 'ranker.prompt_language' is now called 'prompts.language'"),
        ("serve.encode.precision=bf16", "setting 'serve.encode.precision' is now called 'embed.precision'"),
        ("sequences.actions=[click]", "setting 'sequences.actions' is now called 'sequences.positive_actions'"),
        ("evaluate.embedders=[basik]", "there is no embedder 'basik'; did you mean 'basic'?"),
        ("embedder=mine", "there is no embedder 'mine'"),
        ("embedders.basic.trained=false", "that is a variant of `model`"),
        ("source.num_note=3", "'source.num_note'; did you mean 'source.num_notes'"),
        ("serve.gateway.cpu=3", "unknown setting 'serve.gateway.cpu'; did you mean 'serve.gateway.cpus'?"),
        ("model.qformer.queries=8", "'model.qformer.queries'; did you mean 'model.qformer.num_queries'?"),
        ("source.notes=a.parquet", "setting 'source.notes' is of another source.kind: set source.kind=tabular"),
        ("source.columns.title=t", "'source.columns' is of another source.kind: set source.kind=tabular"),
        ("source.kind=tabular source.path=x", "'source.path'; did you mean"),
        ("source.days=many", "setting 'source.days': Input should be a valid integer"),
        ("train.batch_pairs=many", "setting 'train.batch_pairs': Input should be a valid integer"),
        ("model.variant=notellm3", "'notellm2'"),
        ("pairs.lower=40", "pairs.lower (40.0) must be below pairs.upper"),
        ("steps", "not of the form key=value"),
        ("train.epochs=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(override, named):
    with pytest.raises(ConfigError, match=r".") as caught:
        resolve(override)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.engine=plain", "train.offload=optimizer"),
        ("source.language=zh", "source.words_per_value=11"),
        ("prepare.max_image_pixels=200_000_000",),
        ("train.zero_stage=2", "train.offload=parameters_and_optimizer"),
        ("train.batch_pairs=9", "train.num_workers=2"),
        ("source.kind=movielens", "source.directory=x"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides):
    with pytest.raises(ConfigError, match=r"needs|must|set train.offload=none|less than"):
        resolve(*overrides)


def test_settings_are_frozen_and_survive_a_round_trip(tmp_path):
    settings = resolve("train.learning_rate=1e-4", "pairs.view_actions=[view,open]")
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 1
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(to_plain(settings)))
    assert build(Settings, load_yaml(path)) == settings
    assert settings.train.learning_rate == 1e-4


@pytest.mark.parametrize("preset", ["demo", "mqwen-bigg"])
def test_every_preset_takes_the_plain_engine_and_is_read_again(preset):
    settings = load_settings(None, preset, ["train.engine=plain", "train.offload=none", "tune.engine=plain"])
    assert build(Settings, to_plain(settings)) == settings


def test_later_levels_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: demo\ntrain: {batch_pairs: 16}\nmodel: {qformer: {num_queries: 3}}\n")
    settings = load_settings(str(path), None, ["train.epochs=7"])
    assert (settings.train.batch_pairs, settings.train.epochs) == (16, 7)
    assert settings.model.qformer.num_queries == 3
    assert settings.model.qformer.num_layers == 2  # the preset's, where the file is silent


def test_paper_presets_have_the_papers_hyperparameters():
    for name in ("mtomato-base", "mqwen-base", "mqwen-bigg"):
        settings = load_settings(None, name, [])
        train = settings.train  # Table 8
        assert (train.learning_rate, train.weight_decay, train.warmup_ratio) == (3e-6, 1e-3, 0.1)
        assert (train.betas, train.epsilon, train.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)
        assert (train.batch_pairs, train.precision, train.zero_stage) == (128, "bf16", 3)
        assert (settings.model.embedding_dim, settings.model.alpha, settings.model.start_temperature) == (64, 9, 3)
        assert (settings.pairs.lower, settings.pairs.upper, settings.pairs.top) == (0.01, 30, 3)


@pytest.mark.parametrize(("llm", "temperature"), [("tiny", 1.5), ("packaged", 1.5), ("models/SmolLM2-135M", 3)])
def test_a_real_llm_on_a_laptop_starts_at_the_papers_temperature(llm, temperature):
    settings = load_settings(None, "laptop", [f"model.llm={llm}"])
    assert settings.model.start_temperature == temperature
    chosen = load_settings(None, "laptop", [f"model.llm={llm}", "model.initial_temperature=2"])
    assert chosen.model.start_temperature == 2


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="mqwen-bigg"):
        load_settings(None, "mqwen", [])


@pytest.mark.parametrize("content", ["- a list", "a: [", "\x00"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="broken.yaml"):
        load_yaml(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(tmp_path / "absent.yaml")


def test_the_help_of_baselines_names_every_row():
    from notellm2_ray.baselines.ranking.table import RANKING_BASELINES
    from notellm2_ray.baselines.recall.table import RECALL_BASELINES

    for section, table in (("evaluate", RECALL_BASELINES), ("ranking", RANKING_BASELINES)):
        text = " ".join(knobs((section,)).split(f"  {section}.baselines = ")[1].split("\n")[1:5]).replace(",", " ")
        assert set(table.rows) <= set(text.split())


def test_help_explains_every_knob():
    for _, sections in pipeline_verbs().values():
        text = knobs(sections)
        for section in sections:
            assert f"\n{section}: " in text
    explained = knobs(())
    for key in (
        "train.zero_stage",
        "model.qformer.num_queries",
        "pairs.upper",
        "source.columns.note_id",
        "embed.actors",
    ):
        line = explained.split(f"  {key} = ")[1]
        assert len(line.splitlines()[1].strip()) > 5 or key.startswith("source.columns")
    assert set(PRESETS) >= {"demo", "mtomato-base", "mqwen-base", "mqwen-bigg"}


MICROLENS = ["source.pairs=p.tsv", "source.titles=t.csv"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pairs.window_days=14", "pairs.window_days=14.0 needs the times of the events"),
        ("pairs.max_gap_hours=1", "pairs.max_gap_hours=1.0 needs the times"),
        ("candidates.split_by=time", "use candidates.split_by=users"),
        ("sequences.blocks_by=session", "use sequences.blocks_by=size"),
        ("split.by=time", "split.by=time needs the notes' creation times"),
        ("candidates.max_negative_age_days=3", "max_negative_age_days=3.0 needs the notes' creation times"),
        ("ranking.baselines=[newest]", "the row newest needs the notes' creation times"),
    ],
)
def test_what_needs_times_is_refused_where_they_are_invented(override, words):
    load_settings(None, "microlens", MICROLENS)
    with pytest.raises(ConfigError, match=words):
        load_settings(None, "microlens", [*MICROLENS, override])


def test_real_times_of_microlens_may_be_used():
    real = ["source.pairs=p.csv", "source.titles=t.csv"]
    settings = load_settings(None, "microlens", [*real, "candidates.split_by=time", "pairs.window_days=14"])
    assert settings.candidates.split_by == "time"


def test_a_knob_that_came_later_leaves_older_outputs_valid():
    class Older(Frozen):
        steps: int = 3

    class Newer(Older):
        noise: float | None = added(None)

    assert shaping(Newer()) == shaping(Older()) == {"steps": 3}
    assert shaping(Newer(noise=0.5)) == {"steps": 3, "noise": 0.5}
