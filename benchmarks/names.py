"""Class names for benchmarks: real ones, and noun phrases of ImageNet-like length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# The categories as spelled in few-shot papers (CoOp's split file), including "lilly".
_CALTECH101 = """
    face, leopard, motorbike, accordion, airplane, anchor, ant, barrel, bass, beaver, binocular,
    bonsai, brain, brontosaurus, buddha, butterfly, camera, cannon, car side, ceiling fan,
    cellphone, chair, chandelier, cougar body, cougar face, crab, crayfish, crocodile,
    crocodile head, cup, dalmatian, dollar bill, dolphin, dragonfly, electric guitar, elephant,
    emu, euphonium, ewer, ferry, flamingo, flamingo head, garfield, gerenuk, gramophone,
    grand piano, hawksbill, headphone, hedgehog, helicopter, ibis, inline skate, joshua tree,
    kangaroo, ketch, lamp, laptop, llama, lobster, lotus, mandolin, mayfly, menorah, metronome,
    minaret, nautilus, octopus, okapi, pagoda, panda, pigeon, pizza, platypus, pyramid, revolver,
    rhino, rooster, saxophone, schooner, scissors, scorpion, sea horse, snoopy, soccer ball,
    stapler, starfish, stegosaurus, stop sign, strawberry, sunflower, tick, trilobite, umbrella,
    watch, water lilly, wheelchair, wild cat, windsor chair, wrench, yin yang
"""
CALTECH101 = tuple(" ".join(name.split()) for name in _CALTECH101.split(","))

_NOUN_LIST = """
    otter, heron, beetle, lynx, salamander, falcon, badger, moth, turtle, walrus, finch, gecko,
    ferret, toad, bison, sparrow, tortoise, weasel, trout, spider, magpie, hamster, lizard, stork,
    seal, donkey, goose, mole, raven, squid, kettle, ladder, bucket, teapot, lantern, hammer,
    violin, wagon, bench, basket, drum, mirror, pillow, candle, clock, bottle, hat, glove, boot,
    cart, anvil, broom, razor, shovel, whistle, trumpet, cradle, curtain, saddle, compass, bridge,
    tower, barn, lighthouse, windmill, fountain, tractor, canoe, sled, carousel, cabin, tunnel,
    harp, kayak, scooter, ambulance, balcony, chapel, stable, dam, mushroom, orchid, fern, cactus,
    maple, pear, pumpkin, loaf, waffle, pretzel, thistle, radish, almond, ginger, cabbage, soup,
    pancake, noodle, mango, turnip
"""
_NOUNS = tuple(_NOUN_LIST.replace(",", " ").split())
_LOOKS = (
    "red", "spotted", "wooden", "striped", "giant", "old", "northern", "silver", "folding", "small",
    "painted", "woolly",
)  # fmt: skip
_KINDS = ("mountain", "river", "garden", "harbour", "desert", "village", "winter", "kitchen")


def phrases(n_phrases: int) -> tuple[str, ...]:
    """Return `n_phrases` (at most 2,000) distinct noun phrases, two words each on average.

    Of every twenty, two have one word (until these run out), three have three and the others two.
    """
    one, two = iter(_NOUNS), _pairs(_LOOKS + _KINDS, _NOUNS)
    placed = [f"{kind} {noun}" for kind, noun in zip(_KINDS * 13, _NOUNS, strict=False)]
    three = _pairs(_LOOKS, placed)
    half = [two, two, two, one, two, two, two, three]
    turns = itertools.islice(itertools.cycle([*half, *half, two, two, two, three]), n_phrases)
    return tuple(next(turn, None) or next(two) for turn in turns)


def _pairs(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """Yield all pairs; neighbours have no word in common."""
    for shift, (i, word) in itertools.product(range(len(first)), enumerate(second)):
        yield f"{first[(i + shift) % len(first)]} {word}"


def classes_named(n_classes: int) -> tuple[str, ...]:
    """Return `n_classes` class names: CIFAR-10's or Caltech101's if enough, else phrases."""
    return next(
        names[:n_classes]
        for names in (CIFAR10, CALTECH101, phrases(2000))
        if n_classes <= len(names)
    )
