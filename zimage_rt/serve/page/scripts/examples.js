// Prompts to begin with. The demo model knows shapes and colours alone.

import { language } from "./i18n.js";

const DEMO = {
  en: [
    "a red circle left of a blue square",
    "a large yellow star on a black background",
    "a green heart above a purple ring",
  ],
  zh: ["一个红色的圆形在一个蓝色的正方形的左边", "一个黄色大星星，黑色背景", "一个绿色的心形在一个紫色圆环的上面"],
};

const OTHERS = {
  en: [
    "A red fox in fresh snow at dawn, soft light",
    "A lighthouse on a cliff in a storm, oil painting",
    "A street food stall at night, neon signs, rain",
  ],
  zh: ["清晨雪地里的一只赤狐，柔和的光线", "暴风雨中悬崖上的灯塔，油画", "雨夜的街边小吃摊，霓虹灯招牌"],
};

export const examples = ({ bundle }) => (bundle.model === "tiny" ? DEMO : OTHERS)[language()];
