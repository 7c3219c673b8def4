"""Write ``examples/digits``: scikit-learn's 1,797 handwritten digits as images in class folders.

The placement was fixed before any accuracy was measured: each digit, 8 x 8 with values 0 to 16, is
resized bicubically to 16 pixels, white, and centred on a black canvas of 24 pixels.

Run: ``python -m examples.mini_clip.digits --out examples/digits``
"""

import argparse
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.mini_clip.captions import DIGITS

CANVAS, DIGIT_SIDE = 24, 16  # pixels
CREDIT: Final = (
    '"Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning '
    "Repository, https://doi.org/10.24432/C50P49, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); "
    "the 1,797 images shipped with scikit-learn, scaled and centred on a black canvas."
)


def place(digit: NDArray[np.float64]) -> Image.Image:
    """Draw one digit f64[8, 8] of values 0 to 16 as a greyscale image of 24 x 24 pixels."""
    grey = np.rint(digit * (255 / 16)).astype(np.uint8)
    scaled = Image.fromarray(grey).resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(scaled, ((CANVAS - DIGIT_SIDE) // 2, (CANVAS - DIGIT_SIDE) // 2))
    return canvas


def images() -> list[tuple[str, Image.Image]]:
    """Return every digit's path (``three/0013.png``) and image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    names = [f"{DIGITS[label]}/{index:04d}.png" for index, label in enumerate(data.target)]
    return [(name, place(digit)) for name, digit in zip(names, data.images, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Write the images and their credit."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_clip.digits")
    parser.add_argument("--out", type=Path, required=True, help="folder for the class folders")
    out: Path = parser.parse_args(arguments).out
    for name, image in images():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(out / name, optimize=True)
    (out / "NOTICE").write_text(CREDIT + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
