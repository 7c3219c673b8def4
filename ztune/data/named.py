"""The table of named data sets: their folders, readers and published facts.

library.py reads them. To add a data set, add an entry here, and a function to official.py if its
files have a new format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data import official
from ztune.data.coop import SPLITS, CoopSplit
from ztune.data.manifests import SplitName
from ztune.errors import ConfigError


@dataclass(frozen=True)
class Counts:
    """Published numbers of images; None if unknown."""

    train: int | None
    val: int | None
    test: int | None
    trainval: int | None = None
    """Train and val together, if only that is known."""


@dataclass(frozen=True)
class Spec:
    """A named data set."""

    title: str
    """As in the papers; its lower-case letters and digits are the name."""
    folder: str
    """Its folder in the root of all data sets."""
    images: str
    """Its image folder, which paths of a split are relative to; empty: the folder itself."""
    n_classes: int
    counts: Counts
    template: str
    page: str
    """The data set's web page."""
    obtain: str
    """What to download there, and where to put it."""
    splits: tuple[str, ...] = ()
    """Published split files, in order of preference; the last is the one that can be downloaded."""
    make: official.Maker | None = None
    """Makes a split from the official files; None: a split file is required."""
    needs: tuple[str, ...] = ()
    """Files that `make` reads besides the image folder."""
    drawn: bool = True
    """Whether `make` draws at random, so that its split should be saved."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Published class names by folder name."""
    lists: tuple[SplitName, ...] = SPLITS
    """The lists that a split file must have."""
    complete: Callable[[Path, CoopSplit], CoopSplit] | None = None
    """Completes a split file that lacks a list."""
    also: tuple[str, ...] = ()
    """Other names in papers and code."""

    @property
    def name(self) -> str:
        return _key(self.title)

    @property
    def own_split(self) -> str:
        """The file of a split made here; a published one has priority."""
        return f"split_ztune_{self.title}.json"

    @property
    def instructions(self) -> str:
        """What to download, from where, and where to put it; "it" is the data set's folder."""
        images = f"from {self.page}: {self.obtain}"
        if self.make is not None:
            return images
        return f"download {self.splits[-1]}, linked in {_COOP_SPLITS}, into it; images {images}"


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_PHOTO = "a photo of a {}."
_COOP_SPLITS = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_CLASS_NAMES = "classnames.txt, CoOp's list of folders and class names"

# Folders, split files, class names and templates: KaiyangZhou/CoOp (DATASETS.md, datasets/*.py,
# trainers/zsclip.py); for SVHN, RESISC45 and CLEVR: changdaeoh/BlackVIP (datasets/*.py, README),
# with templates ending in a full stop as in LOG-postech/ZIP. Counts: appendix of CoOp's paper,
# arXiv 2109.01134, checked only against official totals (docs/data.md); ImageNet's training images:
# ILSVRC 2012. Those of SVHN and RESISC45 follow from the official totals and the fractions in
# BlackVIP's code.
SPECS: tuple[Spec, ...] = (
    Spec(
        "Caltech101", "caltech-101", "101_ObjectCategories", 100, Counts(4128, 1649, 2465), _PHOTO,
        page="https://data.caltech.edu/records/mzrjq-6wc02",
        obtain="extract 101_ObjectCategories.tar.gz of the page into it",
        splits=("split_zhou_Caltech101.json",),
        make=official.class_folders(ignored=("BACKGROUND_Google", "Faces_easy")),
        renamed={
            "airplanes": "airplane", "Faces": "face", "Leopards": "leopard",
            "Motorbikes": "motorbike",
        },
    ),
    Spec(
        "OxfordPets", "oxford_pets", "images", 37, Counts(2944, 736, 3669),
        "a photo of a {}, a type of pet.",
        page="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        obtain="extract images.tar.gz into it",
        splits=("split_zhou_OxfordPets.json",),
    ),
    Spec(
        "Flowers102", "oxford_flowers", "jpg", 102, Counts(4093, 1633, 2463),
        "a photo of a {}, a type of flower.",
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        obtain="extract 102flowers.tgz into it",
        splits=("split_zhou_OxfordFlowers.json",),
        also=("OxfordFlowers",),
    ),
    Spec(
        "Food101", "food-101", "images", 101, Counts(50500, 20200, 30300),
        "a photo of {}, a type of food.",
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        obtain="extract food-101.tar.gz of the page, which makes the folder",
        splits=("split_zhou_Food101.json",),
        make=official.class_folders(),
    ),
    Spec(
        "FGVCAircraft", "fgvc_aircraft", "images", 100, Counts(3334, 3333, 3333),
        "a photo of a {}, a type of aircraft.",
        page="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        obtain="extract fgvc-aircraft-2013b.tar.gz of the page, and rename its folder data",
        make=official.aircraft,
        needs=(
            "variants.txt", "images_variant_train.txt", "images_variant_val.txt",
            "images_variant_test.txt",
        ),
        drawn=False,
    ),
    Spec(
        "SUN397", "sun397", "SUN397", 397, Counts(15880, 3970, 19850), _PHOTO,
        page="https://vision.princeton.edu/projects/2010/SUN/",
        obtain="extract SUN397.tar.gz into it",
        splits=("split_zhou_SUN397.json",),
    ),
    Spec(
        "DTD", "dtd", "images", 47, Counts(2820, 1128, 1692), "{} texture.",
        page="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        obtain="extract dtd-r1.0.1.tar.gz of the page, which makes the folder",
        splits=("split_zhou_DescribableTextures.json",),
        make=official.class_folders(),
        also=("DescribableTextures",),
    ),
    Spec(
        "EuroSAT", "eurosat", "2750", 10, Counts(13500, 5400, 8100),
        "a centered satellite photo of {}.",
        page="https://github.com/phelber/EuroSAT",
        obtain="extract EuroSAT.zip (the RGB images) of the page into it",
        splits=("split_zhou_EuroSAT.json",),
        make=official.class_folders(),
        renamed={
            "AnnualCrop": "Annual Crop Land", "Forest": "Forest",
            "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
            "River": "River", "SeaLake": "Sea or Lake",
        },
    ),
    Spec(
        "UCF101", "ucf101", "UCF-101-midframes", 101, Counts(7639, 1898, 3783),
        "a photo of a person doing {}.",
        page="https://www.crcv.ucf.edu/data/UCF101.php",
        obtain="extract CoOp's UCF-101-midframes.zip into it (one frame of every video of the "
        "page)",
        splits=("split_zhou_UCF101.json",),
    ),
    Spec(
        "StanfordCars", "stanford_cars", "", 196, Counts(6509, 1635, 8041), _PHOTO,
        page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        obtain="extract cars_train.tgz and cars_test.tgz into it",
        splits=("split_zhou_StanfordCars.json",),
    ),
    Spec(
        "ImageNet", "imagenet", "images", 1000, Counts(1281167, 0, 50000), _PHOTO,
        page="https://image-net.org",
        obtain="extract the training and validation images of ILSVRC 2012 into images/train and "
        f"images/val, with a folder per class in each, and add {_CLASS_NAMES}",
        make=official.imagenet,
        needs=("classnames.txt", "images/train", "images/val"),
        drawn=False,
    ),
    Spec(
        "SVHN", "svhn", "", 10, Counts(51280, 21977, 26032), "This is a photo of a {}.",
        page="http://ufldl.stanford.edu/housenumbers/",
        obtain="save the cropped digits (format 2) of the page as images, train/DIGIT/*.jpg and "
        "test/DIGIT/*.jpg",
        splits=("split_SVHN.json", "split_mlai_SVHN.json"),
        make=official.svhn,
        needs=("train", "test"),
        lists=("train", "val"),
        complete=official.complete_svhn,
    ),
    Spec(
        "RESISC45", "resisc45", "NWPU-RESISC45", 45, Counts(15750, 6300, 9450),
        "This is a photo of a {}.",
        page="https://gcheng-nwpu.github.io/",
        obtain="extract NWPU-RESISC45.rar of the page into it",
        splits=("split_mlai_Resisc45.json",),
        make=official.class_folders(),
    ),
    Spec(
        "CLEVR", "CLEVR_v1.0", "images", 8, Counts(None, None, 15000, trainval=70000),
        "This is a photo of {} objects.",
        page="https://cs.stanford.edu/people/jcjohns/clevr/",
        obtain="extract CLEVR_v1.0.zip of the page, which makes the folder",
        splits=("split_mlai_CLEVR.json",),
        make=official.clevr,
        needs=("scenes/CLEVR_train_scenes.json", "scenes/CLEVR_val_scenes.json"),
    ),
    Spec(
        "ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", 1000,
        Counts(0, 0, 10000), _PHOTO,
        page="https://github.com/modestyachts/ImageNetV2",
        obtain="extract the matched-frequency images of the page into it, and add "
        f"{_CLASS_NAMES}",
        make=official.imagenet_v2,
        needs=("classnames.txt",),
        drawn=False,
    ),
    Spec(
        "ImageNet-Sketch", "imagenet-sketch", "images", 1000, Counts(0, 0, 50889), _PHOTO,
        page="https://github.com/HaohanWang/ImageNet-Sketch",
        obtain="extract the images of the page into images, a folder per class, and add "
        f"{_CLASS_NAMES}",
        make=official.imagenet_variant,
        needs=("classnames.txt",),
        drawn=False,
    ),
    Spec(
        "ImageNet-A", "imagenet-adversarial", "imagenet-a", 200, Counts(0, 0, 7500), _PHOTO,
        page="https://github.com/hendrycks/natural-adv-examples",
        obtain=f"extract imagenet-a.tar of the page into it, and add {_CLASS_NAMES}",
        make=official.imagenet_variant,
        needs=("classnames.txt",),
        drawn=False,
    ),
    Spec(
        "ImageNet-R", "imagenet-rendition", "imagenet-r", 200, Counts(0, 0, 30000), _PHOTO,
        page="https://github.com/hendrycks/imagenet-r",
        obtain=f"extract imagenet-r.tar of the page into it, and add {_CLASS_NAMES}",
        make=official.imagenet_variant,
        needs=("classnames.txt",),
        drawn=False,
    ),
)  # fmt: skip
NAMED: Mapping[str, Spec] = {spec.name: spec for spec in SPECS}


def find_spec(name: str) -> Spec:
    """Return the data set of a name in any spelling: dtd, ImageNet-A, oxford_flowers.

    Raises: ConfigError listing the known names.
    """
    for spec in SPECS:
        if _key(name) in {_key(known) for known in (spec.title, spec.folder, *spec.also)}:
            return spec
    raise ConfigError(f'unknown data set "{name}" (known: {", ".join(NAMED)})')
