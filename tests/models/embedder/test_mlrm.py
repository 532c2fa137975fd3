"""The network: every variant, the equations, and independence of a note's vector from its batch."""

from __future__ import annotations

import pytest
import torch

from notellm2_ray.core.schema import Note
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.fusion import LateFusion
from notellm2_ray.models.embedder.losses import embedder_loss
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.embedder.vectors import NoteVectors, join_vectors
from tests.support import tiny_models

WITH_IMAGES = [name for name, variant in VARIANTS.items() if variant.sees_images]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Paths of each tiny LLM and tower."""
    base = tmp_path_factory.mktemp("parts")
    made = {kind: tiny_models.save_llm(base / kind, kind) for kind in tiny_models.LLMS}
    towers = {kind: getattr(tiny_models, f"save_{kind}") for kind in ("clip", "siglip", "dinov2")}
    return made | {kind: save(base / kind) for kind, save in towers.items()}


def make(parts, variant="notellm2", llm="qwen2", vision="clip", seed=1, **changes):
    settings = tiny_models.settings(variant, **changes)
    return build_encoder(settings, seed, llm_path=parts[llm], vision_path=parts[vision])


def vectors(encoder, notes, inputs="multimodal") -> NoteVectors:
    preprocessor = encoder.preprocessor
    return encoder.model(preprocessor.collate([preprocessor.features(note, inputs) for note in notes]))


@pytest.mark.parametrize("without_image", [(), (1, 2), range(4)], ids=["all", "some", "none"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_gradient(parts, variant, vision, without_image):
    encoder = make(parts, variant, vision=vision, freeze_vision=False)
    encoder.model.train()
    output = vectors(encoder, tiny_models.notes(4, without_image=without_image))
    assert output.multimodal.shape == (4, 16)
    assert (output.visual is not None) == (variant in ("micl", "notellm2"))
    embedder_loss(output, torch.arange(4), alpha=9.0).total.backward()
    trained = {name: value for name, value in encoder.model.named_parameters() if value.requires_grad}
    assert [name for name, value in trained.items() if value.grad is None] == []
    assert all(torch.isfinite(value.grad).all() for value in trained.values())
    left_out = {name for name, _ in encoder.model.named_parameters()} - set(trained)
    assert left_out <= {"tower.model.embeddings.mask_token"}


@pytest.mark.parametrize("variant", WITH_IMAGES)
def test_a_frozen_tower_gets_no_gradient_and_stays_in_evaluation(parts, variant):
    encoder = make(parts, variant, freeze_vision=True)
    encoder.model.train()
    assert not any(module.training for module in encoder.model.tower.modules())
    embedder_loss(vectors(encoder, tiny_models.notes(4)), torch.arange(4), alpha=9.0).total.backward()
    assert all(value.grad is None for value in encoder.model.tower.parameters())
    assert not any(value.requires_grad for value in encoder.model.tower.parameters())


def test_only_the_image_only_variant_trains_its_tower_by_default(parts):
    trained = {name for name in WITH_IMAGES if not make(parts, name).model.tower.frozen}
    assert trained == {"image_only"}


@pytest.mark.parametrize("llm", tiny_models.LLMS)
def test_every_family_of_llm_runs_and_is_causal(parts, llm):
    encoder = make(parts, "notellm2", llm=llm)
    note = Note("a", "red cat", (), "on the sofa", tiny_models.picture(0))
    other = note._replace(title="blue house", content="by the sea, far away")
    first, second = vectors(encoder, [note]), vectors(encoder, [other])
    assert torch.allclose(first.visual, second.visual, atol=1e-6)  # v does not read the text
    assert (first.multimodal - second.multimodal).abs().max() > 1e-3


@pytest.mark.parametrize("variant", WITH_IMAGES)
def test_the_image_matters(parts, variant):
    encoder = make(parts, variant)
    note = Note("a", "red cat", (), "on the sofa", tiny_models.picture(0))
    first, second = (vectors(encoder, [note._replace(image=tiny_models.picture(i))]).multimodal for i in (0, 1))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_vector_depends_only_on_its_own_note(parts, variant):
    encoder = make(parts, variant)
    notes = tiny_models.notes(6, without_image=[2, 4])
    together = vectors(encoder, notes)
    order = [3, 5, 0, 2, 4, 1]
    shuffled = vectors(encoder, [notes[i] for i in order])
    assert torch.allclose(shuffled.multimodal, together.multimodal[order], atol=1e-5)
    for row, note in enumerate(notes):
        alone = vectors(encoder, [note])
        assert torch.allclose(alone.multimodal[0], together.multimodal[row], atol=1e-5)
        assert alone.has_visual[0] == together.has_visual[row]
        if together.visual is not None:
            assert torch.allclose(alone.visual[0], together.visual[row], atol=1e-5)


def test_which_rows_have_a_visual_vector(parts):
    notes = tiny_models.notes(3, without_image=[1])
    assert vectors(make(parts), notes).has_visual.tolist() == [True, False, True]
    assert vectors(make(parts), notes, "text").has_visual.tolist() == [False] * 3
    assert vectors(make(parts, missing_image="zero"), notes).has_visual.tolist() == [True] * 3
    assert vectors(make(parts, "late_fusion"), notes).has_visual.tolist() == [False] * 3


def test_training_without_an_image_gives_the_same_vectors_as_evaluation(parts):
    encoder = make(parts)
    notes = tiny_models.notes(3, without_image=range(3))
    encoder.model.train()
    trained = vectors(encoder, notes)
    encoder.model.eval()
    assert torch.allclose(trained.multimodal, vectors(encoder, notes).multimodal, atol=1e-6)
    assert not trained.has_visual.any()


def test_the_gate_is_equation_7():
    fusion = LateFusion(2, 1)
    with torch.no_grad():
        fusion.visual.weight.copy_(torch.tensor([[2.0, -1.0]]))
        fusion.gate.weight.copy_(torch.tensor([[0.5, -0.25]]))
        fusion.gate.bias.fill_(0.1)
    v, n = 2.0 * 3.0 - 1.0 * 1.0, 4.0
    z = 1 / (1 + torch.exp(torch.tensor(-(0.5 * v - 0.25 * n + 0.1))))
    fused = fusion(torch.tensor([[3.0, 1.0]]), torch.tensor([[n]]))
    assert fused.item() == pytest.approx((z * v + (1 - z) * n).item(), rel=1e-6)


def test_visual_tokens_stand_where_the_prompt_has_them(parts):
    """The states of a batch equal those of the LLM on embeddings assembled by hand."""
    encoder = make(parts, "micl")
    model, note = encoder.model, tiny_models.notes(1)[0]
    batch = encoder.preprocessor.collate([encoder.preprocessor.features(note)])
    tokens = model.connector(model.tower(batch.pixels).patches)
    start, end = int(batch.image_starts[0]), int(batch.visual_ends[0])
    words = model.llm.get_input_embeddings()(batch.input_ids)
    embeddings = torch.cat([words[:, :start], tokens, words[:, start + 4 :]], dim=1)
    states = model.llm(inputs_embeds=embeddings).last_hidden_state
    output = model(batch)
    assert torch.allclose(output.visual, model.projection(states[:, end]), atol=1e-5)
    assert torch.allclose(output.multimodal, model.projection(states[:, -1]), atol=1e-5)


def test_new_tokens_start_as_the_mean_of_the_others(parts):
    model = make(parts).model
    table = model.llm.get_input_embeddings().weight
    assert torch.allclose(table[-1], table[:-2].mean(dim=0), atol=1e-6)
    assert torch.equal(table[-1], table[-2])


def test_random_parts_depend_only_on_the_seed(parts):
    first = make(parts, seed=3).model.state_dict()
    torch.manual_seed(99)
    again, other = make(parts, seed=3).model.state_dict(), make(parts, seed=4).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"connector", "fusion", "projection"}
    model = make(parts, seed=3).model
    assert {name.split(".")[0] for name, _ in model.named_parameters() if model.is_fresh(name)} == changed
    queries = make(parts).model.connector.qformer.queries
    assert queries.std().item() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("variant", ["notellm2", "image_only"])
def test_gradient_checkpointing_changes_no_gradient(parts, variant):
    gradients = []
    for enabled in (False, True):
        encoder = make(parts, variant)
        encoder.model.set_gradient_checkpointing(enabled)
        encoder.model.train()
        embedder_loss(vectors(encoder, tiny_models.notes(4)), torch.arange(4), alpha=9.0).total.backward()
        gradients.append({name: p.grad for name, p in encoder.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_bfloat16_keeps_temperature_and_buffers_exact(parts):
    model = make(parts).model.to_precision("bf16")
    assert model.temperature.dtype == torch.float32
    assert model.projection.weight.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())


def test_batches_join_in_any_order(parts):
    encoder, notes = make(parts), tiny_models.notes(5, without_image=[1])
    whole = vectors(encoder, notes)
    pieces = [vectors(encoder, [notes[i] for i in rows]) for rows in ([3, 1], [0, 4, 2])]
    joined = join_vectors(pieces, torch.argsort(torch.tensor([3, 1, 0, 4, 2])))
    assert torch.allclose(joined.multimodal, whole.multimodal, atol=1e-5)
    assert torch.allclose(joined.visual, whole.visual, atol=1e-5)
    assert torch.equal(joined.has_visual, whole.has_visual)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_pairs_are_memorised(parts, variant):
    encoder = make(parts, variant)
    preprocessor = encoder.preprocessor
    batch = preprocessor.collate([preprocessor.features(note) for note in tiny_models.notes(16)])
    optimizer = torch.optim.AdamW([p for p in encoder.model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=240)
    encoder.model.train()
    torch.manual_seed(0)  # dropout
    losses = []
    for _ in range(240):
        loss = embedder_loss(encoder.model(batch), torch.arange(16), alpha=1.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.total.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    assert loss.visual is None or loss.visual < 0.1
