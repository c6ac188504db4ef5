"""The networks beside the model that guides use: a CLIP and a classifier."""

from pathlib import Path

import pytest
import torch
from emoji_training import classifier, clip, predictions, world
from pilotfish_emoji import FOLDER, OBJECTS

needs_font = pytest.mark.skipif(
    not world.FONT.is_file(), reason="needs the font of fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def fresh() -> world.Dataset:
    return world.dataset(512, 70_001)


@needs_font
def test_the_clip_knows_fresh_renders(fresh: world.Dataset) -> None:
    rates = clip.accuracies(FOLDER / "clip", fresh)
    assert rates["object"] >= 0.75
    assert rates["background"] >= 0.95


@needs_font
def test_the_classifier_knows_fresh_renders(fresh: world.Dataset) -> None:
    assert classifier.accuracy(FOLDER / "classifier", fresh) >= 0.85


def test_a_text_of_the_clip_is_read_alike_short_and_padded() -> None:
    import open_clip

    folder = f"local-dir:{FOLDER / 'clip'}"
    model = open_clip.create_model(folder).eval()
    texts = ["a fox", "a watercolor of a castle on a teal background", "a picture"]
    tokens = open_clip.get_tokenizer(folder)(texts)
    with torch.no_grad():
        short = clip.read(model, tokens[:, : clip.READ])
        torch.testing.assert_close(short, model.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_a_text_is_true_of_a_picture_by_what_it_says() -> None:
    texts = clip.all_texts()
    fox_on_red = torch.tensor([[OBJECTS.index("fox"), 2, 0]])
    (index,) = texts.index(fox_on_red).tolist()
    assert texts.says[index].tolist() == fox_on_red[0].tolist()
    assert clip.sentence(*fox_on_red[0].tolist()).startswith("a fox on a ")
    told = texts.tokens[texts.says[:, 2] != 0]  # plain has no word of its own
    assert len({tuple(row) for row in told.tolist()}) == len(told)


@needs_font
def test_predictions_come_with_their_own_captions_and_labels(fresh: world.Dataset) -> None:
    few = world.Dataset(fresh.images[:8], fresh.captions[:8], fresh.labels[:8])
    both = predictions.with_predictions(few, seed=3)
    added = [*range(0, 8, predictions.EVERY)] * predictions.REPEATS
    assert both.captions == few.captions + [few.captions[i] for i in added]
    assert torch.equal(both.labels[8:], few.labels[added])
    assert torch.equal(both.images[:8], few.images)
    assert both.images.shape == (8 + len(added), 3, 64, 64)
    assert torch.equal(
        predictions.predict(few.images[:2], 3), predictions.predict(few.images[:2], 3)
    )


@needs_font
@pytest.mark.slow
def test_two_steps_of_training_write_folders_that_the_libraries_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    monkeypatch.setattr(clip, "PICTURES", 32)
    clip.train_clip(num_steps=(2, 2), batch=8, out=tmp_path, target=tmp_path / "clip")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    assert model.encode_image(torch.zeros(1, 3, 64, 64)).isfinite().all()
    classifier.train_classifier(
        num_steps=2, batch=8, pictures=32, out=tmp_path, target=tmp_path / "classifier"
    )
    few = world.dataset(16, 70_002)
    assert 0 <= classifier.accuracy(tmp_path / "classifier", few) <= 1
