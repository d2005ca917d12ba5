"""The demo model's tokenizer: byte-level BPE with Qwen's splitting rule, special tokens and template."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, trainers

from zimage_export.synthetic.byte_tokenizer import SPECIAL_TOKENS, byte_level_bpe

from .captions import caption, chinese_words
from .scenes import random_scene

VOCABULARY = 1152

_GENERAL = """
A small cat sits on the table near an open window and looks at the rain. The old house by the river has a red roof,
two tall trees and a garden full of flowers. Please draw me a picture of the sea at night with a bright moon over it.
She reads a book under the lamp while her brother plays with the dog. What is the name of this mountain, and how high
is it? There are many birds in the sky today. We walk through the city, past the station and the market, until we come
to the bridge. In winter the fields are white with snow and the children build houses out of it. An oil painting of a
young woman with dark hair, soft light, highly detailed. Photo of a modern kitchen, wide angle, realistic, 4k. I would
like some bread, cheese, and a cup of hot coffee. This is not what they said about the people who were there before.
It has been a long time since anyone could see the stars so well. Numbers: 0 1 2 3 4 5 6 7 8 9. Hello, world!
一只小猫坐在桌子上看着窗外的雨。河边的老房子有红色的屋顶和两棵大树。请画一张夜晚大海的图片，天上有明亮的月亮。
她在灯下读书，弟弟和狗一起玩。这座山叫什么名字？今天天空中有很多鸟。我们走过城市，经过车站和市场，来到桥上。
冬天田野里都是白雪，孩子们在堆雪人。一位年轻女子的油画，柔和的光线，细节丰富。现代厨房的照片，广角，真实。
我想要面包、奶酪和一杯热咖啡。这不是他们以前说的那样。很久没有人能这样清楚地看到星星了。你好，世界！
"""


def write_tokenizer(path: Path) -> None:
    """Writes ``tokenizer.json``. Any text can be encoded; the words of captions are one token each."""
    tokenizer = byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=[token for token, _ in sorted(tokenizer.get_vocab().items())],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path))


def _corpus() -> Iterator[str]:
    """Chinese is given word by word: merges across words would make one token of what is to be composed."""
    words = re.compile("|".join(sorted(map(re.escape, chinese_words()), key=len, reverse=True)) + r"|\W+|.")
    yield from ("user", "assistant") * 2  # of the template
    yield from _GENERAL.splitlines()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = random_scene(rng)
        yield caption(scene, "en", rng)
        yield from words.findall(caption(scene, "zh", rng))
