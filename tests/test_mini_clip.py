"""The default model's making: images, captions, tokenizer, training, and the example digits."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")

from tokenizers import Tokenizer

from examples.mini_clip import captions as c
from examples.mini_clip import digits
from examples.mini_clip.images import draw
from examples.mini_clip.tokens import CONTEXT_LENGTH, END, START, build_tokenizer, encode
from examples.mini_clip.train import Settings, evaluate, train

EXAMPLES = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(4000)


def test_same_seed_same_bytes() -> None:
    first, shown = draw(40, np.random.default_rng(3))
    again, shown_again = draw(40, np.random.default_rng(3))
    assert first.tobytes() == again.tobytes()
    assert np.array_equal(shown, shown_again)
    assert first.tobytes() != draw(40, np.random.default_rng(4))[0].tobytes()


def test_a_caption_is_true_of_its_own_image() -> None:
    rng = np.random.default_rng(0)
    shown = draw(400, rng)[1]
    captions = [c.describe(image, rng) for image in shown]
    fits = c.compatible(np.stack([caption.named for caption in captions]), shown)
    assert fits.diagonal().all()
    assert set(shown[:, c.KIND]) == set(range(len(c.KINDS)))
    assert not any("  " in caption.text for caption in captions)


def _image(kind: int, name: str, **values: int) -> c.Rows:
    row = np.full(c.N_ATTRIBUTES, c.ABSENT, np.int64)
    row[c.KIND] = kind
    row[c.SUBJECT] = c.FIRST_SUBJECT[kind] + c.NAMES[kind].index(name)
    for attribute, value in values.items():
        row[getattr(c, attribute)] = value
    return row


def test_which_captions_fit_which_images() -> None:
    images = np.stack(
        [
            _image(c.DIGIT, "three", INK=c.WHITE, HAND=1),
            _image(c.DIGIT, "three", INK=c.BLACK, HAND=0),
            _image(c.LETTER, "b", INK=c.WHITE, HAND=1),
            _image(c.SHAPE, "circle", INK=c.WHITE, COUNT=2),
            _image(c.TEXTURE, "waves", INK=c.WHITE),
        ]
    )
    named = np.full((5, c.N_ATTRIBUTES), c.UNNAMED, np.int64)
    named[0, c.SUBJECT] = images[0, c.SUBJECT]  # "three."
    named[1, c.HAND] = 1  # "something handwritten."
    named[2, [c.SUBJECT, c.COUNT]] = images[3, [c.SUBJECT, c.COUNT]]  # "three circles."
    named[3, c.INK] = c.WHITE  # "something white."
    expected = [[1, 1, 0, 1, 1], [1, 0, 0, 0, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert np.array_equal(c.compatible(named, images), np.array(expected, bool))


@pytest.mark.parametrize("kind", range(len(c.KINDS)))
def test_captions_of_every_kind_fit_the_context(tokenizer: Tokenizer, kind: int) -> None:
    rng = np.random.default_rng(kind)
    shown = draw(600, rng)[1]
    texts = [c.describe(p, rng).text for p in shown[shown[:, c.KIND] == kind] for _ in range(5)]
    ids = encode(tokenizer, texts)
    ends = (ids == tokenizer.token_to_id(END)).sum(axis=1)
    assert ids.shape[1] == CONTEXT_LENGTH
    assert (ends == 1).all()
    assert (ids.argmax(axis=1) == (ids == tokenizer.token_to_id(END)).argmax(axis=1)).all()


def test_the_tokenizer_takes_any_text(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    assert (tokenizer.token_to_id(START), tokenizer.token_to_id(END)) == (size - 2, size - 1)
    assert tokenizer.encode("THREE.").ids == tokenizer.encode(" three .").ids
    assert len(tokenizer.encode("three", add_special_tokens=False).ids) == 1
    text = "żółw 漢字 🐢 \x00\x7f"
    assert b"".join(_bytes(tokenizer, text)).decode() == "".join(text.split())


def _bytes(tokenizer: Tokenizer, text: str) -> list[bytes]:
    """Return each token's bytes, by GPT-2's table of printable characters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    table |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    return [bytes(table[x] for x in token.removesuffix("</w>")) for token in tokens]


def test_a_caption_beyond_the_context_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected at most 24"):
        encode(tokenizer, ["three " * 30])


def test_three_steps_of_training(tokenizer: Tokenizer) -> None:
    settings = Settings(steps=3, batch=16, workers=0)
    model, losses = train(tokenizer, settings)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert losses == train(tokenizer, settings)[1]
    figures = evaluate(model, tokenizer, seed=0, n_batches=1)
    assert np.isfinite(figures["loss"])
    assert 0 <= figures["naming_accuracy"] <= 1


def test_the_checkpoint_opens_in_open_clip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import open_clip
    import torch

    from examples.mini_clip.__main__ import save

    model, _ = train(tokenizer, Settings(steps=1, batch=8, workers=0))
    save(tmp_path, model, tokenizer, {"loss": 1.0})
    opened = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ids = torch.from_numpy(encode(tokenizer, ["the digit three."]))
    assert torch.equal(opened.encode_text(ids), model.encode_text(ids))
    assert json.loads((tmp_path / "figures.json").read_text()) == {"loss": 1.0}
    assert not list(tmp_path.glob("*.part"))


def test_the_example_digits_are_what_the_script_writes() -> None:
    pytest.importorskip("sklearn")
    from PIL import Image

    written = digits.images()
    assert len(written) == 1797 == len(list(EXAMPLES.glob("*/*.png")))
    for name, image in written[::300]:
        stored = Image.open(EXAMPLES / name)
        assert stored.mode == image.mode
        assert stored.tobytes() == image.tobytes()
