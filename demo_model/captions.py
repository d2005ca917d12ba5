"""What people might type to get a scene: several phrasings in English and in Chinese."""

from collections.abc import Iterator

import numpy as np

from .scenes import Language, Relation, Scene, Thing

_OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}

_EN_RELATION: dict[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_EN_PLACE = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "centre": "in the middle",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}
_EN_SIDE: dict[Relation, str] = {
    "left": "on the left",
    "right": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}

_ZH_SHAPE = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星形", "星星", "五角星"),
    "ring": ("圆环", "环形"),
    "heart": ("心形", "爱心"),
}
_ZH_COLOUR = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
}
_ZH_BACKGROUND = {
    "white": "白色",
    "black": "黑色",
    "gray": "灰色",
    "light blue": "浅蓝色",
    "pink": "粉色",
    "cream": "米色",
}
_ZH_RELATION: dict[Relation, tuple[str, ...]] = {
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "above": ("上面", "上方"),
    "below": ("下面", "下方"),
}
_ZH_PLACE = {
    "top left": "左上角",
    "top": "上方",
    "top right": "右上角",
    "left": "左边",
    "centre": "中间",
    "right": "右边",
    "bottom left": "左下角",
    "bottom": "下方",
    "bottom right": "右下角",
}


def caption(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """One way to ask for the scene."""
    return _english(scene, rng) if language == "en" else _chinese(scene, rng)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _english(scene: Scene, rng: np.random.Generator) -> str:
    def name(thing: Thing) -> str:
        return _article(f"{thing.size} {thing.colour} {thing.shape}".strip())

    first = name(scene.things[0])
    if len(scene.things) == 1:
        text = first
        if scene.place:
            where = _EN_PLACE[scene.place]
            text = _pick((f"{first} {where}", f"{first} {where}", f"{where}, {first}"), rng)
    elif scene.relation is None:
        text = f"{first} and {name(scene.things[1])}"
    else:
        second, relation = name(scene.things[1]), scene.relation
        text = _pick(
            (
                f"{first} {_pick(_EN_RELATION[relation], rng)} {second}",
                f"{first} {_pick(_EN_RELATION[relation], rng)} {second}",
                f"{second} {_pick(_EN_RELATION[_OPPOSITE[relation]], rng)} {first}",
                f"{first} {_EN_SIDE[relation]} and {second} {_EN_SIDE[_OPPOSITE[relation]]}",
            ),
            rng,
        )
    if text.startswith("a"):  # and not with "in the middle"
        text = _pick((text, text, text, f"a picture of {text}", f"draw {text}"), rng)
    if scene.mentions_background:
        ground = (
            f"{scene.background[0]} background"
            if len(scene.background) == 1
            else f"{scene.background[0]} to {scene.background[1]} gradient background"
        )
        text = _pick((f"{text} on {_article(ground)}", f"{text} on {_article(ground)}", f"{text}, {ground}"), rng)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def _chinese(scene: Scene, rng: np.random.Generator) -> str:
    def bare(thing: Thing) -> str:
        of = {"": _pick(("", "的"), rng), "small": "小", "large": "大"}[thing.size]
        return f"{_ZH_COLOUR[thing.colour]}{of}{_pick(_ZH_SHAPE[thing.shape], rng)}"

    def name(thing: Thing) -> str:
        return "一个" + bare(thing)

    first = name(scene.things[0])
    if len(scene.things) == 1:
        text = first
        if scene.place:
            where = _ZH_PLACE[scene.place]
            text = _pick((f"{where}有{first}", f"{first}在{where}", f"{where}的{first}"), rng)
    elif scene.relation is None:
        text = f"{first}{_pick(('和', '与'), rng)}{name(scene.things[1])}"
    else:
        second = name(scene.things[1])
        where, other = (_pick(_ZH_RELATION[r], rng) for r in (scene.relation, _OPPOSITE[scene.relation]))
        text = _pick(
            (
                f"{first}在{second}的{where}",
                f"{second}的{where}有{first}",
                f"{second}{where}的{first}",
                f"{where}是{first}，{other}是{second}",
            ),
            rng,
        )
    if scene.mentions_background:
        names = [_ZH_BACKGROUND[colour] for colour in scene.background]
        ground = f"{names[0]}背景" if len(names) == 1 else f"{names[0]}到{names[1]}的渐变背景"
        if _simple(scene):
            text = _pick((f"{ground}上的{text}", f"{text}，{ground}", f"{ground}，{text}"), rng)
        else:
            text = _pick((f"{text}，{ground}", f"{ground}，{text}"), rng)
    else:
        text = _pick((text, text, text, f"画{text}", f"一张图：{text}"), rng)
    return text + ("。" if rng.random() < 0.15 else "")


def _simple(scene: Scene) -> bool:
    return len(scene.things) == 1 and scene.place is None


def chinese_words() -> Iterator[str]:
    """The words that Chinese captions are made of."""
    yield from ("一个", "画", "一张图", "背景", "渐变", "上的", "有", "在", "是", "的", "到", "和", "与", "大", "小")
    yield from (*_ZH_COLOUR.values(), *_ZH_BACKGROUND.values(), *_ZH_PLACE.values())
    for words in (*_ZH_SHAPE.values(), *_ZH_RELATION.values()):
        yield from words
